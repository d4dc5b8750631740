"""dA_e = scaling · dS_eᵀ drop(x_e) and dB_e = scaling · dY_eᵀ S_e: sums over the rows of each expert, in their order.

A program owns BLOCK_K columns of one expert and walks its rows; where experts and columns are too few to fill the GPU,
the rows of each expert are split evenly and `splitk_reduce` adds the partials. The number of splits follows from sizes
alone, so that the host need not know the offsets. The same kernel makes dW (its "rank" is N) and dbias.

Floor: x once; M=8192, K=2048, bf16, 4.3 TB/s: 7.8 us, and the gradients of 64 experts at r=16, float32: 2 us.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._expert_rows import rows_of
from peft_kernels.kernels.triton._philox import kept


def expert_sum_over_rows(
    low: Tensor,
    x: Tensor,
    offsets: Tensor,
    scaling: float,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    transposed: bool = False,
    precision: str | None = None,
) -> Tensor:
    """scaling · low_eᵀ drop(x)_e over the rows of each expert e, for low [M, r] and x [M, K] of one dtype and any
    strides; [E, r, K] in `dtype`, or its transpose [E, K, r], contiguous either way; 0 for experts without rows.

    Args:
        offsets: int32 [E], contiguous.
        precision: of the products, as tl.dot names it; that of PyTorch's matmuls by default.
    """
    (m, k), r, e = x.shape, low.shape[1], offsets.shape[0]
    rows = _launch.bucket(_launch.blocks(m, max(1, e)))
    config = tuning.config(
        _launch.architecture(x.device), "expert_sum_over_rows", x.dtype, dropout=seed is not None, m=rows, r=r
    )
    block_r = min(_launch.padded_rank(r), config.block_r)
    tiles = e * _launch.blocks(k, config.block_k) * _launch.blocks(r, block_r)
    splits, _ = _launch.split(rows, config.block_m, tiles, config.programs)
    shape = (k, r) if transposed else (r, k)
    out = torch.empty((splits, e, *shape), dtype=dtype if splits == 1 else torch.float32, device=x.device)
    factor = scaling * scale(dropout_p)
    if out.numel():
        _launch.launch(
            _expert_sum_over_rows, (tiles, splits), x.device,
            low, x, out, offsets, seed, m, e, k, r, *low.stride(), *x.stride(), *((1, r) if transposed else (k, 1)),
            -(-k // LANES), threshold(dropout_p), factor if splits == 1 else 1.0,
            PRECISION=precision or _launch.dot_precision(x.dtype), **{**config.options(), "BLOCK_R": block_r},
        )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, factor, dtype)


@triton.jit(do_not_specialize=["M", "E", "threshold", "factor"])
def _expert_sum_over_rows(
    low, x, out, offsets, seed, M, E, K, R, stride_lm, stride_lr, stride_xm, stride_xk, stride_or, stride_ok,
    groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, expert] (R K numbers, strides given) = factor · lowᵀ x over this split of the expert's rows."""
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    blocks_r, blocks_k = tl.cdiv(R, BLOCK_R), tl.cdiv(K, BLOCK_K)
    expert = pid // blocks_r // blocks_k
    column = pid // blocks_r % blocks_k * BLOCK_K
    columns = column.to(tl.int64) + tl.arange(0, BLOCK_K)
    ranks = (pid % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    first, last = rows_of(expert, offsets, M, E)
    per_split = tl.cdiv(tl.cdiv(last - first, BLOCK_M), splits) * BLOCK_M
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, last)
    rows = begin + tl.arange(0, BLOCK_M)
    columns_in, ranks_in = columns < K, ranks < R

    # As in `_sum_over_rows`: a transposed x would leave the asynchronous copies of sm_80.
    low_pointers = low + ranks[:, None] * stride_lr + rows[None, :] * stride_lm
    x_pointers = x + rows[:, None] * stride_xm + columns[None, :] * stride_xk
    x_step, low_step = BLOCK_M * tl.cast(stride_xm, tl.int64), BLOCK_M * tl.cast(stride_lm, tl.int64)
    if seed is not None:
        key = tl.load(seed)

    total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for row in range(begin, end, BLOCK_M):
        rows_in = tl.arange(0, BLOCK_M) < end - row
        x_tile = tl.load(x_pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
        low_tile = tl.load(low_pointers, mask=ranks_in[:, None] & rows_in[None, :], other=0.0)
        if seed is not None:
            keep = kept(key, row + tl.arange(0, BLOCK_M), column, groups, threshold, BLOCK_M, BLOCK_K)
            x_tile = tl.where(keep, x_tile, tl.zeros_like(x_tile))
        total = tl.dot(low_tile, x_tile, total, input_precision=PRECISION)
        x_pointers += x_step
        low_pointers += low_step

    out += (split.to(tl.int64) * E + expert) * K * R
    out_pointers = out + ranks[:, None] * stride_or + columns[None, :] * stride_ok
    tl.store(out_pointers, (total * factor).to(out.dtype.element_ty), mask=ranks_in[:, None] & columns_in[None, :])
