"""y_j = x W_jᵀ + b_j + f_j S_j B_jᵀ for all projections in one launch: tiles of one beside those of the next.

One launch instead of one per projection has one incomplete last wave instead of several (q, k and v of a layer with
grouped queries: 1024, 256 and 256 tiles of 128x256 over 132 multiprocessors take 12 waves one after the other, 11.6
together), and tiles that run together share rows of x in L2 across projections.

Floor, M=8192, K=4096, N=4096+1024+1024, r=16 each, bf16: 412 + 0.8 GFLOP = 523 us at 790 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import finish, low_rank, tile_of
from peft_kernels.kernels.triton._product import Product, add_product


def group_gemm(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    s: Tensor,
    bs: Sequence[Tensor | None],
    firsts: Sequence[int],
    factors: Sequence[float],
) -> list[Tensor]:
    """x W_jᵀ + b_j + factor_j · S_j B_jᵀ [M, N_j] for each projection j, all in x's dtype, of any strides.

    Args:
        x: [M, K].
        weights: [N_j, K] each.
        biases: [N_j] or None each.
        s: [M, R], its last stride 1.
        bs: [N_j, r_j] or None each; S_j is the r_j columns of `s` from `firsts[j]` on.
        firsts: one column for each projection.
        factors: one for each projection.
    """
    m, k = x.shape
    sizes = tuple(weight.shape[0] for weight in weights)
    ys = [torch.empty((m, n), dtype=x.dtype, device=x.device) for n in sizes]
    ranks = tuple(0 if b is None else b.shape[1] for b in bs)
    if m == 0 or sum(sizes) == 0:
        return ys
    product = Product([x], [weight.t() for weight in weights], max(ranks), dropout=False)
    blocks_n = sum(_launch.blocks(n, product.config.block_n) for n in sizes)
    _launch.launch(
        _group_gemm, (_launch.blocks(m, product.config.block_m) * blocks_n,), x.device,
        product.xs[0], product.ws, s, tuple(bs), tuple(biases), tuple(ys), sizes, tuple(firsts), ranks, tuple(factors),
        m, k, product.x_strides[0], product.w_strides, s.stride(0),
        tuple((0, 0) if b is None else b.stride() for b in bs),
        tuple(0 if bias is None else bias.stride(0) for bias in biases),
        **product.options,
    )  # fmt: skip
    return ys


@triton.jit(do_not_specialize=["M"])
def _group_gemm(
    x, ws, s, bs, biases, outs, sizes, firsts, ranks, factors, M, K,
    x_strides, w_strides, stride_sm, b_strides, bias_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr, W_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """outs[j] [M, sizes[j]] (contiguous). Each projection has its own copy of the code: descriptors cannot be chosen at
    run time without losing the pipeline."""
    blocks_n = 0
    for j in tl.static_range(len(ws)):
        blocks_n += tl.cdiv(sizes[j], BLOCK_N)
    row, column = tile_of(tl.program_id(0), M, blocks_n * BLOCK_N, BLOCK_M, BLOCK_N, GROUP_M)
    for j in tl.static_range(len(ws)):
        width = tl.cdiv(sizes[j], BLOCK_N) * BLOCK_N
        if (column >= 0) & (column < width):
            if bs[j] is None:
                total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            else:
                total = low_rank(
                    s + firsts[j], bs[j], None, row, column, M, sizes[j], ranks[j],
                    stride_sm, 1, b_strides[j][1], b_strides[j][0], 0, 0, factors[j],
                    BLOCK_M, BLOCK_N, BLOCK_R, False, PRECISION,
                )  # fmt: skip
            total = add_product(
                total, x, ws[j], row, column, M, sizes[j], K, x_strides, w_strides[j],
                BLOCK_M, BLOCK_N, BLOCK_K, TMA, W_TRANSPOSED, PRECISION,
            )  # fmt: skip
            finish(total, biases[j], outs[j], row, column, M, sizes[j], bias_strides[j], BLOCK_M, BLOCK_N)
        column -= width
