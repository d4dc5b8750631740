"""A masked weight piece by piece, gradients of chosen weights strip by strip: never a temporary of the size of W."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_kernels.formats.mask import WORD_BITS
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import STRIP, Positions
from peft_kernels.kernels.composed._passes import sum_over_rows

Weight = Tensor | NF4Weight

# On a CPU a piece stays in the second-level cache between the mask's pass and the matmul's.
CPU_SCRATCH_BYTES = 1 << 20
# On a GPU a piece is wide enough for a matmul that fills the device, and no more than this part of W or so many bytes.
GPU_PARTS, GPU_SCRATCH_BYTES = 8, 64 << 20
_GPU_LEAST = 256


def strips(count: int, bytes_each: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """[start, stop) of the rows or columns of the pieces, whole words and strips but for the last one.

    Args:
        count: rows or columns of W.
        bytes_each: of one of them, in the piece.
        device: the weight's.
    """
    if device.type == "cpu":
        step = CPU_SCRATCH_BYTES // max(1, bytes_each)
    else:
        step = max(_GPU_LEAST, min(-(-count // GPU_PARTS), GPU_SCRATCH_BYTES // max(1, bytes_each)))
    step = max(STRIP, step // STRIP * STRIP)
    for start in range(0, count, step):
        yield start, min(count, start + step)


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Rows [start, stop), a view."""
    return weight.rows(start, stop) if isinstance(weight, NF4Weight) else weight[start:stop]


def columns_of(weight: Weight, start: int, stop: int) -> Weight:
    """Columns [start, stop), a view."""
    return weight.columns(start, stop) if isinstance(weight, NF4Weight) else weight[:, start:stop]


def words_of_columns(words: Tensor, start: int, stop: int) -> Tensor:
    """The words of a mask's columns [start, stop), which begin at a whole word: a view."""
    return words[:, start // WORD_BITS : -(-stop // WORD_BITS)]


def _masked(weight: Weight, words: Tensor, clean: bool, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, NF4Weight):
        dense = torch.ops.peft_kernels.nf4_dequantize(weight.tensors, weight.layout, dtype)
        if not clean:
            torch.ops.peft_kernels.mask_apply_(dense, words)
        return dense
    if clean:
        return weight.to(dtype)
    return torch.ops.peft_kernels.mask_apply(weight, words, dtype)


def row_pieces(weight: Weight, words: Tensor, clean: bool, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, (W ⊙ M)[rows] in `dtype`). Of a `clean` weight, which is 0 outside the mask already, the mask is not
    read."""
    n, k = weight.shape
    for start, stop in strips(n, k * dtype.itemsize, weight.device):
        yield slice(start, stop), _masked(rows_of(weight, start, stop), words[start:stop], clean, dtype)


def column_pieces(weight: Weight, words: Tensor, clean: bool, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns, (W ⊙ M)[:, columns] in `dtype`)."""
    n, k = weight.shape
    for start, stop in strips(k, n * dtype.itemsize, weight.device):
        some = words_of_columns(words, start, stop)
        yield slice(start, stop), _masked(columns_of(weight, start, stop), some, clean, dtype)


def masked_grad_weight(grad_y: Tensor, x: Tensor, weight: Tensor, words: Tensor) -> Tensor:
    """(dYᵀ x) ⊙ M in the weight's dtype, rounded once."""
    if grad_y.dtype == weight.dtype:
        grad = torch.mm(grad_y.t(), x)  # the result itself: strips of it would be smaller products and save nothing
        torch.ops.peft_kernels.mask_apply_(grad, words)
        return grad
    grad = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for start, stop in strips(weight.shape[0], weight.shape[1] * weight.element_size(), weight.device):
        grad[start:stop] = sum_over_rows(grad_y[:, start:stop], x, weight[start:stop])
        torch.ops.peft_kernels.mask_apply_(grad[start:stop], words[start:stop])
    return grad


def grad_at(grad_y: Tensor, x: Tensor, places: Positions, dtype: torch.dtype) -> Tensor:
    """(dYᵀ x) at chosen places, [nnz] in `dtype`, from one strip of dYᵀ x after another."""
    n, k = places.shape
    values = torch.empty(places.flat.shape, dtype=dtype, device=grad_y.device)
    counts = places.starts.tolist()
    for start, stop in strips(n, k * dtype.itemsize, grad_y.device):
        chosen = slice(counts[start // STRIP], counts[-(-stop // STRIP)])
        if chosen.start == chosen.stop:
            continue
        strip = sum_over_rows(grad_y[:, start:stop], x, like(stop - start, k, dtype, grad_y.device))
        values[chosen] = strip.flatten()[places.flat[chosen].long() - start * k]
    return values


def like(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What lends `sum_over_rows` its shape and dtype, without memory of its own."""
    return torch.empty((), dtype=dtype, device=device).expand(rows, columns)
