"""out = x w_e + bias_e + scaling · drop(s b_e), each row with the matrices of its expert: a grouped extended GEMM.

Forward: y = x W_eᵀ + bias_e + scaling · S B_eᵀ. Backward: dX = dY W_e + scaling · drop(dS A_e). One program for each
tile of rows of one expert and columns, none of it known to the host (`_expert_rows`); GROUP_M row tiles are walked
before the next columns, so that the tiles of one expert meet its columns of w in L2. The low-rank step comes first, for
the reasons in `_extended_gemm`.

Floor, M=8192, K=2048, N=1408, 64 experts, r=16, bf16: the weights, 369 MB, x and y, 57 MB, at 4.3 TB/s: 99 us (47.2
GFLOP: 60 us at 790 TFLOP/s).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._expert_rows import bisections, locate, tile_numbers
from peft_kernels.kernels.triton._extended_gemm_tma import rows_fit
from peft_kernels.kernels.triton._gemm_tile import finish, low_rank, tile_of
from peft_kernels.kernels.triton._product import add_product
from peft_kernels.tuning.configs import ExtendedGemm


def expert_gemm(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    offsets: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x w_e + bias_e + scaling · drop(s b_e) [M, N] for x [M, K], w [E, K, N], s [M, r], b [E, r, N] and bias [E, N] of
    one dtype and any strides; 0 in rows from the last offset on.

    Dropout, when there is a seed, has the mask of a matrix [M, N]. offsets int32 [E], contiguous.
    """
    (m, k), (e, r, n) = x.shape, b.shape
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config, tma = _form(x, w, r, seed is not None)
    transposed = w.stride(1) == 1
    tiles = tile_numbers(m, e, config.block_m)
    options = {
        **config.options(),
        "BLOCK_R": min(_launch.padded_rank(r), config.block_r),
        "TMA": tma,
        "W_TRANSPOSED": transposed,
        "PRECISION": _launch.dot_precision(x.dtype),
    }
    operands: tuple[Any, ...] = _descriptors(x, w, config) if tma else (x, w)
    _launch.launch(
        _expert_gemm, (tiles * _launch.blocks(n, config.block_n),), x.device,
        *operands, s, b, bias, out, offsets, seed, m, e, n, k, r, tiles, bisections(e),
        (0, 0) if tma else x.stride(), (0, 0, 0) if tma else w.stride(), s.stride(), b.stride(),
        (0, 0) if bias is None else bias.stride(),
        -(-n // LANES), threshold(dropout_p), scaling * scale(dropout_p), **options,
    )  # fmt: skip
    return out


def _form(x: Tensor, w: Tensor, r: int, dropout: bool) -> tuple[ExtendedGemm, bool]:
    """The configuration, and whether it is of the form that takes TMA descriptors."""
    arch = _launch.architecture(x.device)
    sizes = {"m": _launch.bucket(_launch.blocks(x.shape[0], max(1, w.shape[0]))), "n": w.shape[2], "r": r}
    if _fits(x, w):
        config = tuning.config(arch, "expert_gemm_tma", x.dtype, dropout=dropout, **sizes)
        if config is not None:
            return config, True
    return tuning.config(arch, "expert_gemm", x.dtype, dropout=dropout, **sizes), False


def _fits(x: Tensor, w: Tensor) -> bool:
    """Whether TMA can address the rows of x [M, K] and of w [E, K, N] or its experts' transposes."""
    if x.dtype.itemsize != 2 or w.shape[0] == 0:
        return False
    expert = w[0]
    return rows_fit(x) and (rows_fit(expert) or rows_fit(expert.t())) and w.stride(0) > 0 and w.stride(0) % 8 == 0


def _descriptors(x: Tensor, w: Tensor, config: ExtendedGemm) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of x [M, K], and of the stack w [E, K, N] as it lies in memory. A stack has three dimensions, so that what lies
    beyond the rows of an expert reads as 0 and not as the next expert."""
    block = [1, config.block_k, config.block_n]
    if w.stride(1) == 1:
        w, block = w.transpose(1, 2), [1, config.block_n, config.block_k]
    return (
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(w, block),
    )


@triton.jit(do_not_specialize=["M", "E", "tiles", "steps", "threshold"])
def _expert_gemm(
    x, w, s, b, bias, out, offsets, seed, M, E, N, K, R, tiles, steps,
    x_strides, w_strides, s_strides, b_strides, bias_strides, groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr, W_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N] (contiguous). With TMA x and w are descriptors, w's of [E, N, K] when W_TRANSPOSED."""
    number, column = tile_of(tl.program_id(0), tiles * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    expert, row, end = locate((number // BLOCK_M).to(tl.int32), offsets, M, E, steps, BLOCK_M)
    if row >= end:
        return
    if expert == E:
        finish(tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), None, out, row, column, end, N, 0, BLOCK_M, BLOCK_N)
        return
    wide = expert.to(tl.int64)
    total = low_rank(
        s, b + wide * b_strides[0], seed, row, column, end, N, R,
        s_strides[0], s_strides[1], b_strides[1], b_strides[2], groups, threshold, factor,
        BLOCK_M, BLOCK_N, BLOCK_R, False, PRECISION,
    )  # fmt: skip
    if TMA:
        # The rows after `end` are another expert's: they are multiplied too, and not stored.
        first_row, first_column = row.to(tl.int32), column.to(tl.int32)
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([first_row, k])
            if W_TRANSPOSED:
                w_tile = tl.trans(tl.reshape(w.load([expert, first_column, k]), (BLOCK_N, BLOCK_K)))
            else:
                w_tile = tl.reshape(w.load([expert, k, first_column]), (BLOCK_K, BLOCK_N))
            total = tl.dot(x_tile, w_tile, total)
    else:
        total = add_product(
            total, x, w + wide * w_strides[0], row, column, end, N, K, x_strides, (w_strides[1], w_strides[2]),
            BLOCK_M, BLOCK_N, BLOCK_K, False, False, PRECISION,
        )  # fmt: skip
    if bias is not None:
        bias += wide * bias_strides[0]
    finish(total, bias, out, row, column, end, N, bias_strides[1], BLOCK_M, BLOCK_N)
