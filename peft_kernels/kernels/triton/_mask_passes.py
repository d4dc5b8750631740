"""The kernels of `mask_pack`, `mask_unpack` and `mask_apply`; their host sides are in files of these names.

A program has a tile of BLOCK_N rows and BLOCK_K columns, a multiple of the 32 of a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from peft_kernels import tuning
from peft_kernels.formats.mask import WORD_BITS
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._masked_tile import masked, signs_of

_BITS = tl.constexpr(WORD_BITS)


def launch(kernel: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, *arguments: Any) -> None:
    """Launches a kernel of this file over the tiles of a matrix [N, K], which has elements.

    Args:
        dtype: of the matrix, for the choice of a configuration.
    """
    n, k = shape
    config = tuning.config(_launch.architecture(device), "mask_passes", dtype)
    block_k = min(config.block_k, max(WORD_BITS, 1 << (k - 1).bit_length()))
    block_n = config.block // block_k
    # One dimension: the number of row blocks may pass the 65535 that the other grid axes allow.
    grid = (_launch.blocks(n, block_n) * _launch.blocks(k, block_k),)
    _launch.launch(kernel, grid, device, *arguments, n, k, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=config.num_warps)


@triton.jit
def _place(N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(rows [BLOCK_N, 1], first column, columns [1, BLOCK_K], which of them exist) of a program's tile, int64."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    rows = (pid // blocks_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    column = (pid % blocks_k).to(tl.int64) * BLOCK_K
    columns = column + tl.arange(0, BLOCK_K)[None, :]
    return rows, column, columns, (rows < N) & (columns < K)


@triton.jit
def _words_at(words, stride, rows, column, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The words of a tile [BLOCK_N, BLOCK_K / 32], from words whose rows have this stride."""
    word = column // _BITS + tl.arange(0, BLOCK_K // _BITS)[None, :]
    return tl.load(words + rows * stride + word, mask=(rows < N) & (word * _BITS < K), other=0)


@triton.jit
def mask_pack(
    values, threshold, words, stride_n, stride_k, stride_threshold, words_in_row, MAGNITUDE: tl.constexpr,
    N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """words [N, words_in_row] (contiguous): bit k % 32 of word k // 32 is whether a value is not 0, or is above the
    threshold of its row."""
    rows, column, columns, inside = _place(N, K, BLOCK_N, BLOCK_K)
    value = tl.load(values + rows * stride_n + columns * stride_k, mask=inside, other=0)
    if threshold is None:
        kept = inside & (value != 0)
    else:
        wide = value.to(threshold.dtype.element_ty)
        if MAGNITUDE:
            wide = tl.abs(wide)
        kept = inside & (wide > tl.load(threshold + rows * stride_threshold, mask=rows < N, other=0.0))
    bits = tl.reshape(kept.to(tl.int32), (BLOCK_N, BLOCK_K // _BITS, _BITS))
    word = tl.sum(bits << tl.arange(0, _BITS)[None, None, :], axis=2)
    to = column // _BITS + tl.arange(0, BLOCK_K // _BITS)[None, :]
    tl.store(words + rows * words_in_row + to, word, mask=(rows < N) & (to < words_in_row))


@triton.jit
def mask_unpack(words, out, stride, N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [N, K] (contiguous), bytes of 0 and 1."""
    rows, column, columns, inside = _place(N, K, BLOCK_N, BLOCK_K)
    signs = signs_of(_words_at(words, stride, rows, column, N, K, BLOCK_N, BLOCK_K), BLOCK_N, BLOCK_K)
    tl.store(out + rows * K + columns, (signs < 0).to(tl.uint8), mask=inside)


@triton.jit
def mask_apply(
    weight, words, out, stride_n, stride_k, stride, stride_on, stride_ok, IN_PAIRS: tl.constexpr,
    N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = the weight where it is kept, else 0; out may be the weight itself."""
    rows, column, columns, inside = _place(N, K, BLOCK_N, BLOCK_K)
    value = tl.load(weight + rows * stride_n + columns * stride_k, mask=inside, other=0.0)
    words_of_tile = _words_at(words, stride, rows, column, N, K, BLOCK_N, BLOCK_K)
    value = masked(value, words_of_tile, out.dtype.element_ty, BLOCK_N, BLOCK_K, IN_PAIRS)
    tl.store(out + rows * stride_on + columns * stride_ok, value, mask=inside)
