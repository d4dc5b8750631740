"""dX = Σ_j dY_j W_j + Σ_i drop_i(dS_i A_i): the gradients of all projections in one accumulator.

dX is written once, where a product per projection would read and write it again for each (2 · 67 MB, 31 us, at M=8192,
K=4096, bf16, 4.3 TB/s). The low-rank part comes first, as in the extended GEMM: each adapter's mask applies to its own
part alone, before the products are added. With several masks a second tile of accumulators is alive meanwhile, so
`tuning` gives dropout a smaller tile.

Floor, M=8192, K=4096, N=4096+1024+1024, bf16: 412 GFLOP, 523 us at 790 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import finish, low_rank, pick, tile_of
from peft_kernels.kernels.triton._product import Product, add_product


def group_grad_x(
    grad_ys: Sequence[Tensor],
    weights: Sequence[Tensor],
    grad_s: Tensor | None,
    a: Tensor | None,
    ranks: Sequence[int],
    dropout_ps: Sequence[float],
    seeds: Tensor | None,
) -> Tensor:
    """Σ_j dY_j W_j + Σ_i drop_i(dS_i A_i) [M, K], all in one dtype, of any strides.

    Args:
        grad_ys: [M, N_j] each.
        weights: [N_j, K] each.
        grad_s: [M, R], scaled, its last stride 1; None for no low-rank part.
        a: [R, K], the As one after the other; None with `grad_s`.
        ranks: of the adapters, in the order of their columns of `grad_s` and rows of `a`.
        dropout_ps: for each adapter.
        seeds: int64, one for each adapter; None for no dropout.
    """
    (m, k), grad_y = (grad_ys[0].shape[0], weights[0].shape[1]), grad_ys[0]
    out = torch.empty((m, k), dtype=grad_y.dtype, device=grad_y.device)
    if out.numel() == 0:
        return out
    if seeds is None:
        ranks, dropout_ps = [sum(ranks)], [0.0]
    product = Product(grad_ys, weights, max(ranks, default=1), dropout=seeds is not None)
    grid = _launch.blocks(m, product.config.block_m) * _launch.blocks(k, product.config.block_n)
    _launch.launch(
        _group_grad_x, (grid,), grad_y.device,
        product.xs, product.ws, grad_s, a, out, seeds,
        tuple(weight.shape[0] for weight in weights), tuple(sum(ranks[:i]) for i in range(len(ranks))), tuple(ranks),
        m, k, product.x_strides, product.w_strides,
        0 if grad_s is None else grad_s.stride(0), (0, 0) if a is None else a.stride(),
        -(-k // LANES), tuple(threshold(p) for p in dropout_ps), tuple(scale(p) for p in dropout_ps),
        **product.options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["M"])
def _group_grad_x(
    grad_ys, ws, grad_s, a, out, seeds, sizes, firsts, ranks, M, K, y_strides, w_strides, stride_sm, a_strides,
    groups, thresholds, factors,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, TMA: tl.constexpr, W_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, K] (contiguous). Without seeds the adapters count as one."""
    row, column = tile_of(tl.program_id(0), M, K, BLOCK_M, BLOCK_N, GROUP_M)
    if grad_s is None:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    elif seeds is None:
        total = low_rank(
            grad_s, a, None, row, column, M, K, ranks[0], stride_sm, 1, a_strides[0], a_strides[1], 0, 0, 1.0,
            BLOCK_M, BLOCK_N, BLOCK_R, False, PRECISION,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # Not a static loop: the masks of several adapters at once would not fit in the registers.
        for i in tl.range(0, len(ranks), num_stages=1):
            first = pick(firsts, i)
            total += low_rank(
                grad_s + first, a + first * tl.cast(a_strides[0], tl.int64), seeds + i, row, column, M, K,
                pick(ranks, i), stride_sm, 1, a_strides[0], a_strides[1], groups, pick(thresholds, i),
                pick(factors, i), BLOCK_M, BLOCK_N, BLOCK_R, False, PRECISION,
            )  # fmt: skip
    for j in tl.static_range(len(ws)):
        total = add_product(
            total, grad_ys[j], ws[j], row, column, M, K, sizes[j], y_strides[j], w_strides[j],
            BLOCK_M, BLOCK_N, BLOCK_K, TMA, W_TRANSPOSED, PRECISION,
        )  # fmt: skip
    finish(total, None, out, row, column, M, K, 0, BLOCK_M, BLOCK_N)
