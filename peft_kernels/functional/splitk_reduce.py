"""`splitk_reduce`: the second stage of a sum that was split among programs."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import FLOATS, check_finite, check_floating


def splitk_reduce(partials: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Sums the partial results of a split reduction in a fixed order: the same bits run to run, with no atomics.

    y = dtype(scale · (((0 + partials[0]) + partials[1]) + ...)), summed in float32, rounded once.

    Args:
        partials: [P, ...] float32 (float64 on the reference), one partial result per split.
        scale: factor applied to the sum before the rounding.
        dtype: dtype of the result; None keeps that of `partials`.

    Returns:
        A new tensor of shape partials.shape[1:]; zeros when P = 0.

    Raises:
        ValueError: partials has no dimensions, or scale is not finite.
        TypeError: partials is not a floating-point tensor, or dtype is not floating-point.
    """
    check_floating("splitk_reduce", "partials", partials)
    if partials.ndim == 0:
        raise ValueError("splitk_reduce: partials has no dimensions; expected (P, ...)")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"splitk_reduce: dtype is {dtype}; expected a floating-point dtype")
    check_finite("splitk_reduce", "scale", scale)
    return ops.splitk_reduce.splitk_reduce(partials, float(scale), dtype or partials.dtype)
