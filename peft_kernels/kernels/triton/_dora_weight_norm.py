"""The kernel of `dora_weight_norm`; its host side is in the file without the underscore."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dora_weight_norm(
    weight, a, a_rest, b, b_gram, squares, out, N, K, R, scaling,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_squares,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [N] = sqrt(squares + Σ_r (2 s W Aᵀ + s² b_gram) ⊙ B) with b_gram = B A Aᵀ [N, R] in float32, contiguous.

    a_rest [R, K], of the strides of `a`, holds what rounding took from A, or is None. squares None: summed here.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_in = rows < N
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if squares is not None:
        total = tl.load(squares + rows * stride_squares, mask=rows_in, other=0.0).to(tl.float32)
    for rank in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = rank + tl.arange(0, BLOCK_R).to(tl.int64)
        ranks_in = ranks < R
        products = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        of_rows = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            inner = k + tl.arange(0, BLOCK_K).to(tl.int64)
            inner_in = inner < K
            w_pointers = weight + rows[:, None] * stride_wn + inner[None, :] * stride_wk
            w_tile = tl.load(w_pointers, mask=rows_in[:, None] & inner_in[None, :], other=0.0)
            place = inner[:, None] * stride_ak + ranks[None, :] * stride_ar
            inside = inner_in[:, None] & ranks_in[None, :]
            products = tl.dot(w_tile, tl.load(a + place, mask=inside, other=0.0), products, input_precision=PRECISION)
            if a_rest is not None:
                products = tl.dot(w_tile, tl.load(a_rest + place, mask=inside, other=0.0), products)
            if squares is None:
                wide = w_tile.to(tl.float32)
                of_rows += wide * wide
        if squares is None:
            total += tl.where(rank == 0, tl.sum(of_rows, 1), 0.0)

        inside = rows_in[:, None] & ranks_in[None, :]
        b_pointers = b + rows[:, None] * stride_bn + ranks[None, :] * stride_br
        b_tile = tl.load(b_pointers, mask=inside, other=0.0).to(tl.float32)
        b_gram_tile = tl.load(b_gram + rows[:, None] * R + ranks[None, :], mask=inside, other=0.0)
        total += tl.sum((products * 2.0 + b_gram_tile * scaling) * scaling * b_tile, 1)
    tl.store(out + rows, tl.sqrt_rn(tl.maximum(total, 0.0)), mask=rows_in)
