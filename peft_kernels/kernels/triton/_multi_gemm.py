"""out = x w + bias + factor · drop(s b_a), each row with the factors of its adapter: the expand as one more K step.

Forward: y = x Wᵀ + bias + s_a w · S B_aᵀ. Backward: dX = dY W + s_a · drop(dS A_a). For one choice per row and a dense
W. A tile holds rows of one adapter, wherever they lie (`_multi_rows`): rows of x and s are gathered, rows of out
scattered, and rows without an adapter make tiles without the step. GROUP_M row tiles are walked before the next
columns. The step comes first, for the reasons in `_extended_gemm`. Rows are gathered by pointers: TMA cannot on sm_90.

Floor, M=8192, K=N=4096, r=16, 8 adapters, bf16: 275 + 1.1 GFLOP, 349 us at 790 TFLOP/s, and at most 8 tiles more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import add_bias, low_rank_step, store_rows, tile_of
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
from peft_kernels.kernels.triton._product import add_product_of_rows
from peft_kernels.tuning.configs import ExtendedGemm


def config_of(x: Tensor, n: int, width: int, rows_each: int, dropout: bool) -> ExtendedGemm | None:
    """None where the base product alone and then `multi_update` is the better way."""
    arch, sizes = _launch.architecture(x.device), {"m": rows_each, "n": n, "r": width}
    return tuning.config(arch, "multi_gemm", x.dtype, dropout=dropout, **sizes)


def multi_gemm(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    factors: Factors,
    places: SortedPlaces,
    config: ExtendedGemm,
    mix: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    total: Tensor | None = None,
) -> Tensor:
    """x w + bias + s_a mix · drop(s b_a) [M, N] for x [M, K], w [K, N], bias [N] of one dtype and any strides.

    Args:
        s: [M, 1, width], contiguous.
        factors: b_a = B_aᵀ, or A_a.
        mix: float32 [M, 1], contiguous.
        dropout, seed: as for `multi_down_projection`; the mask is that of a matrix [M, N].
        total: [M, N], contiguous, to which the result is added, and which is returned.
    """
    (m, k), n, width = x.shape, w.shape[1], s.shape[2]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device) if total is None else total
    if out.numel() == 0:
        return out
    tiles = places.tiles(config.block_m)
    options = {**config.options(), "BLOCK_R": min(_launch.padded_rank(width), config.block_r)}
    _launch.launch(
        _multi_gemm, (tiles.shape[0] * _launch.blocks(n, config.block_n),), x.device,
        x, w, s, *factors.arguments, mix, bias, out, places.order, tiles, dropout, seed, tiles.shape[0], places.count,
        n, k, width, x.stride(), w.stride(), 0 if bias is None else bias.stride(0), -(-n // LANES),
        ADD=total is not None, PRECISION=_launch.dot_precision(x.dtype), **options, **factors.options,
    )  # fmt: skip
    return out


@triton.jit
def add_low_rank_of(
    total, s, words, rank, rows, rows_in, columns, columns_in, W,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    LORA_B: tl.constexpr, FACTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """total + s[rows] b_a, with rows of s [., W] contiguous, 0 beyond the rank, and b_a = B_aᵀ or A_a by the table."""
    factor, stride = factor_of(words, LORA_B, FACTORS, WIDE)
    ranks = ranks_of_rows(rank, LORA_B, WIDE)
    for at in tl.range(0, rank, BLOCK_R, num_stages=1):
        if LORA_B:
            total = low_rank_step(
                total, s, factor, at, rows, rows_in, W, columns, columns_in, ranks, W, 1, 1, stride, None,
                BLOCK_R, PRECISION,
            )  # fmt: skip
        else:
            total = low_rank_step(
                total, s, factor, at, rows, rows_in, W, columns, columns_in, ranks, W, 1, stride, 1, None,
                BLOCK_R, PRECISION,
            )  # fmt: skip
    return total


@triton.jit
def factored(
    total, words, adapter, mix, rows_in, dropout, seed, rows, column, groups,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total times scaling and mix (pointers [BLOCK_M] or None), and dropped out when there is a seed."""
    factor = scaling_of(words)
    if seed is not None:
        factor *= tl.load(dropout + 2 * adapter + 1)
    if mix is not None:
        total *= tl.load(mix, mask=rows_in, other=0.0)[:, None]
    total *= factor
    if seed is not None:
        threshold = tl.load(dropout + 2 * adapter).to(tl.int32)
        total = tl.where(kept(tl.load(seed), rows, column, groups, threshold, BLOCK_M, BLOCK_N), total, 0.0)
    return total


@triton.jit(do_not_specialize=["layers", "layer", "tiles_m", "count"])
def _multi_gemm(
    x, w, s, table, layers, layer, mix, bias, out, order, tiles, dropout, seed, tiles_m, count, N, K, W,
    x_strides, w_strides, stride_bias, groups,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
    LORA_B: tl.constexpr, FACTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [M, N] (contiguous), + what is there with ADD."""
    number, column = tile_of(tl.program_id(0), tiles_m * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    adapter, first, last = tile_at(tiles, number // BLOCK_M)
    if adapter < 0:
        return
    rows, rows_in = places_of(order, first, last, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    columns_in = columns < N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    weights = mix
    if mix is not None:
        weights = mix + rows
    known, chosen = tl.where(adapter < count, adapter, 0), rows_in & (adapter < count)
    words = words_of(table, layers, layer, known)
    total = add_low_rank_of(
        total, s, words, tl.where(adapter < count, rank_of(words), 0), rows, rows_in, columns, columns_in, W,
        BLOCK_R, PRECISION, LORA_B, FACTORS, WIDE,
    )  # fmt: skip
    total = factored(total, words, known, weights, chosen, dropout, seed, rows, column, groups, BLOCK_M, BLOCK_N)
    total = add_product_of_rows(
        total, x, w, rows, rows_in, columns, columns_in, K, x_strides, w_strides, BLOCK_K, PRECISION
    )
    total = add_bias(total, bias, column, N, stride_bias, BLOCK_N)
    if ADD:
        pointers = out + rows[:, None] * N + columns[None, :]
        total += tl.load(pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0).to(tl.float32)
    store_rows(total, out, rows, rows_in, columns, columns_in, N)
