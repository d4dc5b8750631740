"""`masked_lora_linear`: beside the mask, `lora_linear` over the base product of `masked_linear`; inside it, matmuls on
one piece of (W + s B A) ⊙ M after another, and gradients from one strip of (dYᵀ x) ⊙ M after another.

The gradient of the update has the size of W: forward + backward take three large matmuls, as for a weight that trains.
No more than a piece or a strip of it is there at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels import _base
from peft_kernels.kernels._masked import columns_of, like, rows_of, strips, words_of_columns
from peft_kernels.kernels.composed import lora_linear
from peft_kernels.kernels.composed._passes import SCRATCH_ELEMENTS, drop, row_blocks, sum_over_rows, sum_rows


def unsupported(problem) -> str | None:
    return None


def forward(x, weight, words, clean, bias, lora_A, lora_B, scaling, dropout_p, seed, update_masked):
    if not update_masked:
        base = _base.MaskedWeight(weight, words, clean)
        return lora_linear.forward(x, base, bias, lora_A, lora_B, scaling, dropout_p, seed)
    none = x.new_empty(x.shape[0], 0)
    if seed is None:
        y = x.new_empty(x.shape[0], weight.shape[0])
        for rows in _strips(weight, 0, x.dtype):
            part = rows_of(weight, rows.start, rows.stop)
            piece = _piece(part, words[rows], lora_A, lora_B[rows], scaling, x.dtype)
            y[:, rows] = F.linear(x, piece, None if bias is None else bias[rows])
        return y, none
    y = _base.linear(x, _base.MaskedWeight(weight, words, clean), bias)
    for block in row_blocks(*x.shape):
        dropped = drop(x[block], dropout_p, seed, block.start)
        for rows in _strips(weight, 0, x.dtype):
            y[block, rows].addmm_(dropped, _piece(None, words[rows], lora_A, lora_B[rows], scaling, x.dtype).t())
    return y, none


def backward(
    grad_y, x, s, weight, words, clean, lora_A, lora_B, scaling, dropout_p, seed, update_masked, needs
):  # fmt: skip
    need_x, need_bias, need_a, need_b = needs
    if not update_masked:
        base, wanted = _base.MaskedWeight(weight, words, clean), (need_x, False, need_bias, need_a, need_b)
        grads = lora_linear.backward(grad_y, x, s, base, lora_A, lora_B, scaling, dropout_p, seed, wanted)
        grad_x, _, *others = grads
        return grad_x, *others
    grad_x = grad_a = grad_b = None
    if need_x:
        grad_x = _grad_x(grad_y, weight, words, clean, lora_A, lora_B, scaling, dropout_p, seed)
    if need_a or need_b:
        grad_a, grad_b = _grad_factors(grad_y, x, words, lora_A, lora_B, scaling, dropout_p, seed)
    return grad_x, sum_rows(grad_y) if need_bias else None, grad_a if need_a else None, grad_b if need_b else None


def _strips(weight, dimension: int, dtype: torch.dtype):
    n, k = weight.shape
    count, other = (n, k) if dimension == 0 else (k, n)
    wide = torch.promote_types(torch.float32, dtype)
    return (slice(*ends) for ends in strips(count, other * wide.itemsize, weight.device))


def _piece(part, words: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """((part + s B A) ⊙ M) in `dtype`: summed in at least float32 and rounded once; without the part where None."""
    wide = torch.promote_types(torch.float32, dtype)
    a, b = lora_A.to(wide), lora_B.to(wide)
    if part is None:
        piece = torch.mm(b, a).mul_(scaling)
    else:
        if isinstance(part, NF4Weight):
            part = torch.ops.peft_kernels.nf4_dequantize(part.tensors, part.layout, dtype)
        piece = torch.addmm(part.to(wide), b, a, alpha=scaling)
    if piece.dtype != dtype:
        return torch.ops.peft_kernels.mask_apply(piece, words, dtype)
    torch.ops.peft_kernels.mask_apply_(piece, words)
    return piece


def _grad_x(grad_y, weight, words, clean, lora_A, lora_B, scaling, dropout_p, seed):
    """dY ((W + s B A) ⊙ M) by pieces of columns; with dropout the update's part apart, dropped by blocks of rows."""
    if seed is not None:
        grad_x = _base.grad_input(grad_y, _base.MaskedWeight(weight, words, clean))
        for block in row_blocks(*grad_x.shape):
            update = _by_columns(grad_y[block], weight, None, words, lora_A, lora_B, scaling)
            grad_x[block].add_(drop(update, dropout_p, seed, block.start))
        return grad_x
    return _by_columns(grad_y, weight, weight, words, lora_A, lora_B, scaling)


def _by_columns(grad_y, weight, base, words, lora_A, lora_B, scaling):
    """dY ((base + s B A) ⊙ M), of the shape that `weight` gives."""
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[1])
    for columns in _strips(weight, 1, grad_y.dtype):
        part = None if base is None else columns_of(base, columns.start, columns.stop)
        some = words_of_columns(words, columns.start, columns.stop)
        piece = _piece(part, some, lora_A[:, columns], lora_B, scaling, grad_y.dtype)
        torch.mm(grad_y, piece, out=grad_x[:, columns])
    return grad_x


def _grad_factors(grad_y, x, words, lora_A, lora_B, scaling, dropout_p, seed):
    """(dA, dB) = (s Bᵀ G, s G Aᵀ) with G = (dYᵀ drop(x)) ⊙ M, one strip of rows of G at a time, in float32."""
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    a, b = lora_A.to(wide), lora_B.to(wide)
    if seed is not None and x.numel() <= SCRATCH_ELEMENTS:  # drawn once, not for each strip
        x, seed = drop(x, dropout_p, seed, 0), None
    grad_a, grad_b = torch.zeros_like(a), torch.empty_like(b)
    (n, k), device = (lora_B.shape[0], lora_A.shape[1]), x.device
    for start, stop in strips(n, k * wide.itemsize, device):
        update = sum_over_rows(grad_y[:, start:stop], x, like(stop - start, k, wide, device), 1.0, dropout_p, seed)
        torch.ops.peft_kernels.mask_apply_(update, words[start:stop])
        grad_a.addmm_(b[start:stop].t(), update, alpha=scaling)
        grad_b[start:stop] = torch.mm(update, a.t()).mul_(scaling)
    return grad_a.to(lora_A.dtype), grad_b.to(lora_B.dtype)
