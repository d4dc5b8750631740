"""`nf4_quantize`: a dense weight in the 4 bits of QLoRA."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_blocksize, check_floating, shape_text
from peft_kernels.formats.nf4 import NF4Weight, nested

_OP = "nf4_quantize"


def nf4_quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """The weight in 4 bits an element, in the bytes that bitsandbytes' `quantize_4bit(quant_type="nf4")` gives.

    Args:
        weight: [out_features, in_features] or [experts, out_features, in_features]; float32, float16 or bfloat16.
        blocksize: elements that share an absmax, over the flattened weight; one of 32, 64, ..., 4096.
        double_quant: keep the absmax values in 8 bits too (`compress_statistics` of bitsandbytes).

    Returns:
        An `NF4Weight` on the device of `weight`.

    Raises:
        ValueError: blocksize is not one of those, weight has not 2 or 3 dimensions, or is not finite.
        TypeError: weight is of another dtype.
    """
    check_floating(_OP, "weight", weight)
    if weight.dtype == torch.float64:
        raise TypeError(f"{_OP}: weight has dtype torch.float64; expected float32, float16 or bfloat16")
    if weight.ndim not in (2, 3):
        shape = shape_text(weight.shape)
        raise ValueError(f"{_OP}: weight has shape {shape}; expected (out, in) or (experts, out, in)")
    check_blocksize(_OP, "blocksize", blocksize)
    weight = weight.detach()
    packed, absmax = ops.nf4_quantize.nf4_quantize(weight, blocksize)
    if not weight.is_meta and not absmax.isfinite().all():
        raise ValueError(f"{_OP}: weight is not finite")
    q = NF4Weight(packed, absmax, None, None, None, weight.shape, weight.dtype, blocksize)
    return nested(q) if double_quant else q
