"""The main loop that GEMMs over a masked weight share: x (W ⊙ M)ᵀ, or x (W ⊙ M) with the sum over W's rows.

A tile of W is loaded as it lies, the words of its mask beside it, and what is not kept becomes 0 in registers: the same
words serve both products. An update inside the mask, (W + scaling · B A) ⊙ M, is added in registers before the mask: a
product of the tile's height, width and the rank, summed in float32 and rounded once with W.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.kernels.triton._masked_tile import masked


@triton.jit
def steps_of(split, steps, K, BLOCK_K: tl.constexpr):
    """(first, last + 1) of the steps of a split. Counted in steps, so that the compiler sees how far all that follows
    from them is aligned."""
    first = split * steps
    return first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))


@triton.jit
def add_masked_product(
    total, x, w, words, everything, a, b, scaling, row, column, rows, rows_in, N, K, R, first, last, words_in_row,
    x_strides, w_strides, stride_words, a_strides, b_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    TMA: tl.constexpr, BY_ROWS: tl.constexpr, W_FIRST: tl.constexpr, IN_PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x w over the steps [first, last) of K for w [K, N] masked: a tile of these `rows` of x and of the columns
    from `column` on, [BLOCK_M, BLOCK_N], transposed with W_FIRST.

    Rows of the mask, `words_in_row` words, follow K, or N when BY_ROWS. With TMA x and w are descriptors, that of w as
    it lies, and the rows are those from `row` on. `everything`, None or bits that are kept besides. a and b: None, or
    A [R, K] and B [N, R] of an update of the rank R <= BLOCK_R (N and K of W as it lies) in x's dtype.
    """
    columns = column + tl.arange(0, BLOCK_N)
    columns_in = columns < N
    inner = first.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    # W and its mask as they lie: [K, N] when BY_ROWS, else [N, K].
    if BY_ROWS:
        word = column // BLOCK_N * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
        words_in = word < words_in_row
        word_pointers = words + inner[:, None] * stride_words + word[None, :]
        word_step = BLOCK_K * tl.cast(stride_words, tl.int64)
    else:
        word = first.to(tl.int64) * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
        word_pointers = words + columns[:, None] * stride_words + word[None, :]
        word_step = BLOCK_K // 32
    if not TMA:
        x_pointers = x + rows[:, None] * x_strides[0] + inner[None, :] * x_strides[1]
        x_step, w_step = BLOCK_K * tl.cast(x_strides[1], tl.int64), BLOCK_K * tl.cast(w_strides[0], tl.int64)
        if BY_ROWS:
            w_pointers = w + inner[:, None] * w_strides[0] + columns[None, :] * w_strides[1]
        else:
            w_pointers = w + columns[:, None] * w_strides[1] + inner[None, :] * w_strides[0]
    if a is not None:
        # Of the tile's rows and columns one stays where it is: its factor is loaded once.
        ranks = tl.arange(0, BLOCK_R).to(tl.int64)
        ranks_in = ranks < R
        if BY_ROWS:
            a_pointers = a + ranks[:, None] * a_strides[0] + columns[None, :] * a_strides[1]
            fixed = tl.load(a_pointers, mask=ranks_in[:, None] & columns_in[None, :], other=0.0)
            moving, moving_step = b + inner[:, None] * b_strides[0] + ranks[None, :] * b_strides[1], b_strides[0]
        else:
            b_pointers = b + columns[:, None] * b_strides[0] + ranks[None, :] * b_strides[1]
            fixed = tl.load(b_pointers, mask=columns_in[:, None] & ranks_in[None, :], other=0.0)
            moving, moving_step = a + ranks[:, None] * a_strides[0] + inner[None, :] * a_strides[1], a_strides[1]
        moving_step = BLOCK_K * tl.cast(moving_step, tl.int64)
    first_row, first_column = row.to(tl.int32), column.to(tl.int32)

    for step in range(first, last):
        inner_in = tl.arange(0, BLOCK_K) < K - step * BLOCK_K
        if TMA:
            x_tile = x.load([first_row, step * BLOCK_K])
        else:
            x_tile = tl.load(x_pointers, mask=rows_in[:, None] & inner_in[None, :], other=0.0)
            x_pointers += x_step
        if BY_ROWS:
            if TMA:
                w_tile = w.load([step * BLOCK_K, first_column])
            else:
                w_tile = tl.load(w_pointers, mask=inner_in[:, None] & columns_in[None, :], other=0.0)
            bits = tl.load(word_pointers, mask=inner_in[:, None] & words_in[None, :], other=0)
        else:
            words_in = tl.arange(0, BLOCK_K // 32) < words_in_row - step * (BLOCK_K // 32)
            if TMA:
                w_tile = w.load([first_column, step * BLOCK_K])
            else:
                w_tile = tl.load(w_pointers, mask=columns_in[:, None] & inner_in[None, :], other=0.0)
            bits = tl.load(word_pointers, mask=columns_in[:, None] & words_in[None, :], other=0)
        if everything is not None:
            bits |= everything
        if a is not None:
            if BY_ROWS:
                b_tile = tl.load(moving, mask=inner_in[:, None] & ranks_in[None, :], other=0.0)
                update = tl.dot(b_tile, fixed, input_precision=PRECISION)
            else:
                a_tile = tl.load(moving, mask=ranks_in[:, None] & inner_in[None, :], other=0.0)
                update = tl.dot(fixed, a_tile, input_precision=PRECISION)
            w_tile = w_tile.to(tl.float32) + scaling * update
            moving += moving_step
        if BY_ROWS:
            w_tile = masked(w_tile, bits, x_tile.dtype, BLOCK_K, BLOCK_N, IN_PAIRS)
        else:
            w_tile = tl.trans(masked(w_tile, bits, x_tile.dtype, BLOCK_N, BLOCK_K, IN_PAIRS))
        if W_FIRST:
            total = tl.dot(tl.trans(w_tile), tl.trans(x_tile), total, input_precision=PRECISION)
        else:
            total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        if not TMA:
            w_pointers += w_step
        word_pointers += word_step
    return total


@triton.jit
def store_split(
    total, bias, out, split, rows, rows_in, column, M, N, stride_bias, BLOCK_N: tl.constexpr, W_FIRST: tl.constexpr
):
    """out[split, rows] = total, the first split's + bias, rounded once; out [splits, M, N] contiguous."""
    if W_FIRST:
        total = tl.trans(total)
    columns = column + tl.arange(0, BLOCK_N)
    columns_in = columns < N
    if bias is not None:
        values = tl.load(bias + columns * stride_bias, mask=columns_in & (split == 0), other=0.0)
        total += values.to(tl.float32)[None, :]
    pointers = out + split.to(tl.int64) * M * N + rows[:, None] * N + columns[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=rows_in[:, None] & columns_in[None, :])
