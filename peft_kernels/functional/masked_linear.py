"""`masked_linear`: a linear layer over a pruned weight."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_bias, check_device, check_floating, check_mask_of, check_shape, check_weight
from peft_kernels.formats.mask import PackedMask
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import Positions

_OP = "masked_linear"


def masked_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    mask: PackedMask,
    bias: Tensor | None = None,
    *,
    weight_is_masked: bool = False,
    grad_layout: str = "dense",
    values: Tensor | None = None,
    places: Positions | None = None,
) -> Tensor:
    """A linear layer over a pruned weight, forward and backward, without a copy of the weight.

    y = x (W ⊙ M)ᵀ + b,  dx = dY (W ⊙ M),  dW = (dYᵀ x) ⊙ M

    W is read with its mask of one bit a weight; what is outside has no effect, whatever it is (also infinite), and its
    gradient is exactly 0. So with a weight that is 0 outside the mask every optimiser that leaves a parameter of 0 with
    a gradient of 0 alone (SGD with momentum, Adam, weight decay, ...) keeps it pruned, bit for bit. Between forward and
    backward x is kept where W trains, and nothing else. The mask may be another one at each call. Second derivatives
    raise RuntimeError.

    Args:
        x: [..., in_features], any strides, any number of rows; float32, float16, bfloat16 or float64.
        weight: [out_features, in_features] in x's dtype (under autocast in any: it is rounded piece by piece); or an
            `NF4Weight`, which is frozen.
        mask: `PackedMask` of the weight's shape, on its device.
        bias: [out_features] in the weight's dtype (over an `NF4Weight` in any), or None.
        weight_is_masked: promises that W is 0 outside the mask already. Forward and dx are then plain matmuls; of the
            gradients only dW needs the mask. Nobody checks it.
        grad_layout: "dense" gives `weight` its gradient. "compact" gives `values` the gradient instead: the same
            numbers at the kept places only, so that gradient and optimiser state are as small as the mask allows.
        values: with "compact", [nnz]: the kept weights, in the order of `places`. Its numbers are not read: `weight`
            holds them too, and whoever changes one changes the other (`MaskedLinear` does).
        places: with "compact", `mask.positions()`, made once per mask.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast, as `F.linear`).

    Raises:
        ValueError: a shape or device does not fit; the message names the argument, what it is and what it should be.
        TypeError: an argument is of the wrong type or dtype.
    """
    check_floating(_OP, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{_OP}: x has no dimensions; expected (..., in_features)")
    features = x.shape[-1]
    check_weight(_OP, "weight", weight, x, ("out_features", features), f"x has {features} features")
    check_mask_of(_OP, "mask", mask, weight)
    if bias is not None:
        check_bias(_OP, "bias", bias, "weight", weight)
    _check_layout(grad_layout, weight, values, places)
    return ops.masked_linear.masked_linear(x, weight, mask, bias, bool(weight_is_masked), values, places)


def _check_layout(grad_layout, weight, values, places) -> None:
    if grad_layout not in ("dense", "compact"):
        raise ValueError(f"{_OP}: grad_layout is {grad_layout!r}; expected 'dense' or 'compact'")
    if grad_layout == "dense":
        if values is not None or places is not None:
            raise ValueError(f"{_OP}: values and places are for grad_layout='compact'")
        return
    if isinstance(weight, NF4Weight):
        raise TypeError(f"{_OP}: grad_layout is 'compact', but the weight is an NF4Weight, which is frozen")
    check_floating(_OP, "values", values)
    if not isinstance(places, Positions):
        raise TypeError(f"{_OP}: places is {type(places).__name__}; expected the Positions of the mask")
    check_shape(_OP, "places", places, tuple(weight.shape), "it is of the mask")
    check_device(_OP, "places", places, weight.device)
    check_shape(_OP, "values", values, tuple(places.flat.shape), f"places has {places.flat.numel()} places")
    check_device(_OP, "values", values, weight.device)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: grad_layout is 'compact', but weight requires a gradient of its own")
