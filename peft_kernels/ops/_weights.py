"""The frozen weights of an op, dense or of 4 bits, as the tensors and numbers that autograd and registered ops take.

A list of weights becomes the first tensor of each (a dense weight itself, the packed half bytes of an `NF4Weight`), the
other tensors of those of 4 bits, and the `layout` of each weight one after another. Without any of 4 bits the last two
are empty, so that dense layers pay nothing. With the first tensors where dense weights would be, gradients keep their
places: packed half bytes want none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import LAYOUT_SIZE, NF4Weight, from_layout

Weight = Tensor | NF4Weight

# In the place of the layout of a dense weight beside weights of 4 bits: one tensor.
_DENSE = [0] * (LAYOUT_SIZE - 1) + [1]


def all_dense(weights: Sequence[Weight]) -> TypeGuard[Sequence[Tensor]]:
    return NF4Weight not in map(type, weights)


def split(weights: Sequence[Weight]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """(first tensor of each weight, the others, layouts)."""
    if all_dense(weights):
        return list(weights), [], []
    firsts: list[Tensor] = []
    others: list[Tensor] = []
    layouts: list[int] = []
    for weight in weights:
        first, *rest = weight.tensors if isinstance(weight, NF4Weight) else (weight,)
        firsts.append(first)
        others += rest
        layouts += weight.layout if isinstance(weight, NF4Weight) else _DENSE
    return firsts, others, layouts


def joined(tensors: Sequence[Tensor], layouts: Sequence[int], dtype: torch.dtype) -> Sequence[Weight]:
    """The weights whose first tensors and then whose others are `tensors`, those of 4 bits to be rounded to `dtype`."""
    if not layouts:
        return tensors
    count = len(layouts) // LAYOUT_SIZE
    weights: list[Weight] = []
    start = count
    for i, first in enumerate(tensors[:count]):
        layout = layouts[i * LAYOUT_SIZE : (i + 1) * LAYOUT_SIZE]
        stop = start + layout[-1] - 1
        weights.append(first if layout == _DENSE else from_layout((first, *tensors[start:stop]), layout, dtype))
        start = stop
    return weights


def cut(tensors: Sequence[Any], *sizes: int) -> list[Sequence[Any]]:
    """The first sizes[0] of `tensors`, the next sizes[1], ..., and what is left."""
    parts, start = [], 0
    for size in sizes:
        parts.append(tensors[start : start + size])
        start += size
    parts.append(tensors[start:])
    return parts
