"""dX = dY W + scaling · drop(dS A) with W in 4 bits, decoded in registers; the mask of the low-rank part alone.

The sum is over the rows of W. A tile decoded as it lies in memory is the second operand as tensor cores read it: it is
stored to shared memory once, not transposed. The low-rank step comes first, as in `_extended_gemm`; where tiles do not
fill the GPU, N is split and the partials are added in a fixed order (`splitk_reduce`).

Floor as in `_nf4_gemm`: the packed weight once, N=K=4096: 2.1 us at M=16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import low_rank, tile_of
from peft_kernels.kernels.triton._nf4_tile import aligned, codes, layout_of, weights


def nf4_grad_x(
    grad_y: Tensor,
    q: NF4Weight,
    grad_s: Tensor | None = None,
    a: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dY W + scaling · drop(dS a) for dY [M, N], dS [M, r], a [r, K] of one dtype and any strides; [M, K].

    Dropout, when there is a seed, has the mask of a matrix [M, K].
    """
    (m, n), k = grad_y.shape, q.layout[1]
    r = 0 if a is None else a.shape[0]
    arch = _launch.architecture(grad_y.device)
    config = tuning.config(
        arch,
        "nf4_grad_x" if aligned(q) else "nf4_grad_x_any",
        grad_y.dtype,
        dropout=seed is not None,
        m=_launch.bucket(m),
        n=n,
        r=r,
    )
    tiles = _launch.blocks(m, config.block_m) * _launch.blocks(k, config.block_k)
    splits, n_per_split = _launch.split(n, config.block_n, tiles, config.programs)
    out = torch.empty((splits, m, k), dtype=grad_y.dtype if splits == 1 else torch.float32, device=grad_y.device)
    if out.numel() == 0:
        return out[0]
    layout = layout_of(q, widest=config.block_k)
    _launch.launch(
        _nf4_grad_x, (tiles, splits), grad_y.device,
        *layout.arguments, grad_y, grad_s, a, out, seed, m, n, k, r, n_per_split, *grad_y.stride(),
        *(grad_s.stride() if grad_s is not None else (0, 0)), *(a.stride() if a is not None else (0, 0)),
        -(-k // LANES), threshold(dropout_p), scaling * scale(dropout_p),
        WHOLE=layout.whole(config.block_k) and n % config.block_n == 0,
        PRECISION=_launch.dot_precision(grad_y.dtype),
        **{**config.options(), "BLOCK_R": min(_launch.padded_rank(max(r, 1)), config.block_r)}, **layout.options,
    )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, grad_y.dtype)


@triton.jit(do_not_specialize=["M", "threshold"])
def _nf4_grad_x(
    packed, absmax, nested_absmax, nested_map, nested_offset, first, row_stride,
    grad_y, s, a, out, seed, M, N, K, R, n_per_split,
    stride_ym, stride_yn, stride_sm, stride_sr, stride_ar, stride_ak, groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, SEGMENT: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, FORM: tl.constexpr,
    STRADDLES: tl.constexpr, MASKED: tl.constexpr, ENDS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """out [split, M, K], contiguous; s and a None without a low-rank part, which is the first split's."""
    row, column = tile_of(tl.program_id(0), M, K, BLOCK_M, BLOCK_K, GROUP_M)
    split = tl.program_id(1)
    if s is not None:
        total = low_rank(
            s, a, seed, row, column, M, K, tl.where(split == 0, R, 0), stride_sm, stride_sr, stride_ar, stride_ak,
            groups, threshold, factor, BLOCK_M, BLOCK_K, BLOCK_R, False, PRECISION,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)

    per_row: tl.constexpr = BLOCK_K // SEGMENT
    segment = tl.arange(0, BLOCK_N * per_row)
    K = K // ENDS * ENDS  # the same number, but the compiler sees how far rows are aligned
    begin = split * n_per_split
    end = tl.minimum(begin + n_per_split, N)
    offset = segment % per_row * SEGMENT
    w_rows = segment // per_row
    left = K - column.to(tl.int32) - offset
    start = first + (begin + w_rows).to(tl.int64) * row_stride + column + offset
    table = codes(FORM)

    # Rows beyond the last are the last again: loads need no mask, and what they give is not stored.
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_K)
    inner = tl.arange(0, BLOCK_N)
    y_pointers = (
        grad_y + tl.minimum(rows, M - 1)[:, None] * stride_ym + (begin + inner)[None, :].to(tl.int64) * stride_yn
    )
    y_step, w_step = BLOCK_N * tl.cast(stride_yn, tl.int64), BLOCK_N * tl.cast(row_stride, tl.int64)
    for n in range(begin, end, BLOCK_N):
        if WHOLE:
            y_tile = tl.load(y_pointers)
        else:
            y_tile = tl.load(y_pointers, mask=(inner < end - n)[None, :], other=0.0)
        w_tile = weights(
            packed, absmax, nested_absmax, nested_map, nested_offset, table, start, left,
            None if WHOLE else (w_rows < end - n) & (left > 0), grad_y.dtype.element_ty,
            BLOCK_N * per_row, SEGMENT, SHIFT, ALIGNED, FORM, STRADDLES, MASKED, ENDS,
        )  # fmt: skip
        w_tile = tl.reshape(w_tile, (BLOCK_N, BLOCK_K))
        total = tl.dot(y_tile, w_tile, total, input_precision=PRECISION)
        y_pointers += y_step
        start += w_step

    out += split.to(tl.int64) * M * K
    pointers = out + rows[:, None] * K + columns[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < K)[None, :])
