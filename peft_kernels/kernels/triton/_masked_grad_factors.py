"""dA = scaling · Bᵀ G and dB = scaling · G Aᵀ with G = (dYᵀ x) ⊙ M, for an update inside a mask: G is never written.

A program sums a tile of dYᵀ x, masks it in registers and multiplies it with its columns of A and its rows of B. Tiles
leave partials of both, which are added in a fixed order (`splitk_reduce`), in float32: r / 64 of W's elements together
with tiles of 128 by 128. G is multiplied as float32, in three products of tensor cores where x has 16 bits.

Floor, M=8192, K=N=4096, r=16, bf16: 348 us, as a dense dW; 34 MB of partials written and read, 8 us each way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import tile_of
from peft_kernels.kernels.triton._masked_grad_weight import tile_of_grad
from peft_kernels.kernels.triton._masked_tile import signs_of


def masked_grad_factors(
    grad_y: Tensor, x: Tensor, words: Tensor, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(dA [r, K], dB [N, r]) in the dtype of a and b for dY [M, N] and x [M, K] of one dtype, words int32
    [N, ceil(K / 32)], a [r, K] and b [N, r], all of any strides but the words' columns."""
    (m, n), k, r = grad_y.shape, x.shape[1], a.shape[0]
    config = tuning.config(_launch.architecture(x.device), "masked_grad_factors", x.dtype)
    tiles_n, tiles_k = _launch.blocks(n, config.block_n), _launch.blocks(k, config.block_k)
    parts_a = torch.empty((tiles_n, r, k), dtype=torch.float32, device=x.device)
    parts_b = torch.empty((tiles_k, n, r), dtype=torch.float32, device=x.device)
    if n and k:
        _launch.launch(
            _masked_grad_factors, (tiles_n * tiles_k,), x.device,
            grad_y, x, words, a, b, parts_a, parts_b, m, n, k, r, words.shape[1],
            grad_y.stride(), x.stride(), words.stride(0), a.stride(), b.stride(), BLOCK_R=_launch.padded_rank(r),
            PRECISION=_launch.dot_precision(x.dtype), EXACT="tf32x3" if x.dtype.itemsize == 2 else "ieee",
            **config.options(),
        )  # fmt: skip
    reduce = torch.ops.peft_kernels.splitk_reduce
    return reduce(parts_a, scaling, a.dtype), reduce(parts_b, scaling, b.dtype)


@triton.jit(do_not_specialize=["M"])
def _masked_grad_factors(
    grad_y, x, words, a, b, parts_a, parts_b, M, N, K, R, words_in_row,
    y_strides, x_strides, stride_words, a_strides, b_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """parts_a [tiles of N, R, K] and parts_b [tiles of K, N, R], contiguous. R <= BLOCK_R."""
    row, column = tile_of(tl.program_id(0), N, K, BLOCK_N, BLOCK_K, GROUP_M)
    total = tile_of_grad(grad_y, x, row, column, M, N, K, y_strides, x_strides, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    rows, columns, ranks = row + tl.arange(0, BLOCK_N), column + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    rows_in, columns_in, ranks_in = rows < N, columns < K, ranks < R
    word = column // BLOCK_K * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    valid = rows_in[:, None] & (word < words_in_row)[None, :]
    words_of_tile = tl.load(words + rows[:, None] * stride_words + word[None, :], mask=valid, other=0)
    total = tl.where(signs_of(words_of_tile, BLOCK_N, BLOCK_K) < 0, total, 0.0)

    a_pointers = a + ranks[None, :].to(tl.int64) * a_strides[0] + columns[:, None] * a_strides[1]
    a_tile = tl.load(a_pointers, mask=columns_in[:, None] & ranks_in[None, :], other=0.0).to(tl.float32)
    part = tl.dot(total, a_tile, input_precision=EXACT)
    place = parts_b + column // BLOCK_K * N * R + rows[:, None] * R + ranks[None, :]
    tl.store(place, part, mask=rows_in[:, None] & ranks_in[None, :])

    b_pointers = b + rows[:, None] * b_strides[0] + ranks[None, :].to(tl.int64) * b_strides[1]
    b_tile = tl.load(b_pointers, mask=rows_in[:, None] & ranks_in[None, :], other=0.0).to(tl.float32)
    part = tl.dot(tl.trans(total), b_tile, input_precision=EXACT)
    place = parts_a + row // BLOCK_N * R * K + ranks[None, :].to(tl.int64) * K + columns[:, None]
    tl.store(place, part, mask=columns_in[:, None] & ranks_in[None, :])
