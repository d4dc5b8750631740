"""y[m] = x[m] (W ⊙ M_i)ᵀ + bias for a few rows that mostly have masks of their own (decoding): W is read once.

A program keeps a tile of W in registers and takes one row after another: the words of its mask, 1/16 of W's bytes, are
applied, the masked tile is multiplied with all 16 rows of x, as few as tensor cores take, and one column of the result
is kept. The parts of K are added in a fixed order (`splitk_reduce`).

Floor, N=K=4096, bf16, H200: 7.8 us for W and 0.5 us for each mask at 4.3 TB/s; 3.3 instructions a weight and row take
1.9 us of the issue slots. Grouped tiles would read W from L2 once for each mask: 6.1 us at 5.5 TB/s. In 16 bits only:
without tensor cores 15 of 16 products would be for nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._masked_tile import in_pairs, masked

_ROWS = 16  # of x, the fewest that tensor cores take


def multi_mask_decode(x: Tensor, weight: Tensor, words: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] for x [M, K] of 16 bits and weight [N, K] of any strides, words int32 [masks, N, ceil(K / 32)] and ids
    int64 [M]; ids outside [0, masks) keep the whole W."""
    (m, k), n = x.shape, weight.shape[0]
    config = tuning.config(_launch.architecture(x.device), "multi_mask_decode", x.dtype)
    splits = max(1, _launch.blocks(k, config.block_k))
    out = torch.empty((splits, m, n), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if out.numel() == 0:
        return out[0]
    _launch.launch(
        _multi_mask_decode, (_launch.blocks(n, config.block_n), splits, _launch.blocks(m, _ROWS)), x.device,
        x, weight, words, ids, bias, out, m, n, k, words.shape[0], words.shape[2],
        x.stride(), weight.stride(), words.stride(0), words.stride(1), ids.stride(0),
        0 if bias is None else bias.stride(0),
        BLOCK_M=_ROWS, IN_PAIRS=in_pairs(x.dtype),
        PRECISION=_launch.dot_precision(x.dtype), **config.options(),
    )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)


@triton.jit(do_not_specialize=["M", "count"])
def _multi_mask_decode(
    x, w, words, ids, bias, out, M, N, K, count, words_in_row,
    x_strides, w_strides, stride_mask, stride_words, stride_ids, stride_bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IN_PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [split, M, N], contiguous."""
    split = tl.program_id(1)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = split.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    word = split.to(tl.int64) * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    first = tl.program_id(2) * BLOCK_M
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    rows_in, columns_in, inner_in = rows < M, columns < N, inner < K
    w_pointers = w + columns[:, None] * w_strides[0] + inner[None, :] * w_strides[1]
    w_tile = tl.load(w_pointers, mask=columns_in[:, None] & inner_in[None, :], other=0.0)
    x_pointers = x + rows[:, None] * x_strides[0] + inner[None, :] * x_strides[1]
    x_tile = tl.load(x_pointers, mask=rows_in[:, None] & inner_in[None, :], other=0.0)
    w_tile = w_tile.to(x_tile.dtype)
    word_pointers = words + columns[:, None] * stride_words + word[None, :]
    words_in = columns_in[:, None] & (word < words_in_row)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for row in range(first, tl.minimum(first + BLOCK_M, M)):
        mask = tl.load(ids + tl.cast(row, tl.int64) * stride_ids)
        known = (mask >= 0) & (mask < count)
        bits = tl.load(word_pointers + tl.where(known, mask, 0) * stride_mask, mask=words_in & known, other=0)
        bits |= tl.where(known, 0, -1)
        own = masked(w_tile, bits, x_tile.dtype, BLOCK_N, BLOCK_K, IN_PAIRS)
        products = tl.dot(own, tl.trans(x_tile), input_precision=PRECISION)
        total = tl.where((rows == row)[None, :], products, total)
    if bias is not None:
        values = tl.load(bias + columns * stride_bias, mask=columns_in & (split == 0), other=0.0)
        total += values.to(tl.float32)[:, None]
    pointers = out + (split.to(tl.int64) * M + rows)[None, :] * N + columns[:, None]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=columns_in[:, None] & rows_in[None, :])
