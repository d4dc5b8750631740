"""`multi_mask_linear`: many pruned subnetworks over one weight, another one for each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_bias, check_device, check_floating, check_mask_of, check_shape, check_weight
from peft_kernels.formats.mask import PackedMask, PackedMaskStack, stack, words_of
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional.multi_lora_linear import adapter_choice

_OP = "multi_mask_linear"


def multi_mask_linear(
    x: Tensor,
    weight: Tensor,
    masks: Sequence[PackedMask] | PackedMaskStack,
    mask_ids: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """A linear layer of which each row of a batch sees its own subnetwork.

    y[m] = x[m] (W ⊙ M_i)ᵀ + b,  i = mask_ids[m];  dW = Σ_i (dY_iᵀ x_i) ⊙ M_i over the rows of each mask

    One dense W serves all subnetworks (winning tickets, task masks: SupSup, Wortsman et al. 2020,
    https://arxiv.org/abs/2006.14769), each of which costs one bit a weight: 2 MiB beside 4096 x 4096. Second
    derivatives raise RuntimeError.

    Args:
        x: [..., in_features], any strides, any number of rows; float32, float16, bfloat16 or float64.
        weight: [out_features, in_features] in x's dtype (under autocast in any).
        masks: of the weight's shape, on its device. A `PackedMaskStack` (`formats.mask.stack`) is read as it is, a
            sequence is copied into one at each call.
        mask_ids: int32 or int64, on x's device: one per row, in the shape of x without its last dimension, or one per
            sample, [x.shape[0]]; in [-1, number of masks), -1 for the whole W. On a CPU the range is checked; on a GPU
            only where PEFT_KERNELS_CHECK_IDS=1, and ids outside count as -1.
        bias: [out_features] in the weight's dtype, or None.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape or device does not fit, or an id out of range; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
    """
    check_floating(_OP, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{_OP}: x has no dimensions; expected (..., in_features)")
    if isinstance(weight, NF4Weight):
        raise TypeError(f"{_OP}: weight is an NF4Weight; expected a torch.Tensor")
    check_weight(_OP, "weight", weight, x, ("out_features", x.shape[-1]), f"x has {x.shape[-1]} features")
    if bias is not None:
        check_bias(_OP, "bias", bias, "weight", weight)
    masks = _stacked(masks, weight)
    ids, _ = adapter_choice(_OP, x, mask_ids, None, len(masks), "mask_ids")
    return ops.multi_mask_linear.multi_mask_linear(x, weight, masks.words, ids.squeeze(1), bias)


def _stacked(masks, weight: Tensor) -> PackedMaskStack:
    if not isinstance(masks, PackedMaskStack):
        if not isinstance(masks, Sequence) or isinstance(masks, PackedMask):
            raise TypeError(f"{_OP}: masks is {type(masks).__name__}; expected PackedMasks or a PackedMaskStack")
        for i, mask in enumerate(masks):
            check_mask_of(_OP, f"masks[{i}]", mask, weight)
        return stack(masks)
    check_shape(_OP, "masks", masks, tuple(weight.shape), "they are of weight")
    n, k = weight.shape
    check_shape(_OP, "masks.words", masks.words, ("masks", n, words_of(k)), f"weight has shape ({n}, {k})")
    check_device(_OP, "masks", masks, weight.device)
    return masks
