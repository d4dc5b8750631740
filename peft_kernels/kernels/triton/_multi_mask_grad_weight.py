"""dW = Σ_i (dY_iᵀ x_i) ⊙ M_i over the rows of each mask, and dYᵀ x over the rows of none.

A program has a tile of W and walks the masks in order: it sums over the rows of one, which it gathers, applies the mask
to the sum in registers and adds. No atomics, no partials of W's size, and masks without rows cost a comparison.

Floor, M=8192, K=N=4096, bf16: 348 us, as for one mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import store_rows, tile_of
from peft_kernels.kernels.triton._masked_tile import signs_of
from peft_kernels.kernels.triton._multi_rows import SortedPlaces, ends_of, places_of


def multi_mask_grad_weight(
    grad_y: Tensor, x: Tensor, words: Tensor, places: SortedPlaces, dtype: torch.dtype
) -> Tensor:
    """[N, K] in `dtype`, contiguous, for dY [M, N] and x [M, K] of one dtype and any strides, words int32 [masks, N,
    ceil(K / 32)]."""
    n, k = grad_y.shape[1], x.shape[1]
    out = torch.empty((n, k), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = tuning.config(_launch.architecture(x.device), "multi_mask_grad_weight", x.dtype)
    _launch.launch(
        _multi_mask_grad_weight, (_launch.blocks(n, config.block_n) * _launch.blocks(k, config.block_k),), x.device,
        grad_y, x, words, out, places.order, places.ends, places.count, n, k, words.shape[2],
        grad_y.stride(), x.stride(), words.stride(0), words.stride(1),
        PRECISION=_launch.dot_precision(x.dtype), **config.options(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count"])
def _multi_mask_grad_weight(
    grad_y, x, words, out, order, ends, count, N, K, words_in_row, y_strides, x_strides, stride_mask, stride_words,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [N, K], contiguous."""
    row, column = tile_of(tl.program_id(0), N, K, BLOCK_N, BLOCK_K, GROUP_M)
    outs, ins = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_K)
    outs_in, ins_in = outs < N, ins < K
    word = column // BLOCK_K * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    word_pointers = words + outs[:, None] * stride_words + word[None, :]
    words_in = outs_in[:, None] & (word < words_in_row)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for mask in range(0, count + 1):
        begin, end = ends_of(ends, mask, mask >= 0)
        if begin < end:
            part = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
            for at in range(begin, end, BLOCK_M):
                rows, rows_in = places_of(order, at, end, BLOCK_M)
                y_tile = tl.load(
                    grad_y + outs[:, None] * y_strides[1] + rows[None, :] * y_strides[0],
                    mask=outs_in[:, None] & rows_in[None, :], other=0.0,
                )  # fmt: skip
                x_tile = tl.load(
                    x + rows[:, None] * x_strides[0] + ins[None, :] * x_strides[1],
                    mask=rows_in[:, None] & ins_in[None, :], other=0.0,
                )  # fmt: skip
                part = tl.dot(y_tile, x_tile, part, input_precision=PRECISION)
            known = mask < count
            bits = tl.load(word_pointers + tl.cast(mask, tl.int64) * stride_mask, mask=words_in & known, other=0)
            bits |= tl.where(known, 0, -1)
            total += tl.where(signs_of(bits, BLOCK_N, BLOCK_K) < 0, part, 0.0)
    store_rows(total, out, outs, outs_in, ins, ins_in, K)
