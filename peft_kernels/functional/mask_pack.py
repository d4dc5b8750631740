"""`mask_pack`: a mask of one bit a weight, from a mask or from scores and a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_floating, check_shape, check_tensor, shape_text
from peft_kernels.formats.mask import PackedMask

_OP = "mask_pack"


def mask_pack(values: Tensor, threshold: Tensor | None = None, *, magnitude: bool = False) -> PackedMask:
    """Packs which weights are kept into one bit each, in one pass and without a wait for the device.

    Kept is values ≠ 0; with a threshold values > threshold, or |values| > threshold if `magnitude`. NaN is above no
    threshold, and without one it is kept, being no 0.

    Args:
        values: [out_features, in_features], any strides: a mask of bool or any number dtype, or with a threshold scores
            or weights of a floating-point dtype.
        threshold: [] or [out_features, 1] of a floating-point dtype, on the device of `values`; compared in float32
            (float64 where either is float64). None packs a mask.
        magnitude: compares absolute values.

    Returns:
        A `PackedMask` (`formats.mask` says which bit is which), on the device of `values`.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: no tensor, or of the wrong dtype.
    """
    check_tensor(_OP, "values", values)
    if values.ndim != 2:
        raise ValueError(
            f"{_OP}: values has shape {shape_text(values.shape)}; expected two dimensions, (out_features, in_features)"
        )
    if threshold is not None:
        check_floating(_OP, "values", values)
        check_floating(_OP, "threshold", threshold)
        if threshold.ndim:
            check_shape(_OP, "threshold", threshold, (values.shape[0], 1), f"values has {values.shape[0]} rows")
        if threshold.device != values.device:
            raise ValueError(f"{_OP}: threshold is on {threshold.device}, but values is on {values.device}")
        wide = torch.promote_types(torch.float32, torch.promote_types(values.dtype, threshold.dtype))
        threshold = threshold.detach().to(wide)
    elif values.is_complex():
        raise TypeError(f"{_OP}: values has dtype {values.dtype}; expected bool, integers or floating-point numbers")
    return PackedMask(ops.mask_pack.mask_pack(values, threshold, bool(magnitude)), values.shape)
