"""`mask_unpack`: a packed mask as booleans."""

from __future__ import annotations

from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_mask
from peft_kernels.formats.mask import PackedMask


def mask_unpack(mask: PackedMask) -> Tensor:
    """Unpacks a mask.

    Args:
        mask: of a weight [out_features, in_features].

    Returns:
        bool [out_features, in_features]: True where the weight is kept.

    Raises:
        ValueError: the words do not fit the mask's shape.
        TypeError: no `PackedMask`, or words of another dtype than int32.
    """
    check_mask("mask_unpack", "mask", mask)
    return ops.mask_unpack.mask_unpack(mask.words, mask.shape[1])
