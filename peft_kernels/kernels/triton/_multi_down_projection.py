"""S = drop(x) A_aᵀ, each choice of a row with the A of its adapter; without dropout also dS = dY B_a.

Tiles hold places of one adapter (`_multi_rows`) and gather their rows of x; S has one row per place.

Floor: x and the factors once; K=4096, r=16, bf16, 4.3 TB/s: M=8192, 8 adapters 67 + 1 MB, 15.8 us; 4096 tokens of 64
adapters 33.6 + 8.4 MB, 9.8 us.
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
from peft_kernels.kernels.triton._multi_table import (
    Factors,
    factor_of,
    rank_of,
    ranks_of_rows,
    scaling_of,
    words_of,
)
from peft_kernels.kernels.triton._philox import kept


def multi_down_projection(
    x: Tensor,
    factors: Factors,
    width: int,
    places: SortedPlaces,
    dropout: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    mix: Tensor | None = None,
    s: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """mix · drop(x) A_aᵀ, or mix · x B_a, [M, k, width] in x's dtype, summed in float32; 0 beyond the rank and without
    an adapter. With `s` also s_a <drop(x) A_aᵀ, s>, float32 [M, k]: of dY and S the gradient of mix.

    Args:
        x: [M, K], any strides.
        dropout: float32 [count, 2], for each adapter threshold and scale of the mask; needed with a seed int64 [1].
        mix: float32 [M, k], contiguous, or None for ones.
        s: [M, k, width], contiguous.
    """
    m, k = x.shape
    config = tuning.config(
        _launch.architecture(x.device), "multi_down_projection", x.dtype, dropout=seed is not None,
        m=places.rows_each, r=width,
    )  # fmt: skip
    tiles = places.tiles(config.block_m)
    block_r = min(_launch.padded_rank(width), config.block_r)
    programs = tiles.shape[0] * _launch.blocks(width, block_r)
    splits, k_per_split = _launch.split(k, config.block_k, programs, config.programs, config.splits)
    shape = (m, places.per_row, width)
    out = torch.empty((splits, *shape), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    dots = None
    if s is not None:
        dots = torch.empty((splits * _launch.blocks(width, block_r), *shape[:2]), dtype=torch.float32, device=x.device)
    if out.numel():
        _launch.launch(
            _multi_down_projection, (programs, splits), x.device,
            x, *factors.arguments, mix, s, out, dots, places.order, tiles, dropout, seed, len(places), places.count,
            k, width, places.per_row, k_per_split, *x.stride(), -(-k // LANES),
            PRECISION=_launch.dot_precision(x.dtype), **{**config.options(), "BLOCK_R": block_r}, **factors.options,
        )  # fmt: skip
    result = out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)
    return result, None if dots is None else dots.sum(0)


@triton.jit(do_not_specialize=["layers", "layer", "E", "count"])
def _multi_down_projection(
    x, table, layers, layer, mix, s, out, dots, order, tiles, dropout, seed, E, count, K, W, per_row, k_per_split,
    stride_xm, stride_xk, groups,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    LORA_B: tl.constexpr, FACTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out[split, E places, W] = the sum over this split's columns, and dots[split and rank block, E]; contiguous."""
    pid, split = tl.program_id(0), tl.program_id(1)
    blocks_r = tl.cdiv(W, BLOCK_R)  # the rank blocks of the same rows run together and share x in L2
    adapter, first, last = tile_at(tiles, pid // blocks_r)
    if adapter < 0:
        return
    places, rows_in = places_of(order, first, last, BLOCK_M)
    rows = places // per_row
    rank_block = pid % blocks_r * BLOCK_R
    ranks = rank_block + tl.arange(0, BLOCK_R)
    begin = split * k_per_split
    known = tl.where(adapter < count, adapter, 0)
    words = words_of(table, layers, layer, known)
    rank = tl.where(adapter < count, rank_of(words), 0)
    # Places without an adapter and ranks that there are not sum nothing.
    end = tl.where(rank_block < rank, tl.minimum(begin + k_per_split, K), begin)
    factor, stride = factor_of(words, LORA_B, FACTORS, WIDE)
    ranks_in = ranks < ranks_of_rows(rank, LORA_B, WIDE)
    columns = (begin + tl.arange(0, BLOCK_K)).to(tl.int64)
    x_pointers = x + rows[:, None] * stride_xm + columns[None, :] * stride_xk
    if LORA_B:
        factor_pointers = factor + columns[:, None] * stride + ranks[None, :]
        factor_step = BLOCK_K * stride
    else:
        factor_pointers = factor + columns[:, None] + ranks[None, :].to(tl.int64) * stride
        factor_step = BLOCK_K
    x_step = BLOCK_K * tl.cast(stride_xk, tl.int64)
    if seed is not None:
        key = tl.load(seed)
        threshold, scale = tl.load(dropout + 2 * known).to(tl.int32), tl.load(dropout + 2 * known + 1)

    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for column in range(begin, end, BLOCK_K):
        columns_in = tl.arange(0, BLOCK_K) < end - column
        x_tile = tl.load(x_pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
        tile = tl.load(factor_pointers, mask=columns_in[:, None] & ranks_in[None, :], other=0.0)
        if seed is not None:
            keep = kept(key, rows, column, groups, threshold, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, tl.zeros_like(x_tile))
        total = tl.dot(x_tile, tile.to(x_tile.dtype), total, input_precision=PRECISION)
        x_pointers += x_step
        factor_pointers += factor_step

    if seed is not None:
        total *= scale
    if s is not None:
        s_tile = tl.load(
            s + places[:, None] * W + ranks[None, :], mask=rows_in[:, None] & (ranks < W)[None, :], other=0.0
        )
        dot = tl.sum(total * s_tile.to(tl.float32), 1) * tl.where(adapter < count, scaling_of(words), 0.0)
        part = split.to(tl.int64) * blocks_r + pid % blocks_r
        tl.store(dots + part * E + places, dot, mask=rows_in)
    if mix is not None:
        total *= tl.load(mix + places, mask=rows_in & (adapter < count), other=0.0)[:, None]
    out_pointers = out + split.to(tl.int64) * E * W + places[:, None] * W + ranks[None, :]
    tl.store(out_pointers, total.to(out.dtype.element_ty), mask=rows_in[:, None] & (ranks < W)[None, :])
