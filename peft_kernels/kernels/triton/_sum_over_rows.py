"""dA = scaling · dSᵀ drop(x), and dB = scaling · dYᵀ S where `_grad_s_b` does not serve: sums over the M rows.

A program owns BLOCK_K columns and one of the splits of M; the partials are added in a fixed order (`splitk_reduce`).
Floor: x once; M=8192, K=4096, bf16, 4.3 TB/s: 15.6 us (r=16: 1.1 GFLOP, 1.4 us of tensor cores), Philox as in
`_down_projection`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._philox import kept


def sum_over_rows(
    low: Tensor,
    x: Tensor,
    scaling: float,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """scaling · lowᵀ drop(x) for low [M, r] and x [M, K] of one dtype and any strides; [r, K] in `dtype`, or its
    transpose [K, r], contiguous either way."""
    (m, k), r = x.shape, low.shape[1]
    config = tuning.config(_launch.architecture(x.device), "sum_over_rows", x.dtype, dropout=seed is not None, r=r)
    block_r = min(_launch.padded_rank(r), config.block_r)
    grid = (_launch.blocks(k, config.block_k), _launch.blocks(r, block_r))
    splits, m_per_split = _launch.split(m, config.block_m, grid[0] * grid[1], config.programs)
    shape = (k, r) if transposed else (r, k)
    partials = torch.empty((splits, *shape), dtype=torch.float32, device=x.device)
    if k:
        strides = (r, 1) if transposed else (1, k)
        _launch.launch(
            _sum_over_rows, (*grid, splits), x.device,
            low, x, partials, seed, m, k, r, m_per_split, *low.stride(), *x.stride(), *strides,
            -(-k // LANES), threshold(dropout_p), scale(dropout_p),
            PRECISION=_launch.dot_precision(x.dtype), **{**config.options(), "BLOCK_R": block_r},
        )  # fmt: skip
    return torch.ops.peft_kernels.splitk_reduce(partials, scaling, dtype)


@triton.jit(do_not_specialize=["M", "threshold", "m_per_split"])
def _sum_over_rows(
    low, x, out, seed, M, K, R, m_per_split, stride_lm, stride_lr, stride_xm, stride_xk, stride_ok, stride_or,
    groups, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split] (K R numbers, any order) = the sum over this split's rows of drop(x)ᵀ low. No dropout when seed is None."""
    block_k, split = tl.program_id(0), tl.program_id(2).to(tl.int64)
    columns = block_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    begin = split * m_per_split
    end = tl.minimum(begin + m_per_split, M)
    rows = begin + tl.arange(0, BLOCK_M)
    columns_in, ranks_in = columns < K, ranks < R

    x_pointers = x + rows[:, None] * stride_xm + columns[None, :] * stride_xk
    low_pointers = low + rows[:, None] * stride_lm + ranks[None, :] * stride_lr
    x_step, low_step = BLOCK_M * tl.cast(stride_xm, tl.int64), BLOCK_M * tl.cast(stride_lm, tl.int64)
    if seed is not None:
        key = tl.load(seed)

    total = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    for row in range(begin, end, BLOCK_M):
        rows_in = tl.arange(0, BLOCK_M) < end - row
        x_tile = tl.load(x_pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
        low_tile = tl.load(low_pointers, mask=rows_in[:, None] & ranks_in[None, :], other=0.0)
        if seed is not None:
            row_numbers = row + tl.arange(0, BLOCK_M)
            keep = kept(key, row_numbers, block_k * BLOCK_K, groups, threshold, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile.to(tl.float32) * scale, 0.0).to(x_tile.dtype)
        total = tl.dot(tl.trans(x_tile), low_tile, total, input_precision=PRECISION)
        x_pointers += x_step
        low_pointers += low_step

    out_pointers = out + split * K * R + columns[:, None] * stride_ok + ranks[None, :] * stride_or
    tl.store(out_pointers, total, mask=columns_in[:, None] & ranks_in[None, :])
