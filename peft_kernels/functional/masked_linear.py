"""`masked_linear`: a linear layer over a pruned weight."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import (
    FLOATS,
    check_bias,
    check_device,
    check_floating,
    check_mask_of,
    check_shape,
    check_weight,
)
from peft_kernels.formats.mask import PackedMask, words_of
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
        grad_layout: "dense" gives `weight` its gradient. "compact" gives `values` the gradient instead, that of
            the kept weights only (equal up to the order of sums): gradient and optimiser state are as small as the mask
            allows.
        values: with "compact", [nnz]: the kept weights, in the order of `places`. Its numbers are not read: `weight`
            holds them too, and whoever changes one changes the other (`MaskedLinear` does).
        places: with "compact", `mask.positions()`, made once per mask.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast, as `F.linear`).

    Raises:
        ValueError: a shape or device does not fit; the message names the argument, what it is and what it should be.
        TypeError: an argument is of the wrong type or dtype.
    """
    if not masked_fits(x, weight, mask, bias):
        explain_masked(_OP, x, weight, mask, bias)
    _check_layout(grad_layout, weight, values, places)
    return ops.masked_linear.masked_linear(x, weight, mask, bias, bool(weight_is_masked), values, places)


def masked_fits(x, weight, mask, bias) -> bool:
    """Whether x [..., K], a dense weight [N, K], its mask [N, K] and its bias [N] or None are valid: cheap, and silent
    about what is not, whatever it is (raises nothing)."""
    try:
        dtype, device, (n, k) = x.dtype, x.device, weight.shape
        return (
            isinstance(weight, Tensor)
            and isinstance(mask, PackedMask)
            and x.shape[-1] == k
            and dtype in FLOATS
            and (weight.dtype == dtype or (weight.dtype in FLOATS and torch.is_autocast_enabled(device.type)))
            and mask.shape == weight.shape
            and mask.words.shape == (n, words_of(k))
            and mask.words.dtype == torch.int32
            and device == weight.device == mask.words.device
            and (bias is None or (bias.shape == (n,) and bias.device == device and bias.dtype == weight.dtype))
        )
    except (AttributeError, ValueError, IndexError, TypeError):
        return False  # not a tensor, or not of two dimensions: the caller finds out which and says so


def explain_masked(op: str, x, weight, mask, bias) -> None:
    """Raises for the first argument that does not fit; returns when all do (a weight of 4 bits).

    Args:
        op: the op's name, for the message.
        x, weight, mask, bias: [..., K], [N, K], [N, K] and [N] or None, as `masked_linear` was given them.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: an argument is of the wrong type or dtype.
    """
    check_floating(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no dimensions; expected (..., in_features)")
    features = x.shape[-1]
    check_weight(op, "weight", weight, x, ("out_features", features), f"x has {features} features")
    check_mask_of(op, "mask", mask, weight)
    if bias is not None:
        check_bias(op, "bias", bias, "weight", weight)


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
