"""dW of the kept blocks of a block-sparse W: for each, dY[:, its rows]ᵀ x[:, its columns].

One program for each kept block; where they are too few to fill the GPU, the rows of x are split and `splitk_reduce`
adds the partials in order. What is not kept is never computed. Padding of blocks at the edges gets 0.

Floor, M=8192, 4096 x 4096, blocks of 64, 10 % kept, bf16: 27.5 GFLOP at 790 TFLOP/s: 35 us, where three dense products
of a training step take 348 us each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.formats.sparse import BlockWeight
from peft_kernels.kernels.triton import _launch


def block_grad_values(grad_y: Tensor, x: Tensor, weight: BlockWeight) -> Tensor:
    """[blocks, B, B] in the dtype of the values, for dY [M, N] and x [M, K] of one dtype and any strides."""
    (m, n), k, (blocks, block, _) = grad_y.shape, x.shape[1], weight.values.shape
    chosen = tuning.config(_launch.architecture(x.device), "block_grad_values", x.dtype, block=block)
    splits, rows = _launch.split(m, chosen.block_m, blocks, chosen.programs)
    dtype = weight.dtype if splits == 1 else torch.float32
    out = torch.empty((splits, blocks, block, block), dtype=dtype, device=x.device)
    if out.numel():
        r, _ = weight.grid
        _launch.launch(
            _block_grad_values, (blocks, splits), x.device,
            grad_y, x, weight.indices, out, r + 1, weight.indices.numel() - blocks, m, n, k, rows,
            *grad_y.stride(), *x.stride(),
            BLOCK=block, BLOCK_M=chosen.block_m, PRECISION=_launch.dot_precision(x.dtype),
            num_warps=chosen.num_warps, num_stages=chosen.num_stages,
        )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, weight.dtype)


@triton.jit(do_not_specialize=["columns", "block_rows", "M", "rows_of_split"])
def _block_grad_values(
    grad_y, x, indices, out, columns, block_rows, M, N, K, rows_of_split, stride_gm, stride_gn, stride_xm, stride_xk,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, block] = dYᵀ x over this split of the rows; `columns` and `block_rows` are places in `indices`."""
    place, split = tl.program_id(0), tl.program_id(1)
    within = tl.arange(0, BLOCK)
    outs = tl.load(indices + block_rows + place).to(tl.int64) * BLOCK + within
    ins = tl.load(indices + columns + place).to(tl.int64) * BLOCK + within
    first = split * rows_of_split
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    outs_in, ins_in = outs < N, ins < K
    grad_pointers = grad_y + outs[:, None] * stride_gn + rows[None, :] * stride_gm
    x_pointers = x + rows[:, None] * stride_xm + ins[None, :] * stride_xk

    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for row in range(first, tl.minimum(first + rows_of_split, M), BLOCK_M):
        rows_in = tl.arange(0, BLOCK_M) < M - row
        grad_tile = tl.load(grad_pointers, mask=outs_in[:, None] & rows_in[None, :], other=0.0)
        x_tile = tl.load(x_pointers, mask=rows_in[:, None] & ins_in[None, :], other=0.0)
        total = tl.dot(grad_tile, x_tile, total, input_precision=PRECISION)
        grad_pointers += BLOCK_M * tl.cast(stride_gm, tl.int64)
        x_pointers += BLOCK_M * tl.cast(stride_xm, tl.int64)

    out += (split.to(tl.int64) * tl.num_programs(0) + place) * (BLOCK * BLOCK)
    tl.store(out + within[:, None] * BLOCK + within[None, :], total.to(out.dtype.element_ty))
