"""y = x (W ⊙ M)ᵀ + bias and dX = dY (W ⊙ M): a GEMM whose weight gets its mask between memory and tensor cores.

A tile of W is loaded as it lies, the words of its mask beside it, and what is not kept becomes 0 in registers:
the same words serve both products, of which the second sums over W's rows. Where tiles do not fill the GPU, the sum is
split and the partials are added in a fixed order (`splitk_reduce`).

Floor, M=8192, K=N=4096, bf16: 275 GFLOP = 348 us at 790 TFLOP/s, and 2 MB more to read than the dense GEMM. A masked
copy of W costs 16 us besides.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._extended_gemm_tma import descriptors, rows_fit
from peft_kernels.kernels.triton._gemm_tile import tile_of
from peft_kernels.kernels.triton._masked_tile import in_pairs, masked

# Rows of x up to which W comes first: the first operand of tensor cores has at least 64 rows on sm_90, 16 before.
_FEW = 16


def masked_gemm(x: Tensor, weight: Tensor, words: Tensor, bias: Tensor | None = None, *, by_rows: bool) -> Tensor:
    """x (W ⊙ M) + bias (`by_rows`: the sum is over W's rows), or x (W ⊙ M)ᵀ + bias; [M, columns] in x's dtype.

    Args:
        x: [M, sum], any strides.
        weight: [N, K], any strides and dtype: it is rounded to x's.
        words: int32 [N, ceil(K / 32)], whose rows may be strided.
        bias: [columns] in x's dtype.
    """
    m, (n, k) = x.shape[0], weight.shape
    columns, length = (k, n) if by_rows else (n, k)
    form, config = _form(x, weight, columns, by_rows)
    tiles = _launch.blocks(m, config.block_m) * _launch.blocks(columns, config.block_n)
    splits, per_split = _launch.split(length, config.block_k, tiles, config.programs)
    out = torch.empty((splits, m, columns), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if out.numel() == 0:
        return out[0]
    w = weight if by_rows else weight.t()
    tma = form.endswith("_tma") and length > 0
    operands = descriptors(x, w, config) if tma else (x, w)
    strides = (0, 0, 0, 0) if tma else (*x.stride(), *w.stride())
    _launch.launch(
        _masked_gemm, (tiles, splits), x.device,
        *operands, words, bias, out, m, columns, length, words.shape[1], per_split // config.block_k,
        *strides, words.stride(0), 0 if bias is None else bias.stride(0),
        TMA=tma, BY_ROWS=by_rows, W_FIRST=config.block_m <= _FEW, IN_PAIRS=in_pairs(x.dtype),
        PRECISION=_launch.dot_precision(x.dtype), **config.options(),
    )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)


def _form(x: Tensor, weight: Tensor, columns: int, by_rows: bool) -> tuple[str, Any]:
    """The first form that takes these strides and addresses and has a configuration for these sizes, and that."""
    form = "masked_grad_x" if by_rows else "masked_gemm"
    arch, m = _launch.architecture(x.device), _launch.bucket(x.shape[0])
    if x.dtype.itemsize == 2 and rows_fit(x) and rows_fit(weight):
        config = tuning.config(arch, f"{form}_tma", x.dtype, m=m, n=columns)
        if config is not None:
            return f"{form}_tma", config
    return form, tuning.config(arch, form, x.dtype, m=m, n=columns)


@triton.jit(do_not_specialize=["M"])
def _masked_gemm(
    x, w, words, bias, out, M, N, K, words_in_row, steps,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_words, stride_bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, BY_ROWS: tl.constexpr, W_FIRST: tl.constexpr, IN_PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [split, M, N] (contiguous) from x [M, K] and w [K, N] in `steps` steps a split. Rows of the mask,
    `words_in_row` words, follow K, or N when BY_ROWS. With TMA x and w are descriptors, that of w as it lies."""
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    rows_in, columns_in = rows < M, columns < N
    # Counted in steps, so that the compiler sees how far all that follows from them is aligned.
    first = split * steps
    last = tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))
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
        x_pointers = x + rows[:, None] * stride_xm + inner[None, :] * stride_xk
        x_step, w_step = BLOCK_K * tl.cast(stride_xk, tl.int64), BLOCK_K * tl.cast(stride_wk, tl.int64)
        if BY_ROWS:
            w_pointers = w + inner[:, None] * stride_wk + columns[None, :] * stride_wn
        else:
            w_pointers = w + columns[:, None] * stride_wn + inner[None, :] * stride_wk
    first_row, first_column = row.to(tl.int32), column.to(tl.int32)

    total = tl.zeros((BLOCK_N, BLOCK_M) if W_FIRST else (BLOCK_M, BLOCK_N), dtype=tl.float32)
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
            w_tile = masked(w_tile, bits, x_tile.dtype, BLOCK_K, BLOCK_N, IN_PAIRS)
        else:
            words_in = tl.arange(0, BLOCK_K // 32) < words_in_row - step * (BLOCK_K // 32)
            if TMA:
                w_tile = w.load([first_column, step * BLOCK_K])
            else:
                w_tile = tl.load(w_pointers, mask=columns_in[:, None] & inner_in[None, :], other=0.0)
            bits = tl.load(word_pointers, mask=columns_in[:, None] & words_in[None, :], other=0)
            w_tile = tl.trans(masked(w_tile, bits, x_tile.dtype, BLOCK_N, BLOCK_K, IN_PAIRS))
        if W_FIRST:
            total = tl.dot(tl.trans(w_tile), tl.trans(x_tile), total, input_precision=PRECISION)
        else:
            total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        if not TMA:
            w_pointers += w_step
        word_pointers += word_step

    if W_FIRST:
        total = tl.trans(total)
    if bias is not None:
        values = tl.load(bias + columns * stride_bias, mask=columns_in & (split == 0), other=0.0)
        total += values.to(tl.float32)[None, :]
    pointers = out + split.to(tl.int64) * M * N + rows[:, None] * N + columns[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=rows_in[:, None] & columns_in[None, :])
