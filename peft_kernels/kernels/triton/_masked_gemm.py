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
from peft_kernels.kernels.triton._masked_product import add_masked_product, steps_of, store_split
from peft_kernels.kernels.triton._masked_tile import in_pairs

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
    form, config = form_of(x, weight, columns, by_rows)
    tiles = _launch.blocks(m, config.block_m) * _launch.blocks(columns, config.block_n)
    splits, per_split = _launch.split(length, config.block_k, tiles, config.programs)
    out = torch.empty((splits, m, columns), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if out.numel() == 0:
        return out[0]
    w = weight if by_rows else weight.t()
    tma = form.endswith("_tma") and length > 0
    operands = descriptors(x, w, config) if tma else (x, w)
    strides = ((0, 0), (0, 0)) if tma else (x.stride(), w.stride())
    _launch.launch(
        _masked_gemm, (tiles, splits), x.device,
        *operands, words, bias, out, m, columns, length, words.shape[1], per_split // config.block_k,
        *strides, words.stride(0), 0 if bias is None else bias.stride(0),
        TMA=tma, BY_ROWS=by_rows, W_FIRST=w_first(config), IN_PAIRS=in_pairs(x.dtype),
        PRECISION=_launch.dot_precision(x.dtype), **config.options(),
    )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)


def w_first(config: Any) -> bool:
    """Whether W is the first operand."""
    return config.block_m <= _FEW


def form_of(x: Tensor, weight: Tensor, columns: int, by_rows: bool, **more: Any) -> tuple[str, Any]:
    """The first form that takes these strides and addresses and has a configuration for these sizes, and that."""
    form = "masked_grad_x" if by_rows else "masked_gemm"
    arch, sizes = _launch.architecture(x.device), {"m": _launch.bucket(x.shape[0]), "n": columns, **more}
    if x.dtype.itemsize == 2 and rows_fit(x) and rows_fit(weight):
        config = tuning.config(arch, f"{form}_tma", x.dtype, **sizes)
        if config is not None:
            return f"{form}_tma", config
    return form, tuning.config(arch, form, x.dtype, **sizes)


@triton.jit(do_not_specialize=["M"])
def _masked_gemm(
    x, w, words, bias, out, M, N, K, words_in_row, steps, x_strides, w_strides, stride_words, stride_bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TMA: tl.constexpr, BY_ROWS: tl.constexpr, W_FIRST: tl.constexpr, IN_PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [split, M, N] (contiguous) from x [M, K] and w [K, N] in `steps` steps a split, as `add_masked_product`."""
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_M)
    first, last = steps_of(split, steps, K, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M) if W_FIRST else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    total = add_masked_product(
        total, x, w, words, None, None, None, None, row, column, rows, rows < M, N, K, 0, first, last, words_in_row,
        x_strides, w_strides, stride_words, None, None,
        BLOCK_M, BLOCK_N, BLOCK_K, 16, TMA, BY_ROWS, W_FIRST, IN_PAIRS, PRECISION,
    )  # fmt: skip
    store_split(total, bias, out, split, rows, rows < M, column, M, N, stride_bias, BLOCK_N, W_FIRST)
