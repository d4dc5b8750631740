"""What the forms of the extended GEMM share: the order of tiles, the low-rank step that comes first, the epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.kernels.triton._philox import kept


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(first row, first column) of a program's tile, int64. Walks GROUP_M row blocks down before it moves to the next
    column block, so that tiles that run together share rows of x and columns of w in L2."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles_in_group = GROUP_M * blocks_n
    first_m = pid // tiles_in_group * GROUP_M
    height = tl.minimum(blocks_m - first_m, GROUP_M)
    block_m = first_m + pid % tiles_in_group % height
    block_n = pid % tiles_in_group // height
    return block_m.to(tl.int64) * BLOCK_M, block_n.to(tl.int64) * BLOCK_N


@triton.jit
def low_rank(
    s, b, seed, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """factor · s b where it is kept (everywhere when seed is None): a tile [BLOCK_M, BLOCK_N] of float32."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    rows_in, columns_in = rows < M, columns < N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for rank in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = rank + tl.arange(0, BLOCK_R).to(tl.int64)
        ranks_in = ranks < R
        s_pointers = s + rows[:, None] * stride_sm + ranks[None, :] * stride_sr
        b_pointers = b + ranks[:, None] * stride_br + columns[None, :] * stride_bn
        s_tile = tl.load(s_pointers, mask=rows_in[:, None] & ranks_in[None, :], other=0.0)
        b_tile = tl.load(b_pointers, mask=ranks_in[:, None] & columns_in[None, :], other=0.0)
        total = tl.dot(s_tile, b_tile, total, input_precision=PRECISION)
    if seed is not None:
        keep = kept(tl.load(seed), rows, column, groups, threshold, BLOCK_M, BLOCK_N)
        total = tl.where(keep, total * factor, 0.0)
    else:
        total *= factor
    return total


@triton.jit
def finish(total, bias, out, row, column, M, N, stride_bias, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out = total + bias, rounded once; out [M, N] contiguous."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    columns_in = columns < N
    if bias is not None:
        values = tl.load(bias + columns * stride_bias, mask=columns_in, other=0.0)
        total += values.to(tl.float32)[None, :]
    pointers = out + rows[:, None] * N + columns[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(rows < M)[:, None] & columns_in[None, :])
