"""`nf4_lora_linear`: a linear layer whose frozen weight stays in 4 bits, with a low-rank update beside it."""

from __future__ import annotations

from torch import Tensor

from peft_kernels import ops
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional.lora_linear import check_lora_over_nf4
from peft_kernels.functional.philox_dropout import seed_tensor

_OP = "nf4_lora_linear"


def nf4_lora_linear(
    x: Tensor,
    q: NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """QLoRA's layer: a frozen weight of 4 bits with a trained low-rank update beside it.

    y = x Wᵀ + b + scaling · (drop(x) Aᵀ) Bᵀ, W as in `nf4_linear`, the update as in `lora_linear`.

    Between forward and backward only x, the [..., r] product drop(x) Aᵀ and the seed are kept beside the packed weight
    itself: no dense weight, no mask (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). Second derivatives
    raise RuntimeError.

    Args:
        x: [..., in_features], any strides, any number of rows; float32, float16, bfloat16 or float64.
        q: [out_features, in_features], frozen.
        lora_A: [r, in_features], 1 <= r <= 512, in any of these dtypes: it is cast to x's for the products, and its
            gradient comes back in its own dtype.
        lora_B: [out_features, r] in lora_A's dtype.
        scaling: s, usually lora_alpha / r.
        bias: [out_features] in any of these dtypes, or None; it is cast to x's.
        dropout_p: the probability, in [0, 1], that an element of x is zeroed for the low-rank branch; kept ones are
            scaled by 1 / (1 - p). The probability is rounded to a multiple of 1/65536.
        training: no dropout when False.
        seed: an integer or an int64 tensor [1] on x's device that fixes the dropout mask. None draws one from torch's
            generator of that device.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast, as `F.linear`).

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument, what it is and what it
            should be.
        TypeError: an argument is of the wrong type or dtype.
    """
    check_lora_over_nf4(_OP, "q", x, q, lora_A, lora_B, scaling, bias, dropout_p)
    scaling, dropout_p = scaling * 1.0, dropout_p * 1.0
    if not training or dropout_p == 0:
        return ops.nf4_lora_linear.nf4_lora_linear(x, q, bias, lora_A, lora_B, scaling, 0.0, None)
    seed = seed_tensor(_OP, seed, x.device)
    return ops.nf4_lora_linear.nf4_lora_linear(x, q, bias, lora_A, lora_B, scaling, dropout_p, seed)
