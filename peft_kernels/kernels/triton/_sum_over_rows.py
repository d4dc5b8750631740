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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
    partials = partial_sums(low, x, dropout_p, seed, transposed=transposed)
    return torch.ops.peft_kernels.splitk_reduce(partials, scaling * scale(dropout_p), dtype)


def partial_sums(
    low: Tensor,
    x: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    transposed: bool = False,
    overlap: bool = False,
) -> Tensor:
    """The first stage of `sum_over_rows`: float32 [splits, r, K] or [splits, K, r] that add up to lowᵀ drop(x), without
    the factor 1 / (1 - p).

    Args:
        overlap: since `low` and `x` were complete, only an `extended_gemm` and calls of this function with `overlap`
            were launched on this stream, and no tensor that they use was freed since. The pass may then run beside
            them, in the shared memory that the GEMM leaves and on the multiprocessors where its tiles run out.
    """
    (m, k), r = x.shape, low.shape[1]
    config = tuning.config(_launch.architecture(x.device), "sum_over_rows", x.dtype, dropout=seed is not None, r=r)
    block_r = min(_launch.padded_rank(r), config.block_r)
    tiles = _launch.blocks(k, config.block_k) * _launch.blocks(r, block_r)
    splits, m_per_split = _launch.split(m, config.block_m, tiles, config.programs)
    shape = (k, r) if transposed else (r, k)
    partials = torch.empty((splits, *shape), dtype=torch.float32, device=x.device)
    if k:
        strides = (1, r) if transposed else (k, 1)
        _launch.launch(
            _sum_over_rows, (tiles, splits), x.device,
            low, x, partials, seed, m, k, r, m_per_split, *low.stride(), *x.stride(), *strides,
            -(-k // LANES), threshold(dropout_p),
            PRECISION=_launch.dot_precision(x.dtype), **{**config.options(), "BLOCK_R": block_r},
            **_launch.overlapping(overlap, x.device),
        )  # fmt: skip
    return partials


@triton.jit(do_not_specialize=["M", "threshold", "m_per_split"])
def _sum_over_rows(
    low, x, out, seed, M, K, R, m_per_split, stride_lm, stride_lr, stride_xm, stride_xk, stride_or, stride_ok,
    groups, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out[split] (R K numbers, strides given) = lowᵀ x over this split's rows; x is masked when there is a seed."""
    if OVERLAP:
        gdc_launch_dependents()
    pid, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks_r = tl.cdiv(R, BLOCK_R)  # the rank blocks of the same columns run together and share x in L2
    column = pid // blocks_r * BLOCK_K
    columns = column.to(tl.int64) + tl.arange(0, BLOCK_K)
    ranks = (pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    begin = split * m_per_split
    end = tl.minimum(begin + m_per_split, M)
    rows = begin + tl.arange(0, BLOCK_M)
    columns_in, ranks_in = columns < K, ranks < R

    # `low` is loaded transposed and comes first in the product, so that x is used as it lies in memory: on sm_80 a
    # transposed x would leave the asynchronous copies.
    low_pointers = low + ranks[:, None] * stride_lr + rows[None, :] * stride_lm
    x_pointers = x + rows[:, None] * stride_xm + columns[None, :] * stride_xk
    x_step, low_step = BLOCK_M * tl.cast(stride_xm, tl.int64), BLOCK_M * tl.cast(stride_lm, tl.int64)
    if seed is not None:
        key = tl.load(seed)

    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for row in range(begin, end, BLOCK_M):
        rows_in = tl.arange(0, BLOCK_M) < end - row
        x_tile = tl.load(x_pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
        low_tile = tl.load(low_pointers, mask=ranks_in[:, None] & rows_in[None, :], other=0.0)
        if seed is not None:
            keep = kept(key, row + tl.arange(0, BLOCK_M), column, groups, threshold, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, tl.zeros_like(x_tile))
        total = tl.dot(low_tile, x_tile, total, input_precision=PRECISION)
        x_pointers += x_step
        low_pointers += low_step

    out_pointers = out + split * K * R + ranks[:, None] * stride_or + columns[None, :] * stride_ok
    tl.store(out_pointers, total, mask=ranks_in[:, None] & columns_in[None, :])
    if OVERLAP and tl.program_id(0) + tl.program_id(1) == 0:
        gdc_wait()  # one program sees to it that this kernel does not end before its predecessor
