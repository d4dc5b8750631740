"""y = x Wᵀ + bias + scaling · S Bᵀ with W in 4 bits, decoded in registers.

For a few rows yᵀ = W xᵀ: W is the operand that tensor cores take from registers, and a decoded weight goes through no
memory. On sm_90 the lanes of a warp group take 4 of every 16 columns. W and x are multiplied with their columns in
another order (`permuted`), in which a lane has neighbouring columns, so that its weights are of few blocks; x, much the
smaller, is loaded by 4 bytes in that order. For more rows, where that costs more, decoded tiles go through shared
memory as the second operand.

The low-rank step comes first, as in `_extended_gemm`. Where tiles do not fill the GPU, K is split and the partials are
added in a fixed order (`splitk_reduce`).

Floor, N=K=4096, nested, 4.3 TB/s: 2.1 us at M=16, 2.7 at M=64. At 5.5 to 6.8 instructions a weight, decoding alone
takes 3.0 to 3.7 us of an H200's issue slots. Above some 1000 rows decoding once and a dense GEMM cost less.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import low_rank, tile_of
from peft_kernels.kernels.triton._nf4_tile import Layout, aligned, codes, layout_of, permuted, permuted_columns, weights

_ALIGNED = 8  # elements of a 16-byte load
_FEW = 32  # rows of x up to which W comes first


def nf4_gemm(
    x: Tensor, q: NF4Weight, bias: Tensor | None, s: Tensor | None = None, b: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """x Wᵀ + bias + scaling · s bᵀ for x [M, K], s [M, r], b [N, r] of one dtype and any strides; [M, N]."""
    (m, k), n = x.shape, q.layout[0]
    r = 0 if b is None else b.shape[1]
    arch = _launch.architecture(x.device)
    config = tuning.config(arch, "nf4_gemm" if aligned(q) else "nf4_gemm_any", x.dtype, m=_launch.bucket(m), n=n, r=r)
    tiles = _launch.blocks(m, config.block_m) * _launch.blocks(n, config.block_n)
    splits, k_per_split = _launch.split(k, config.block_k, tiles, config.programs)
    out = torch.empty((splits, m, n), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if out.numel() == 0:
        return out[0]
    layout = layout_of(q, widest=config.block_k)
    _launch.launch(
        _nf4_gemm, (tiles, splits), x.device,
        *layout.arguments, x, bias, s, b, out, m, n, k, r, k_per_split, *x.stride(),
        0 if bias is None else bias.stride(0), *(s.stride() if s is not None else (0, 0)),
        *(b.stride() if b is not None else (0, 0)), scaling,
        WHOLE=layout.whole(config.block_k), X_ALIGNED=math.gcd(x.stride(0), _ALIGNED),
        **_orientation(arch, layout, config), PRECISION=_launch.dot_precision(x.dtype),
        **{**config.options(), "BLOCK_R": min(_launch.padded_rank(max(r, 1)), config.block_r)}, **layout.options,
    )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)


def _orientation(arch: str, layout: Layout, config: Any) -> dict[str, bool]:
    """Which operand comes first, and whether columns are permuted: see above."""
    few = config.block_m <= (_FEW if arch == "sm_90" else _FEW // 2)
    # A permuted pair is loaded as one.
    return {"W_FIRST": few, "PERMUTED": few and layout.columns % 2 == 0 and arch == "sm_90"}


@triton.jit(do_not_specialize=["M"])
def _nf4_gemm(
    packed, absmax, nested_absmax, nested_map, nested_offset, first, row_stride,
    x, bias, s, b, out, M, N, K, R, k_per_split,
    stride_xm, stride_xk, stride_bias, stride_sm, stride_sr, stride_bn, stride_br, scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, SEGMENT: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, FORM: tl.constexpr,
    STRADDLES: tl.constexpr, MASKED: tl.constexpr, ENDS: tl.constexpr,
    WHOLE: tl.constexpr, W_FIRST: tl.constexpr, PERMUTED: tl.constexpr, X_ALIGNED: tl.constexpr,
):  # fmt: skip
    """out [split, M, N], contiguous; s and b None without a low-rank part, which is the first split's."""
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    ranks = tl.where(split == 0, R, 0)
    if s is None:
        total = tl.zeros((BLOCK_N, BLOCK_M) if W_FIRST else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    elif W_FIRST:
        total = low_rank(
            b, s, None, column, row, N, M, ranks, stride_bn, stride_br, stride_sr, stride_sm,
            0, 0, scaling, BLOCK_N, BLOCK_M, BLOCK_R, False, PRECISION,
        )  # fmt: skip
    else:
        total = low_rank(
            s, b, None, row, column, M, N, ranks, stride_sm, stride_sr, stride_br, stride_bn,
            0, 0, scaling, BLOCK_M, BLOCK_N, BLOCK_R, False, PRECISION,
        )  # fmt: skip

    # Rows beyond the last are the last again: loads need no mask, and what they give is not stored.
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    per_row: tl.constexpr = BLOCK_K // SEGMENT
    segment = tl.arange(0, BLOCK_N * per_row)
    offset = segment % per_row * SEGMENT
    # The same numbers, but the compiler sees how far rows are aligned.
    K, stride_xm = K // ENDS * ENDS, stride_xm // X_ALIGNED * X_ALIGNED
    begin = split * k_per_split
    end = tl.minimum(begin + k_per_split, K)
    start = first + tl.minimum(column + segment // per_row, N - 1) * row_stride + offset
    table = codes(FORM)
    inner = permuted_columns(BLOCK_K) if PERMUTED else tl.arange(0, BLOCK_K)
    x_pointers = x + tl.minimum(rows, M - 1)[:, None] * stride_xm + (begin + inner)[None, :].to(tl.int64) * stride_xk
    x_step = BLOCK_K * tl.cast(stride_xk, tl.int64)
    for k in range(begin, end, BLOCK_K):
        left = K - k - offset
        w_tile = weights(
            packed, absmax, nested_absmax, nested_map, nested_offset, table, start + k, left,
            None if WHOLE else left > 0, x.dtype.element_ty,
            BLOCK_N * per_row, SEGMENT, SHIFT, ALIGNED, FORM, STRADDLES, MASKED, ENDS,
        )  # fmt: skip
        w_tile = tl.reshape(w_tile, (BLOCK_N, BLOCK_K))
        if PERMUTED:
            w_tile = permuted(w_tile, BLOCK_N, BLOCK_K)
        if WHOLE:
            x_tile = tl.load(x_pointers)
        else:
            # Of a permuted pair both or neither: K is even there.
            bound = inner // 2 * 2 if PERMUTED else inner
            x_tile = tl.load(x_pointers, mask=(bound < end - k)[None, :], other=0.0)
        if W_FIRST:
            total = tl.dot(w_tile, tl.trans(x_tile), total, input_precision=PRECISION)
        else:
            total = tl.dot(x_tile, tl.trans(w_tile), total, input_precision=PRECISION)
        x_pointers += x_step

    if W_FIRST:
        total = tl.trans(total)
    if bias is not None:
        values = tl.load(bias + columns * stride_bias, mask=(columns < N) & (split == 0), other=0.0)
        total += values.to(tl.float32)[None, :]
    pointers = out + split.to(tl.int64) * M * N + rows[:, None] * N + columns[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
