"""`sparse_delta_linear` as PyTorch's matmuls on one piece of W + Δ after another: never a copy of the whole W.

y is cut along N and dx along K, so that each element is summed in one matmul and rounded once. Where rows choose among
deltas the host reads the ids (one synchronisation on a GPU, forward and backward), and each delta that some row chose
goes over W once more; rows of one delta that lie together are not copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import STRIP, Positions
from peft_kernels.formats.sparse_delta import SparseDelta, added
from peft_kernels.kernels import _base
from peft_kernels.kernels._masked import columns_of, grad_at, like, rows_of, strips
from peft_kernels.kernels.composed._passes import sum_over_rows, sum_rows
from peft_kernels.kernels.composed.multi_lora_linear import Rows, segments

Weight = Tensor | NF4Weight


def unsupported(problem) -> str | None:
    return None


class Part(NamedTuple):
    """Rows with one delta, `number` of it and itself; None for W alone."""

    rows: Rows
    number: int | None
    delta: SparseDelta | None


def parts(ids: Tensor | None, deltas: list[SparseDelta]) -> list[Part]:
    """What some row chose."""
    if ids is None:
        return [Part(slice(None), 0, deltas[0])]
    # `segments` passes over what is below 0: W alone comes last in the order.
    count = len(deltas)
    numbers = torch.where((ids < 0) | (ids >= count), count, ids)
    found = [(segment.rows, segment.adapter) for segment in segments(numbers.unsqueeze(1))]
    return [Part(rows, i, deltas[i]) if i < count else Part(rows, None, None) for rows, i in found]


def _changed(part: Weight, rows: Tensor, columns: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A piece of W, new, with the values added at (row, column) of it."""
    if isinstance(part, NF4Weight):
        piece = base = torch.ops.peft_kernels.nf4_dequantize(part.tensors, part.layout, dtype)
    else:
        piece, base = part.to(dtype, copy=True, memory_format=torch.contiguous_format), part
    # Places occur once, so that nothing depends on an order.
    return piece.index_put_((rows, columns), added(base[rows, columns], values, dtype))


def row_pieces(weight: Weight, delta: SparseDelta, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, (W + Δ)[rows] in `dtype`)."""
    (n, k), (places, values) = weight.shape, delta
    counts = places.starts.tolist()
    for start, stop in strips(n, k * dtype.itemsize, weight.device):
        part = rows_of(weight, start, stop)
        chosen = slice(counts[start // STRIP], counts[-(-stop // STRIP)])
        flat = places.flat[chosen].long() - start * k
        yield slice(start, stop), _changed(part, flat // max(1, k), flat % max(1, k), values[chosen], dtype)


def column_pieces(weight: Weight, delta: SparseDelta, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns, (W + Δ)[:, columns] in `dtype`)."""
    (n, k), places = weight.shape, delta.positions
    order, starts = places.by_columns()
    counts = starts.tolist()
    for start, stop in strips(k, n * dtype.itemsize, weight.device):
        part = columns_of(weight, start, stop)
        chosen = order[counts[start // STRIP] : counts[-(-stop // STRIP)]].long()
        flat, values = places.flat[chosen].long(), delta.values[chosen]
        yield slice(start, stop), _changed(part, flat // k, flat % k - start, values, dtype)


def is_plain(delta: SparseDelta | None) -> bool:
    """Whether W + Δ is W."""
    return delta is None or delta.values.numel() == 0


def _base_of(weight: Weight, dtype: torch.dtype) -> Weight:
    return weight if isinstance(weight, NF4Weight) else weight.to(dtype)


def _linear(x, weight, delta, bias):
    if is_plain(delta):
        return _base.linear(x, _base_of(weight, x.dtype), bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows, piece in row_pieces(weight, delta, x.dtype):
        y[:, rows] = F.linear(x, piece, None if bias is None else bias[rows])
    return y


def grad_input_of(grad_y, weight, delta):
    """dY (W + Δ)."""
    if is_plain(delta):
        return _base.grad_input(grad_y, _base_of(weight, grad_y.dtype))
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[1])
    for columns, piece in column_pieces(weight, delta, grad_y.dtype):
        torch.mm(grad_y, piece, out=grad_x[:, columns])
    return grad_x


def forward(x, weight, deltas, ids, bias, linear=_linear):
    """`linear` is what gives x (W + Δ)ᵀ + b of one delta, or of none."""
    if ids is None:
        return linear(x, weight, deltas[0], bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for part in parts(ids, deltas):
        y[part.rows] = linear(x[part.rows], weight, part.delta, bias)
    return y


def backward(grad_y, x, weight, deltas, ids, needs, gather=grad_at):
    """`gather` is what gives (dYᵀ x) at places."""
    need_x, need_weight, need_bias, need_values = needs
    found = parts(ids, deltas)
    return (
        grad_input(grad_y, weight, deltas, ids, found) if need_x else None,
        grad_weight(grad_y, x, weight) if need_weight else None,
        sum_rows(grad_y) if need_bias else None,
        grad_values(grad_y, x, deltas, found, need_values, gather),
    )


def grad_input(
    grad_y: Tensor, weight: Weight, deltas, ids: Tensor | None, found: list[Part], one=grad_input_of
) -> Tensor:
    """dx. `one` is what gives dY (W + Δ) of one delta, or of none."""
    if ids is None:
        return one(grad_y, weight, deltas[0])
    grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[1])
    for part in found:
        grad_x[part.rows] = one(grad_y[part.rows], weight, part.delta)
    return grad_x


def grad_weight(grad_y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """dYᵀ x in W's dtype, rounded once."""
    if grad_y.dtype == weight.dtype:
        return torch.mm(grad_y.t(), x)
    (n, k), dtype = weight.shape, weight.dtype
    grad = torch.empty(n, k, dtype=dtype, device=weight.device)
    for start, stop in strips(n, k * grad.element_size(), weight.device):
        grad[start:stop] = sum_over_rows(grad_y[:, start:stop], x, like(stop - start, k, dtype, weight.device))
    return grad


def grad_values(grad_y, x, deltas, found, need_values, gather):
    """Of each delta, zeros where no row chose it; None where nobody asked."""
    grads: list[Tensor | None] = [None] * len(deltas)
    for part in found:
        if part.delta is not None and need_values[part.number]:
            places: Positions = part.delta.positions
            grads[part.number] = gather(grad_y[part.rows], x[part.rows], places, part.delta.values.dtype)
    for i, delta in enumerate(deltas):
        if need_values[i] and grads[i] is None:
            grads[i] = torch.zeros_like(delta.values)
    return grads
