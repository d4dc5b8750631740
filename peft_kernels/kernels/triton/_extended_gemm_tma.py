"""The extended GEMM whose big operands come through TMA descriptors (sm_90 and newer).

The main loop has no address arithmetic and no masks, so that a tile of 128x256 also holds the dropout mask without
spilling; the pointer form then spills. Floor as in `_extended_gemm`.

Descriptors are made by the host and passed by value; the hardware fills with zeros beyond the edges. The low-rank
operands keep pointers: their rows of r elements need not be multiples of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_kernels.kernels.triton._gemm_tile import finish, low_rank, tile_of
from peft_kernels.tuning.configs import ExtendedGemm

_ALIGNMENT = 16  # bytes, of the base address and of the distance between rows
_LARGEST = 1 << 31


def fits(x: Tensor, w: Tensor) -> bool:
    """Whether x [M, K] and w [K, N] or its transpose are rows that TMA can address, of 16-bit numbers."""
    return x.dtype.itemsize == 2 and rows_fit(x) and (rows_fit(w) or rows_fit(w.t()))


def rows_fit(tensor: Tensor) -> bool:
    """Whether TMA can address the rows of `tensor`: contiguous, 16-byte aligned, not overlapping."""
    size, (row_stride, element_stride) = tensor.element_size(), tensor.stride()
    return (
        element_stride == 1
        and row_stride >= tensor.shape[1] > 0
        and row_stride * size % _ALIGNMENT == 0
        and tensor.data_ptr() % _ALIGNMENT == 0
        and max(tensor.shape) < _LARGEST
    )


def descriptors(x: Tensor, w: Tensor, config: ExtendedGemm) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of x [M, K], and of w [K, N] as it lies in memory: [N, K] where its first dimension is the contiguous one."""
    block = [config.block_k, config.block_n]
    if w.stride(0) == 1:
        w, block = w.t(), block[::-1]
    return (
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(w, block),
    )


@triton.jit(do_not_specialize=["M", "threshold"])
def _extended_gemm_tma(
    x, w, s, b, bias, out, seed, M, N, K, R,
    stride_sm, stride_sr, stride_br, stride_bn, stride_bias, groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, W_TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """As `_extended_gemm`, with descriptors x [M, K] and w, [N, K] when W_TRANSPOSED, else [K, N]."""
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    total = low_rank(
        s, b, seed, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, groups, threshold, factor,
        BLOCK_M, BLOCK_N, BLOCK_R, False, "ieee",
    )  # fmt: skip
    first_row, first_column = row.to(tl.int32), column.to(tl.int32)
    for k in range(0, K, BLOCK_K):
        x_tile = x.load([first_row, k])
        if W_TRANSPOSED:
            w_tile = tl.trans(w.load([first_column, k]))
        else:
            w_tile = w.load([k, first_column])
        total = tl.dot(x_tile, w_tile, total)
    finish(total, bias, out, row, column, M, N, stride_bias, BLOCK_M, BLOCK_N)
