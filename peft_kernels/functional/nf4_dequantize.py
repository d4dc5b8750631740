"""`nf4_dequantize`: a 4-bit weight as a dense one."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import FLOATS, check_nf4
from peft_kernels.formats.nf4 import NF4Weight


def nf4_dequantize(q: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight: w = dtype(CODE[index] · absmax), one float32 product and one rounding.

    The same bits as bitsandbytes' `dequantize_4bit` where that computes its own formula (QLoRA, Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314). No gradient flows through it.

    Args:
        q: a weight, or some rows or columns of one.
        dtype: of the result; None takes q.dtype, that of what was quantised.

    Returns:
        A new contiguous tensor of shape q.shape on q's device.

    Raises:
        ValueError: the tensors of q do not fit each other.
        TypeError: q is no NF4Weight, one of its tensors is of another dtype than the format's, or dtype is not
            floating-point.
    """
    check_nf4("nf4_dequantize", "q", q)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"nf4_dequantize: dtype is {dtype}; expected a floating-point dtype")
    matrix = q if dtype is None else q._replace(dtype=dtype)
    weight = ops.nf4_dequantize.nf4_dequantize(matrix)
    return weight if weight.shape == q.shape else weight.view(q.shape)
