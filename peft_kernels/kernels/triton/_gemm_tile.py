"""What the forms of the extended GEMM share: the order of tiles, the low-rank step, first or last, the epilogue."""

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
def _low_rank_step(
    total, s, b, rank, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + (factor · s) b over the ranks from `rank` on; a product with `factor` is rounded to the dtype of s."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    return low_rank_step(
        total, s, b, rank, rows, rows < M, R, columns, columns < N, R, stride_sm, stride_sr, stride_br, stride_bn,
        factor, BLOCK_R, PRECISION,
    )  # fmt: skip


@triton.jit
def low_rank_step(
    total, s, b, rank, rows, rows_in, R_OF_S, columns, columns_in, R, stride_sm, stride_sr, stride_br, stride_bn,
    factor, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + (factor · s[rows]) b over the ranks from `rank` on, of which s has R_OF_S and b, in any dtype, R."""
    ranks = rank + tl.arange(0, BLOCK_R).to(tl.int64)
    s_pointers = s + rows[:, None] * stride_sm + ranks[None, :] * stride_sr
    b_pointers = b + ranks[:, None] * stride_br + columns[None, :] * stride_bn
    s_tile = tl.load(s_pointers, mask=rows_in[:, None] & (ranks < R_OF_S)[None, :], other=0.0)
    b_tile = tl.load(b_pointers, mask=(ranks < R)[:, None] & columns_in[None, :], other=0.0)
    if factor is not None:
        s_tile = (s_tile.to(tl.float32) * factor).to(s.dtype.element_ty)
    return tl.dot(s_tile, b_tile.to(s_tile.dtype), total, input_precision=PRECISION)


@triton.jit
def add_low_rank(
    total, s, b, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ONE_STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + (factor · s) b, a tile [BLOCK_M, BLOCK_N]; ONE_STEP when R <= BLOCK_R: a loop, even of one step, would
    keep Triton from fusing the loops around it. No multiplication when factor is None."""
    if ONE_STEP:
        total = _low_rank_step(
            total, s, b, 0, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, factor,
            BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
    else:
        for rank in tl.range(0, R, BLOCK_R, num_stages=1):
            total = _low_rank_step(
                total, s, b, rank, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, factor,
                BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
    return total


@triton.jit
def low_rank(
    s, b, seed, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ONE_STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """factor · s b where it is kept (everywhere when seed is None): a tile [BLOCK_M, BLOCK_N] of float32."""
    total = add_low_rank(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), s, b, row, column, M, N, R,
        stride_sm, stride_sr, stride_br, stride_bn, None, BLOCK_M, BLOCK_N, BLOCK_R, ONE_STEP, PRECISION,
    )  # fmt: skip
    if seed is not None:
        keep = kept(tl.load(seed), row + tl.arange(0, BLOCK_M), column, groups, threshold, BLOCK_M, BLOCK_N)
        total = tl.where(keep, total * factor, 0.0)
    else:
        total *= factor
    return total


@triton.jit
def add_bias(total, bias, column, N, stride_bias, BLOCK_N: tl.constexpr):
    """total + bias, when there is one."""
    if bias is not None:
        columns = column + tl.arange(0, BLOCK_N)
        values = tl.load(bias + columns * stride_bias, mask=columns < N, other=0.0)
        total += values.to(tl.float32)[None, :]
    return total


@triton.jit
def finish(total, bias, out, row, column, M, N, stride_bias, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out = total + bias, rounded once; out [M, N] contiguous."""
    total = add_bias(total, bias, column, N, stride_bias, BLOCK_N)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    store_rows(total, out, rows, rows < M, columns, columns < N, N)


@triton.jit
def store_rows(total, out, rows, rows_in, columns, columns_in, N):
    """out[rows, columns] = total, rounded once; out [., N] contiguous."""
    pointers = out + rows[:, None] * N + columns[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=rows_in[:, None] & columns_in[None, :])


@triton.jit
def store(out, total, row, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Through the descriptor `out`, in 1, 2 or 4 parts side by side: a part takes a part of the shared memory."""
    if PARTS == 1:
        out.store([row, column], total.to(out.dtype))
    else:
        left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        store(out, left, row, column, BLOCK_M, BLOCK_N // 2, PARTS // 2)
        store(out, right, row, column + BLOCK_N // 2, BLOCK_M, BLOCK_N // 2, PARTS // 2)


@triton.jit
def pick(values, i):
    """values[i] of a tuple, for an i that is known at run time."""
    value = values[0]
    for j in tl.static_range(1, len(values)):
        value = tl.where(i == j, values[j], value)
    return value
