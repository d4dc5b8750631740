"""`mask_apply`: a weight with zeros where the mask keeps nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import FLOATS, check_floating, check_mask_of
from peft_kernels.formats.mask import PackedMask

_OP = "mask_apply"


def mask_apply(weight: Tensor, mask: PackedMask, dtype: torch.dtype | None = None) -> Tensor:
    """W ⊙ M in one pass: exactly 0 where nothing is kept, also where W is infinite or NaN. No gradient.

    Args:
        weight: [out_features, in_features], floating-point, any strides.
        mask: of this shape, on the weight's device.
        dtype: what the kept weights are rounded to; None keeps the weight's.

    Returns:
        [out_features, in_features] in `dtype`, contiguous.

    Raises:
        ValueError: the mask has another shape or is on another device.
        TypeError: an argument is of the wrong type or dtype.
    """
    check_floating(_OP, "weight", weight)
    check_mask_of(_OP, "mask", mask, weight)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"{_OP}: dtype is {dtype}; expected float32, float16, bfloat16 or float64")
    return ops.mask_apply.mask_apply(weight.detach(), mask.words, dtype)


def mask_apply_(weight: Tensor, mask: PackedMask) -> Tensor:
    """As `mask_apply`, into the weight's own memory; a parameter may be given.

    Returns:
        `weight`.

    Raises:
        ValueError, TypeError: as `mask_apply`; then the weight is as it was.
    """
    check_floating(_OP, "weight", weight)
    check_mask_of(_OP, "mask", mask, weight)
    with torch.no_grad():
        ops.mask_apply.mask_apply_(weight, mask.words)
    return weight
