"""dA_a = scaling · Σ w dSᵀ drop(x) and dB_a = scaling · Σ w dYᵀ S over the places of each adapter, in their order.

The places of an adapter are cut every PLACES_PER_PLANE, whatever the GPU and the other adapters; a program sums one cut
for BLOCK_K columns into a plane of float32, and a second launch adds an adapter's planes in order. So the bits of its
gradients depend on its own rows only. No atomics, and nothing needs the host to know who has how many rows.

All gradients of a projection lie one after the other in one buffer, without gaps. Floor: x once; M=8192, K=4096, bf16,
4.3 TB/s: 15.6 us, and 4 r / PLACES_PER_PLANE of x's bytes for planes, written and read: 6 % at r=16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._multi_rows import SortedPlaces, places_of, tile_at
from peft_kernels.kernels.triton._multi_table import Factors, rank_of, scaling_of, words_of
from peft_kernels.kernels.triton._philox import kept

PLACES_PER_PLANE = 1024
_BLOCK = 1024


def multi_sum_over_rows(
    low: Tensor,
    x: Tensor,
    factors: Factors,
    ranks: int,
    places: SortedPlaces,
    mix: Tensor | None = None,
    dropout: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The s_a Σ mix · lowᵀ drop(x) [r_a, K] of each adapter, or for `factors` of B its transpose [K, r_a], one after
    the other in one vector of the factors' dtype; 0 for adapters without rows.

    Args:
        low: [M, k, width], contiguous, with 0 beyond the rank.
        x: [M, K] in the dtype of `low`, any strides.
        ranks: the sum of the adapters' ranks.
        mix, dropout, seed: as for `multi_gemm`.
    """
    (_, k), width, device = x.shape, low.shape[2], x.device
    out = torch.empty((ranks * k,), dtype=factors.dtype, device=device)
    if out.numel() == 0:
        return out
    config = tuning.config(
        _launch.architecture(device), "multi_sum_over_rows", x.dtype, dropout=seed is not None, r=width
    )
    block_r = min(_launch.padded_rank(width), config.block_r)
    cuts, firsts = places.tiles(PLACES_PER_PLANE), places.first_tiles(PLACES_PER_PLANE)
    planes = torch.empty((cuts.shape[0], width * k), dtype=torch.float32, device=device)
    if planes.numel():
        _launch.launch(
            _multi_sum_over_rows,
            (cuts.shape[0] * _launch.blocks(k, config.block_k) * _launch.blocks(width, block_r),), device,
            low, x, planes, *factors.arguments, mix, places.order, cuts, dropout, seed, places.count, k, width,
            places.per_row, *x.stride(), -(-k // LANES), PRECISION=_launch.dot_precision(x.dtype),
            TRANSPOSED=factors.lora_b, **{**config.options(), "BLOCK_R": block_r},
        )  # fmt: skip
    each = factors.rows.view(torch.int32)[:, factors.layer, 4]
    starts = each.cumsum(0) - each
    _launch.launch(
        _add_planes, (places.count, _launch.blocks(width * k, _BLOCK)), device,
        planes, out, *factors.arguments, firsts, starts, dropout, k, width, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["layers", "layer", "count"])
def _multi_sum_over_rows(
    low, x, planes, table, layers, layer, mix, order, cuts, dropout, seed, count, K, W, per_row,
    stride_xm, stride_xk, groups,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """planes[cut] (r K numbers of W K) = Σ mix · lowᵀ x over one cut of an adapter's places."""
    pid = tl.program_id(0)
    blocks_r, blocks_k = tl.cdiv(W, BLOCK_R), tl.cdiv(K, BLOCK_K)
    cut = pid // blocks_r // blocks_k
    adapter, first, last = tile_at(cuts, cut)
    if (adapter < 0) | (adapter >= count):
        return
    rank = rank_of(words_of(table, layers, layer, adapter))
    ranks = pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    column = pid // blocks_r % blocks_k * BLOCK_K
    columns = column.to(tl.int64) + tl.arange(0, BLOCK_K)
    columns_in, ranks_in = columns < K, ranks < rank
    if seed is not None:
        key, threshold = tl.load(seed), tl.load(dropout + 2 * adapter).to(tl.int32)

    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for at in range(first, last, BLOCK_M):
        places, rows_in = places_of(order, at, last, BLOCK_M)
        rows = places // per_row
        x_pointers = x + rows[:, None] * stride_xm + columns[None, :] * stride_xk
        x_tile = tl.load(x_pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
        low_pointers = low + places[None, :] * W + ranks[:, None]
        low_tile = tl.load(low_pointers, mask=(ranks < W)[:, None] & rows_in[None, :], other=0.0)
        if mix is not None:
            weights = tl.load(mix + places, mask=rows_in, other=0.0)
            low_tile = (low_tile.to(tl.float32) * weights[None, :]).to(x_tile.dtype)
        if seed is not None:
            keep = kept(key, rows, column, groups, threshold, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, tl.zeros_like(x_tile))
        total = tl.dot(low_tile, x_tile, total, input_precision=PRECISION)

    plane = planes + cut.to(tl.int64) * W * K
    if TRANSPOSED:
        pointers = plane + ranks[:, None] + columns[None, :] * rank
    else:
        pointers = plane + ranks[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(pointers, total, mask=ranks_in[:, None] & columns_in[None, :])


@triton.jit(do_not_specialize=["layers", "layer"])
def _add_planes(
    planes, out, table, layers, layer, firsts, starts, dropout, K, W, BLOCK: tl.constexpr
):  # fmt: skip
    """The r K numbers of an adapter in `out`: its planes added in order, times scaling and the scale of dropout."""
    adapter = tl.program_id(0)
    words = words_of(table, layers, layer, adapter)
    size = rank_of(words).to(tl.int64) * K
    begin = tl.program_id(1).to(tl.int64) * BLOCK
    if begin >= size:
        return
    at = begin + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for plane in range(tl.load(firsts + adapter), tl.load(firsts + adapter + 1)):
        total += tl.load(planes + tl.cast(plane, tl.int64) * W * K + at, mask=at < size, other=0.0)
    factor = scaling_of(words)
    if dropout is not None:
        factor *= tl.load(dropout + 2 * adapter + 1)
    place = out + tl.load(starts + adapter).to(tl.int64) * K + at
    tl.store(place, (total * factor).to(out.dtype.element_ty), mask=at < size)
