"""What torch.compile needs to be told apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fold_scaling(lora_B: Tensor, scaling: float) -> tuple[Tensor, float]:
    """(scaling · B, 1) while torch.compile traces, else both as they are.

    A float argument of a registered op is a constant of the graph: layers that differ in scaling alone would each be
    compiled. A product of tensors takes any number.
    """
    return (lora_B * scaling, 1.0) if torch.compiler.is_compiling() else (lora_B, scaling)


def fold_scalings(lora_Bs: Sequence[Tensor], scalings: Sequence[float]) -> tuple[list[Tensor], list[float]]:
    """`fold_scaling` for each adapter."""
    if not torch.compiler.is_compiling():
        return list(lora_Bs), list(scalings)
    pairs = [fold_scaling(b, s) for b, s in zip(lora_Bs, scalings, strict=True)]
    return [b for b, _ in pairs], [s for _, s in pairs]


def distinct(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """While torch.compile traces, a view in the place of every repetition: dynamo refuses a Function that takes one
    tensor twice (tied weights in a group)."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    result: list[Tensor | None] = []
    for i, tensor in enumerate(tensors):
        # By `is`: dynamo would guard on the numbers that id() gives, and compile anew for every layer.
        if tensor is not None and any(tensor is other for other in tensors[:i]):
            tensor = tensor.view_as(tensor)
        result.append(tensor)
    return result
