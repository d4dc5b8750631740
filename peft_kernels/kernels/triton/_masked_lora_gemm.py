"""GEMMs over a masked weight with a low-rank update: x (W ⊙ M)ᵀ + bias + scaling · drop(s b) with the update beside the
mask, x ((W + scaling · B A) ⊙ M)ᵀ + bias with it inside; and both with the sum over W's rows, for dx.

The main loop is that of `_masked_gemm`. Beside, the low-rank step comes first, as in `_extended_gemm`. Inside, a tile
of W takes a small product of B's rows and A's columns along in registers before it is masked: nothing of W's size is
written. That product is r / BLOCK_M of the tile's own.

Floor, M=8192, K=N=4096, r=16, bf16: 349 us beside; inside 275 GFLOP and 34 for the tiles of the update: 392 us at 790
TFLOP/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._extended_gemm_tma import descriptors
from peft_kernels.kernels.triton._gemm_tile import low_rank, tile_of
from peft_kernels.kernels.triton._masked_gemm import form_of, w_first
from peft_kernels.kernels.triton._masked_product import add_masked_product, steps_of, store_split
from peft_kernels.kernels.triton._masked_tile import in_pairs

_WIDEST_STEP = 64  # ranks


def masked_lora_gemm(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    s: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    by_rows: bool,
) -> Tensor:
    """As `masked_gemm`, + scaling · drop(s b) for s [M, r] and b [r, columns] of x's dtype and any strides.

    Dropout, when there is a seed, has the mask of a matrix [M, columns].
    """
    m, (n, k), r = x.shape[0], weight.shape, b.shape[0]
    columns, length = (k, n) if by_rows else (n, k)
    form, config = form_of(x, weight, columns, by_rows, dropout=seed is not None, r=r)
    tiles = _launch.blocks(m, config.block_m) * _launch.blocks(columns, config.block_n)
    splits, per_split = _launch.split(length, config.block_k, tiles, config.programs)
    out = torch.empty((splits, m, columns), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if out.numel() == 0:
        return out[0]
    w = weight if by_rows else weight.t()
    tma = form.endswith("_tma") and length > 0
    operands = descriptors(x, w, config) if tma else (x, w)
    strides = ((0, 0), (0, 0)) if tma else (x.stride(), w.stride())
    _launch.launch(
        _masked_lora_gemm, (tiles, splits), x.device,
        *operands, words, s, b, bias, out, seed, m, columns, length, r, words.shape[1], per_split // config.block_k,
        *strides, words.stride(0), *s.stride(), *b.stride(), 0 if bias is None else bias.stride(0),
        -(-columns // LANES), threshold(dropout_p), scaling * scale(dropout_p),
        BLOCK_R=min(_launch.padded_rank(r), _WIDEST_STEP), TMA=tma, BY_ROWS=by_rows, W_FIRST=w_first(config),
        IN_PAIRS=in_pairs(x.dtype), PRECISION=_launch.dot_precision(x.dtype), **config.options(),
    )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)


@triton.jit(do_not_specialize=["M", "threshold"])
def _masked_lora_gemm(
    x, w, words, s, b, bias, out, seed, M, N, K, R, words_in_row, steps, x_strides, w_strides, stride_words,
    stride_sm, stride_sr, stride_br, stride_bn, stride_bias, groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, BY_ROWS: tl.constexpr, W_FIRST: tl.constexpr, IN_PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [split, M, N] (contiguous) from x [M, K] and w [K, N] in `steps` steps a split; the first has the update."""
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    total = low_rank(
        s, b, seed, row, column, M, N, tl.where(split == 0, R, 0), stride_sm, stride_sr, stride_br, stride_bn,
        groups, threshold, factor, BLOCK_M, BLOCK_N, BLOCK_R, False, PRECISION,
    )  # fmt: skip
    if W_FIRST:
        total = tl.trans(total)
    rows = row + tl.arange(0, BLOCK_M)
    first, last = steps_of(split, steps, K, BLOCK_K)
    total = add_masked_product(
        total, x, w, words, None, None, None, None, row, column, rows, rows < M, N, K, 0, first, last, words_in_row,
        x_strides, w_strides, stride_words, None, None,
        BLOCK_M, BLOCK_N, BLOCK_K, 16, TMA, BY_ROWS, W_FIRST, IN_PAIRS, PRECISION,
    )  # fmt: skip
    store_split(total, bias, out, split, rows, rows < M, column, M, N, stride_bias, BLOCK_N, W_FIRST)


def masked_update_gemm(
    x: Tensor,
    weight: Tensor,
    words: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    by_rows: bool,
) -> Tensor:
    """x ((W + scaling · b a) ⊙ M) (`by_rows`), or x ((W + scaling · b a) ⊙ M)ᵀ + bias; [M, columns] in x's dtype.

    Args:
        x, weight, words, bias: as for `masked_gemm`. W and its update are summed in float32 and rounded once.
        a, b: [r, K] and [N, r] in x's dtype, any strides.
    """
    m, (n, k), r = x.shape[0], weight.shape, a.shape[0]
    columns, length = (k, n) if by_rows else (n, k)
    form = "masked_update_grad_x" if by_rows else "masked_update_gemm"
    config = tuning.config(_launch.architecture(x.device), form, x.dtype, m=_launch.bucket(m), n=columns, r=r)
    tiles = _launch.blocks(m, config.block_m) * _launch.blocks(columns, config.block_n)
    splits, per_split = _launch.split(length, config.block_k, tiles, config.programs)
    out = torch.empty((splits, m, columns), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if out.numel() == 0:
        return out[0]
    w = weight if by_rows else weight.t()
    _launch.launch(
        _masked_update_gemm, (tiles, splits), x.device,
        x, w, words, a, b, bias, out, m, columns, length, r, words.shape[1], per_split // config.block_k,
        x.stride(), w.stride(), words.stride(0), a.stride(), b.stride(), 0 if bias is None else bias.stride(0), scaling,
        BLOCK_R=_launch.padded_rank(r), BY_ROWS=by_rows, IN_PAIRS=in_pairs(x.dtype),
        PRECISION=_launch.dot_precision(x.dtype), **config.options(),
    )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)


@triton.jit(do_not_specialize=["M"])
def _masked_update_gemm(
    x, w, words, a, b, bias, out, M, N, K, R, words_in_row, steps,
    x_strides, w_strides, stride_words, a_strides, b_strides, stride_bias, scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    BY_ROWS: tl.constexpr, IN_PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [split, M, N] (contiguous) from x [M, K] and w [K, N] in `steps` steps a split. R <= BLOCK_R."""
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_M)
    first, last = steps_of(split, steps, K, BLOCK_K)
    # W first: as the second operand sm_80 takes 2.4 times the instructions for dx.
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    total = add_masked_product(
        total, x, w, words, None, a, b, scaling, row, column, rows, rows < M, N, K, R, first, last, words_in_row,
        x_strides, w_strides, stride_words, a_strides, b_strides,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, False, BY_ROWS, True, IN_PAIRS, PRECISION,
    )  # fmt: skip
    store_split(total, bias, out, split, rows, rows < M, column, M, N, stride_bias, BLOCK_N, True)
