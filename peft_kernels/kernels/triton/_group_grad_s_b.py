"""dS_j = f dY_j B_j and dB_j = f dY_jᵀ S_j of all projections in one launch, each dY_j [M, N_j] read once.

As `_grad_s_b`, with the projection as a third dimension of the grid, the widest first. f, one factor for each rank,
multiplies the float32 sums, so that dS comes out scaled without a rounding of its own. Rows that the token mask leaves
out are not loaded: their S and their dS are 0.

Floor: all dY once; M=8192, N=4096+1024+1024, bf16, 4.3 TB/s: 23.4 us. Partials as in `_grad_s_b`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch


def group_grad_s_b(
    grad_ys: Sequence[Tensor],
    s: Tensor,
    bs: Sequence[Tensor],
    columns: Sequence[slice],
    starts: Sequence[int],
    scalings: Sequence[float],
    token_mask: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]] | None:
    """(dS [M, R] in dY's dtype, dB_j [N_j, r_j] in `dtype`), scaled; None where two passes over dY are the better way.

    Args:
        grad_ys: [M, N_j] of the projections that have adapters and a gradient; one dtype, any strides.
        s: [M, R], already token-masked.
        bs: [N_j, r_j].
        columns: which of the R columns belong to each of these projections. The others of dS are 0.
        starts: first column of each adapter, ascending.
        scalings: of each adapter.
        token_mask: [M] bool, or None.
        dtype: of dB.
    """
    (m, r), device, kind = s.shape, s.device, grad_ys[0].dtype
    sizes, ranks = tuple(grad.shape[1] for grad in grad_ys), tuple(b.shape[1] for b in bs)
    config = tuning.config(_launch.architecture(device), "group_grad_s_b", kind, m=_launch.bucket(m), r=max(ranks))
    if config is None or m == 0:
        return None
    blocks_m = _launch.blocks(m, config.block_m)
    firsts_of_b = [sum(n * width for n, width in zip(sizes[:j], ranks[:j], strict=True)) for j in range(len(sizes))]
    total = sum(n * width for n, width in zip(sizes, ranks, strict=True))
    if 4 * blocks_m * total > config.scratch_mib << 20:
        return None
    order = sorted(range(len(sizes)), key=lambda j: -sizes[j])
    splits, _ = _launch.split(max(sizes), config.block_n, blocks_m * len(sizes), config.programs)
    steps = [_launch.blocks(_launch.blocks(n, config.block_n), splits) * config.block_n for n in sizes]
    allocate = torch.empty if sum(ranks) == r else torch.zeros
    grad_s = allocate((splits, m, r), dtype=kind if splits == 1 else torch.float32, device=device)
    grad_b = torch.empty((blocks_m, total), dtype=torch.float32, device=device)
    if token_mask is not None:
        token_mask = token_mask.to(torch.int32)  # as in `_group_passes`

    def sort(values: Sequence) -> tuple:
        return tuple(values[j] for j in order)

    _launch.launch(
        _group_grad_s_b, (blocks_m, splits, len(sizes)), device,
        sort(grad_ys), s, sort(bs), grad_s, grad_b, token_mask, sort(sizes), sort(steps), sort(firsts_of_b),
        sort([part.start for part in columns]), sort(ranks), tuple(starts), tuple(scalings), m, r, total,
        tuple(grad_ys[j].stride() for j in order), *s.stride(), tuple(bs[j].stride() for j in order),
        BLOCK_R=_launch.padded_rank(max(ranks)), PRECISION=_launch.dot_precision(kind), **config.options(),
    )  # fmt: skip
    reduce = torch.ops.peft_kernels.splitk_reduce
    grad_bs = reduce(grad_b, 1.0, dtype).split([n * width for n, width in zip(sizes, ranks, strict=True)])
    return (
        grad_s[0] if splits == 1 else reduce(grad_s, 1.0, kind),
        [grad.view(n, width) for grad, n, width in zip(grad_bs, sizes, ranks, strict=True)],
    )


@triton.jit(do_not_specialize=["M"])
def _group_grad_s_b(
    grad_ys, s, bs, grad_s, grad_b, token_mask, sizes, steps, firsts_of_b, firsts, ranks, starts, scalings, M, R, total,
    y_strides, stride_sm, stride_sr, b_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_s [split, M, R] and grad_b [row block, total], both contiguous."""
    block_m, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in = rows < M
    rows_wanted = rows_in
    if token_mask is not None:
        rows_wanted = rows_in & (tl.load(token_mask + rows, mask=rows_in, other=0) != 0)
    for j in tl.static_range(len(grad_ys)):
        if tl.program_id(2) == j:
            _of_one_projection(
                grad_ys[j], s, bs[j], grad_s, grad_b + block_m * total + firsts_of_b[j], rows, rows_in, rows_wanted,
                sizes[j], split, steps[j], firsts[j], ranks[j], starts, scalings, M, R,
                y_strides[j], stride_sm, stride_sr, b_strides[j], BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip


@triton.jit
def _of_one_projection(
    grad_y, s, b, grad_s, grad_b, rows, rows_in, rows_wanted, N, split, step, first, width, starts, scalings, M, R,
    y_strides, stride_sm, stride_sr, b_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The columns first : first + width of dS, and the dB of these rows at grad_b [N, width]."""
    ranks = tl.arange(0, BLOCK_R)
    ranks_in = ranks < width
    factor = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for i in tl.static_range(len(starts)):
        factor = tl.where(first + ranks >= starts[i], scalings[i], factor)
    begin = split * step
    end = tl.minimum(begin + step, N)
    columns = (begin + tl.arange(0, BLOCK_N)).to(tl.int64)

    s_pointers = s + rows[:, None] * stride_sm + (first + ranks)[None, :].to(tl.int64) * stride_sr
    s_tile = tl.load(s_pointers, mask=rows_in[:, None] & ranks_in[None, :], other=0.0)
    y_pointers = grad_y + rows[:, None] * y_strides[0] + columns[None, :] * y_strides[1]
    b_pointers = b + columns[:, None] * b_strides[0] + ranks[None, :].to(tl.int64) * b_strides[1]
    grad_b_pointers = grad_b + columns[:, None] * width + ranks[None, :]
    y_step, b_step = BLOCK_N * tl.cast(y_strides[1], tl.int64), BLOCK_N * tl.cast(b_strides[0], tl.int64)

    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for column in range(begin, end, BLOCK_N):
        columns_in = tl.arange(0, BLOCK_N) < end - column
        y_tile = tl.load(y_pointers, mask=rows_wanted[:, None] & columns_in[None, :], other=0.0)
        b_tile = tl.load(b_pointers, mask=columns_in[:, None] & ranks_in[None, :], other=0.0)
        total = tl.dot(y_tile, b_tile, total, input_precision=PRECISION)
        partial = tl.dot(tl.trans(s_tile), y_tile, input_precision=PRECISION) * factor[:, None]
        tl.store(grad_b_pointers, tl.trans(partial), mask=columns_in[:, None] & ranks_in[None, :])
        y_pointers += y_step
        b_pointers += b_step
        grad_b_pointers += BLOCK_N * width

    grad_s_pointers = grad_s + split.to(tl.int64) * M * R + rows[:, None] * R + (first + ranks)[None, :]
    values = (total * factor[None, :]).to(grad_s.dtype.element_ty)
    tl.store(grad_s_pointers, values, mask=rows_in[:, None] & ranks_in[None, :])
