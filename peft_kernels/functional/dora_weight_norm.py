"""`dora_weight_norm`: the row norms of W + s B A, which DoRA divides by."""

from __future__ import annotations

from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_adapter, check_device, check_finite, check_floating, check_nf4, check_shape
from peft_kernels.formats.nf4 import NF4Weight

_OP = "dora_weight_norm"


def dora_weight_norm(
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    weight_norm_squared: Tensor | None = None,
) -> Tensor:
    """The norm of each row of W + scaling · B A, from products of rank r: no matrix of W's size is formed.

    ‖W + sBA‖² = ‖W‖² + 2s · rowsum((W Aᵀ) ⊙ B) + s² · rowsum((B (A Aᵀ)) ⊙ B), in float32 (float64 for a float64 W)

    Where s B A nearly cancels W, the difference of the large terms costs digits; what rounding makes negative counts
    as 0. No gradient flows through the result: DoRA treats it as a constant.

    Args:
        weight: W [out_features, in_features]; or an `NF4Weight`, taken in the dtype that it has (not that of the x it
            will meet), as Hugging Face PEFT takes it, a bounded part at a time.
        lora_A: [r, in_features], 1 <= r <= 512.
        lora_B: [out_features, r] in lora_A's dtype.
        scaling: s.
        weight_norm_squared: ‖W‖² of each row [out_features] in the result's dtype, worth keeping while W is frozen
            (`dora_weight_norm` with scaling = 0, squared); None computes it.

    Returns:
        [out_features], float32 or float64.

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
    """
    if isinstance(weight, NF4Weight):
        check_nf4(_OP, "weight", weight)
    else:
        check_floating(_OP, "weight", weight)
    check_shape(_OP, "weight", weight, ("out_features", "in_features"), "it is a matrix")
    n, k = weight.shape
    check_adapter(_OP, lora_A, lora_B, (k, "input features"), (n, "output features"))
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_device(_OP, name, tensor, weight.device)
    check_finite(_OP, "scaling", scaling)
    if weight_norm_squared is not None:
        check_floating(_OP, "weight_norm_squared", weight_norm_squared)
        check_shape(_OP, "weight_norm_squared", weight_norm_squared, (n,), f"weight has {n} output features")
        check_device(_OP, "weight_norm_squared", weight_norm_squared, weight.device)
    return ops.dora_weight_norm.dora_weight_norm(weight, lora_A, lora_B, scaling * 1.0, weight_norm_squared)
