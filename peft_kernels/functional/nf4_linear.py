"""`nf4_linear`: a linear layer whose frozen weight stays in 4 bits."""

from __future__ import annotations

from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import FLOATS, check_bias, check_floating, check_nf4_matrix
from peft_kernels.formats.nf4 import NF4Weight

_OP = "nf4_linear"


def nf4_linear(x: Tensor, q: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose frozen weight is multiplied from its 4 bits, forward and backward.

    y = x Wᵀ + b with W = dtype(CODE[index] · absmax), rounded once to x's dtype: the same weights at every number of
    rows and in both directions, whatever dtype the weight had when it was quantised. No dense copy of W above 64 MiB is
    made, and none is kept for backward (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, in the format of
    bitsandbytes). W gets no gradient; second derivatives raise RuntimeError.

    Args:
        x: [..., in_features], any strides, any number of rows; float32, float16, bfloat16 or float64.
        q: [out_features, in_features], any sizes, also where in_features is no multiple of the blocksize.
        bias: [out_features] in any of these dtypes, or None; it is cast to x's.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast, as `F.linear`).

    Raises:
        ValueError: a shape or device does not fit; the message names the argument, what it is and what it should be.
        TypeError: an argument is of the wrong type or dtype.
    """
    check_floating(_OP, "x", x)
    check_nf4_matrix(_OP, "q", q, x)
    # Of a bias that fits no message is formed: under torch.compile sizes may be symbolic.
    if bias is not None and not (isinstance(bias, Tensor) and bias.dtype in FLOATS and bias.shape == q.shape[:1]
                                 and bias.device == x.device):  # fmt: skip
        check_bias(_OP, "bias", bias, "q", q)
    return ops.nf4_linear.nf4_linear(x, q, bias)
