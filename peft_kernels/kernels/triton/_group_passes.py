"""S and dA of several adapters over one x: each tile of x is loaded once, and masked for each adapter in registers.

S_i = drop_i(x) A_iᵀ, dA_i = dS_iᵀ drop_i(x). Rows that the token mask leaves out of S are not loaded at all. Without
dropout and token mask the adapters are one adapter with the sum of their ranks, and `down_projection` and
`sum_over_rows` serve.

Floor: x once, 15.6 us at M=8192, K=4096, bf16, 4.3 TB/s. The masks cost 16 instructions an element and adapter, 0.125
clocks of an SM's lanes each against 0.112 for the memory: with three adapters the pass takes 3.4 times the floor, which
is what the mask of three passes costs too; the loads of the other two passes are what is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._philox import kept

# What a program can hold without spilling: adapters, and columns of accumulators for all of them together.
_MOST, _WIDEST = 3, 128


class _Part(NamedTuple):
    """Columns of S, from `first` on, that belong to one adapter."""

    adapter: int
    first: int
    rank: int


def _launches(ranks: Sequence[int], widest: int) -> Iterator[list[_Part]]:
    """The parts of each launch: as many adapters as fit side by side; those above `widest` are cut up."""
    waiting: list[_Part] = []
    first = 0
    for adapter, r in enumerate(ranks):
        for start in range(0, r, widest):
            part = _Part(adapter, first + start, min(widest, r - start))
            together = [*waiting, part]
            if len(together) > _MOST or len(together) * _width(together) > _WIDEST:
                yield waiting
                waiting = []
            waiting.append(part)
        first += r
    yield waiting


def _width(parts: Sequence[_Part]) -> int:
    return _launch.padded_rank(max(part.rank for part in parts))


def _of_parts(parts: Sequence[_Part], dropout_ps: Sequence[float]) -> tuple[tuple, ...]:
    """Columns, ranks, adapters, thresholds and factors of the parts, as the kernels take them."""
    ps = [dropout_ps[part.adapter] for part in parts]
    return (
        tuple(part.first for part in parts),
        tuple(part.rank for part in parts),
        tuple(part.adapter for part in parts),
        tuple(threshold(p) for p in ps),
        tuple(scale(p) for p in ps),
    )


def group_down_projection(
    x: Tensor,
    a: Tensor,
    ranks: Sequence[int],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
    token_mask: Tensor | None,
) -> Tensor:
    """The drop_i(x) A_iᵀ side by side [M, Σ r], summed in float32, 0 in rows where `token_mask` [M] is False.

    x [M, K] and a [Σ r, K], the As one after the other, are of one dtype and any strides; without seeds [adapters]
    nothing is dropped.
    """
    (m, k), r = x.shape, a.shape[0]
    if seeds is None:
        ranks, dropout_ps = [r], [0.0]
    config = tuning.config(
        _launch.architecture(x.device),
        "group_down_projection",
        x.dtype,
        dropout=seeds is not None,
        m=_launch.bucket(m),
        r=max(ranks),
    )
    splits, k_per_split = _launch.split(k, config.block_k, _launch.blocks(m, config.block_m), config.programs)
    out = torch.empty((splits, m, r), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if token_mask is not None:
        # 8-bit loads, even of a mask, would make Triton lay the tiles of tl.dot out for 8-bit numbers, on sm_80 without
        # asynchronous copies.
        token_mask = token_mask.to(torch.int32)
    for parts in _launches(ranks, config.block_r) if m else ():
        _launch.launch(
            _group_down_projection, (_launch.blocks(m, config.block_m), splits), x.device,
            x, a, out, seeds, token_mask, m, k, r, k_per_split, *x.stride(), *a.stride(), -(-k // LANES),
            *_of_parts(parts, dropout_ps), PRECISION=_launch.dot_precision(x.dtype),
            **{**config.options(), "BLOCK_R": _width(parts)},
        )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)


def group_sum_over_rows(
    grad_s: Tensor, x: Tensor, ranks: Sequence[int], dtype: torch.dtype, dropout_ps: Sequence[float], seeds: Tensor
) -> Tensor:
    """The dS_iᵀ drop_i(x) one below the other [Σ r, K] in `dtype`, for grad_s [M, Σ r] and x [M, K] of one dtype."""
    (m, k), r = x.shape, grad_s.shape[1]
    config = tuning.config(
        _launch.architecture(x.device), "group_sum_over_rows", x.dtype, dropout=True, m=_launch.bucket(m), r=max(ranks)
    )
    tiles = _launch.blocks(k, config.block_k)
    splits, m_per_split = _launch.split(m, config.block_m, tiles, config.programs)
    partials = torch.empty((splits, r, k), dtype=torch.float32, device=x.device)
    for parts in _launches(ranks, config.block_r) if k else ():
        _launch.launch(
            _group_sum_over_rows, (tiles, splits), x.device,
            grad_s, x, partials, seeds, m, k, r, m_per_split, *grad_s.stride(), *x.stride(), -(-k // LANES),
            *_of_parts(parts, dropout_ps), PRECISION=_launch.dot_precision(x.dtype),
            **{**config.options(), "BLOCK_R": _width(parts)},
        )  # fmt: skip
    return torch.ops.peft_kernels.splitk_reduce(partials, 1.0, dtype)


@triton.jit
def _with(values, value):
    """The tuple `values` and one more."""
    return values + (value,)  # noqa: RUF005


@triton.jit
def _keys(seeds, adapters):
    """The seed of each part."""
    keys = ()
    for i in tl.static_range(len(adapters)):
        keys = _with(keys, tl.load(seeds + adapters[i]))
    return keys


@triton.jit
def _zeros(parts, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr):
    """An accumulator for each part."""
    totals = ()
    for _ in tl.static_range(len(parts)):
        totals = _with(totals, tl.zeros((BLOCK_0, BLOCK_1), dtype=tl.float32))
    return totals


@triton.jit(do_not_specialize=["M"])
def _group_down_projection(
    x, a, out, seeds, token_mask, M, K, R, k_per_split, stride_xm, stride_xk, stride_ar, stride_ak, groups,
    firsts, widths, adapters, thresholds, factors,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The columns of the parts in out [split, M, R] (contiguous). No dropout when seeds is None."""
    pid, split = tl.program_id(0), tl.program_id(1)
    rows = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    begin = split * k_per_split
    end = tl.minimum(begin + k_per_split, K)
    columns = (begin + tl.arange(0, BLOCK_K)).to(tl.int64)
    rows_in = rows < M
    rows_wanted = rows_in
    if token_mask is not None:
        rows_wanted = rows_in & (tl.load(token_mask + rows, mask=rows_in, other=0) != 0)
    if seeds is not None:
        keys = _keys(seeds, adapters)

    x_pointers = x + rows[:, None] * stride_xm + columns[None, :] * stride_xk
    a_pointers = a + columns[:, None] * stride_ak + ranks[None, :].to(tl.int64) * stride_ar
    x_step, a_step = BLOCK_K * tl.cast(stride_xk, tl.int64), BLOCK_K * tl.cast(stride_ak, tl.int64)
    totals = _zeros(firsts, BLOCK_M, BLOCK_R)
    for column in range(begin, end, BLOCK_K):
        columns_in = tl.arange(0, BLOCK_K) < end - column
        x_tile = tl.load(x_pointers, mask=rows_wanted[:, None] & columns_in[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(len(firsts)):
            a_tile = tl.load(
                a_pointers + firsts[i] * tl.cast(stride_ar, tl.int64),
                mask=columns_in[:, None] & (ranks < widths[i])[None, :],
                other=0.0,
            )
            part = x_tile
            if seeds is not None:
                keep = kept(keys[i], rows, column, groups, thresholds[i], BLOCK_M, BLOCK_K)
                part = tl.where(keep, x_tile, tl.zeros_like(x_tile))
            sums = _with(sums, tl.dot(part, a_tile, totals[i], input_precision=PRECISION))
        totals = sums
        x_pointers += x_step
        a_pointers += a_step

    out_pointers = out + split.to(tl.int64) * M * R + rows[:, None] * R + ranks[None, :]
    for i in tl.static_range(len(firsts)):
        values = (totals[i] * factors[i]).to(out.dtype.element_ty)
        tl.store(out_pointers + firsts[i], values, mask=rows_in[:, None] & (ranks < widths[i])[None, :])


@triton.jit(do_not_specialize=["M", "m_per_split"])
def _group_sum_over_rows(
    low, x, out, seeds, M, K, R, m_per_split, stride_lm, stride_lr, stride_xm, stride_xk, groups,
    firsts, widths, adapters, thresholds, factors,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows of the parts in out [split, R, K] (contiguous)."""
    column, split = tl.program_id(0) * BLOCK_K, tl.program_id(1).to(tl.int64)
    columns = column.to(tl.int64) + tl.arange(0, BLOCK_K)
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    begin = split * m_per_split
    end = tl.minimum(begin + m_per_split, M)
    rows = begin + tl.arange(0, BLOCK_M)
    columns_in = columns < K
    keys = _keys(seeds, adapters)

    low_pointers = low + ranks[:, None] * stride_lr + rows[None, :] * stride_lm
    x_pointers = x + rows[:, None] * stride_xm + columns[None, :] * stride_xk
    x_step, low_step = BLOCK_M * tl.cast(stride_xm, tl.int64), BLOCK_M * tl.cast(stride_lm, tl.int64)
    totals = _zeros(firsts, BLOCK_R, BLOCK_K)
    for row in range(begin, end, BLOCK_M):
        rows_in = tl.arange(0, BLOCK_M) < end - row
        x_tile = tl.load(x_pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(len(firsts)):
            low_tile = tl.load(
                low_pointers + firsts[i] * tl.cast(stride_lr, tl.int64),
                mask=(ranks < widths[i])[:, None] & rows_in[None, :],
                other=0.0,
            )
            keep = kept(keys[i], row + tl.arange(0, BLOCK_M), column, groups, thresholds[i], BLOCK_M, BLOCK_K)
            part = tl.where(keep, x_tile, tl.zeros_like(x_tile))
            sums = _with(sums, tl.dot(low_tile, part, totals[i], input_precision=PRECISION))
        totals = sums
        x_pointers += x_step
        low_pointers += low_step

    out_pointers = out + split * R * K + ranks[:, None] * K + columns[None, :]
    for i in tl.static_range(len(firsts)):
        inside = (ranks < widths[i])[:, None] & columns_in[None, :]
        tl.store(out_pointers + firsts[i] * tl.cast(K, tl.int64), totals[i] * factors[i], mask=inside)
