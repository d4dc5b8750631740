"""`masked_lora_linear`: LoRA over a pruned weight."""

from __future__ import annotations

from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_mask_of
from peft_kernels.formats.mask import PackedMask
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional.lora_linear import explain_lora, lora_fits
from peft_kernels.functional.philox_dropout import seed_tensor

_OP = "masked_lora_linear"


def masked_lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    mask: PackedMask,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    update_masked: bool = False,
    weight_is_masked: bool = False,
) -> Tensor:
    """LoRA over a frozen pruned weight, the update beside it or inside its mask.

    y = x (W ⊙ M)ᵀ + b + scaling · (drop(x) Aᵀ) Bᵀ              update_masked=False
    y = x (W ⊙ M)ᵀ + b + scaling · drop(x) ((B A) ⊙ M)ᵀ         update_masked=True; without dropout
      = x ((W + scaling · B A) ⊙ M)ᵀ + b

    The first is `lora_linear` over a pruned base: as fast, but merging fills the zeros. The second can be merged and
    keeps every zero (MaskLoRA of PERP, Zimmer et al. 2023, https://arxiv.org/abs/2312.15230; SparsePEFT of SQFT, Munoz
    et al. 2024, https://arxiv.org/abs/2410.03750). Neither B A nor a dense gradient of W is made in full: W's masked
    pieces get the update as they are read, and backward goes through dYᵀ x in strips. Kept for backward are x (and in
    the first meaning [..., r] numbers) and the seed. Second derivatives raise RuntimeError.

    Args:
        x: [..., in_features], any strides, any number of rows; float32, float16, bfloat16 or float64.
        weight: [out_features, in_features] in x's dtype (under autocast in any), or an `NF4Weight`; frozen, it gets no
            gradient.
        mask: `PackedMask` of the weight's shape, on its device.
        lora_A: [r, in_features], 1 <= r <= 512, in any of the dtypes above.
        lora_B: [out_features, r] in lora_A's dtype.
        scaling, bias, dropout_p, training, seed: as for `lora_linear`.
        update_masked: whether the update stays inside the mask.
        weight_is_masked: promises that W is 0 outside the mask already. Nobody checks it.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
    """
    if isinstance(weight, NF4Weight) or not lora_fits(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
        explain_lora(_OP, x, weight, lora_A, lora_B, scaling, bias, dropout_p)
        scaling, dropout_p = scaling * 1.0, dropout_p * 1.0
    check_mask_of(_OP, "mask", mask, weight)
    if not training or dropout_p == 0:
        dropout_p, seed = 0.0, None
    else:
        seed = seed_tensor(_OP, seed, x.device)
    return ops.masked_lora_linear.masked_lora_linear(
        x, weight, mask, bias, lora_A, lora_B, scaling, dropout_p, seed, bool(update_masked), bool(weight_is_masked)
    )
