"""out = x (W ⊙ M_i)ᵀ + bias and dX = dY (W ⊙ M_i), i the mask of each row: one grouped GEMM over all masks.

A tile holds rows of one mask, wherever they lie (`_multi_rows`): rows of x are gathered, rows of out scattered; rows
without a mask make tiles in which every weight is kept. The main loop is that of `_masked_gemm` over pointers: TMA
cannot gather rows on sm_90. GROUP_M tiles are walked before the next columns, so that masks share W through L2.

Floor, M=8192, K=N=4096, 8 masks, bf16: 275 GFLOP, 348 us at 790 TFLOP/s, and at most 8 tiles of 128 rows more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import tile_of
from peft_kernels.kernels.triton._masked_gemm import w_first
from peft_kernels.kernels.triton._masked_product import add_masked_product, steps_of, store_split
from peft_kernels.kernels.triton._masked_tile import in_pairs
from peft_kernels.kernels.triton._multi_rows import SortedPlaces, places_of, tile_at


def multi_mask_gemm(
    x: Tensor, weight: Tensor, words: Tensor, places: SortedPlaces, bias: Tensor | None = None, *, by_rows: bool
) -> Tensor:
    """x (W ⊙ M_i) + bias (`by_rows`: the sum is over W's rows), or x (W ⊙ M_i)ᵀ + bias; [M, columns] in x's dtype.

    Args:
        x: [M, sum], any strides.
        weight: [N, K], any strides and dtype: it is rounded to x's.
        words: int32 [masks, N, ceil(K / 32)], whose masks and rows may be strided.
        places: the rows by mask.
        bias: [columns] in x's dtype.
    """
    m, (n, k) = x.shape[0], weight.shape
    columns, length = (k, n) if by_rows else (n, k)
    form = "multi_mask_grad_x" if by_rows else "multi_mask_gemm"
    config = tuning.config(_launch.architecture(x.device), form, x.dtype, m=places.rows_each, n=columns)
    tiles = places.tiles(config.block_m)
    programs = tiles.shape[0] * _launch.blocks(columns, config.block_n)
    splits, per_split = _launch.split(length, config.block_k, programs, config.programs)
    out = torch.empty((splits, m, columns), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if out.numel() == 0:
        return out[0]
    w = weight if by_rows else weight.t()
    _launch.launch(
        _multi_mask_gemm, (programs, splits), x.device,
        x, w, words, bias, out, places.order, tiles, tiles.shape[0], places.count, m, columns, length,
        words.shape[2], per_split // config.block_k, x.stride(), w.stride(), words.stride(0), words.stride(1),
        0 if bias is None else bias.stride(0),
        BY_ROWS=by_rows, W_FIRST=w_first(config), IN_PAIRS=in_pairs(x.dtype),
        PRECISION=_launch.dot_precision(x.dtype), **config.options(),
    )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)


@triton.jit(do_not_specialize=["tiles_m", "count", "M"])
def _multi_mask_gemm(
    x, w, words, bias, out, order, tiles, tiles_m, count, M, N, K, words_in_row, steps,
    x_strides, w_strides, stride_mask, stride_words, stride_bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    BY_ROWS: tl.constexpr, W_FIRST: tl.constexpr, IN_PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [split, M, N] (contiguous) from x [M, K] and w [K, N] in `steps` steps a split, as `add_masked_product`."""
    number, column = tile_of(tl.program_id(0), tiles_m * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    mask, begin, end = tile_at(tiles, number // BLOCK_M)
    if mask < 0:
        return
    split = tl.program_id(1)
    rows, rows_in = places_of(order, begin, end, BLOCK_M)
    first, last = steps_of(split, steps, K, BLOCK_K)
    # Rows of no mask read those of mask 0, if there is one, and keep every weight.
    words_in_row = tl.where(count > 0, words_in_row, 0)
    known = mask < count
    words += tl.where(known, mask, 0).to(tl.int64) * stride_mask
    total = tl.zeros((BLOCK_N, BLOCK_M) if W_FIRST else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = add_masked_product(
        total, x, w, words, tl.where(known, 0, -1), None, None, None, column, column, rows, rows_in, N, K, 0,
        first, last, words_in_row, x_strides, w_strides, stride_words, None, None,
        BLOCK_M, BLOCK_N, BLOCK_K, 16, False, BY_ROWS, W_FIRST, IN_PAIRS, PRECISION,
    )  # fmt: skip
    store_split(total, bias, out, split, rows, rows_in, column, M, N, stride_bias, BLOCK_N, W_FIRST)
