"""`sparse_linear`: a linear layer over a compressed, pruned weight."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_device, check_floating, check_same_dtype, check_shape, shape_text
from peft_kernels.formats.sparse import BlockWeight, Nf4BitmapWeight, SparseWeight

_OP = "sparse_linear"


def sparse_linear(x: Tensor, weight: SparseWeight, bias: Tensor | None = None) -> Tensor:
    """A linear layer that reads a weight in the form in which `formats.sparse.compress` left it.

    y = x Wᵀ + b,  dx = dY W,  and where block values train, dW of the kept blocks alone

    What is not kept takes no memory; whether it takes time depends on layout, density and device, and
    `explain("sparse_linear", x, weight)` says which way is taken: where a matmul on dense pieces of the weight is the
    faster one, that runs. No copy of the size of W is made in any case. Second derivatives raise RuntimeError.

    Args:
        x: [..., in_features], any strides, any number of rows; float32, float16, bfloat16 or float64.
        weight: [out_features, in_features] compressed, in x's dtype (under autocast in any: it is rounded piece by
            piece); of 4 bits in any. Frozen, but for a `BlockWeight` whose `values` [blocks, B, B] require a gradient:
            they get one of their shape, 0 in the padding of blocks at the edges.
        bias: [out_features] in the weight's dtype (over 4 bits in any), or None.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast, as `F.linear`).

    Raises:
        ValueError: a shape or device does not fit; the message names the argument, what it is and what it should be.
        TypeError: an argument is of the wrong type or dtype, or a tensor of a frozen layout requires a gradient.
    """
    check_floating(_OP, "x", x)
    if not isinstance(weight, SparseWeight):
        raise TypeError(
            f"{_OP}: weight is {type(weight).__name__}; expected what peft_kernels.formats.sparse.compress returns"
        )
    if x.ndim == 0:
        raise ValueError(f"{_OP}: x has no dimensions; expected (..., in_features)")
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(
            f"{_OP}: weight has shape {shape_text(weight.shape)}, but x has {x.shape[-1]} features; expected "
            f"(out_features, {x.shape[-1]})"
        )
    check_device(_OP, "weight", weight, x.device)
    four_bits = isinstance(weight, Nf4BitmapWeight)
    if not four_bits and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{_OP}: weight has dtype {weight.dtype}, but x has {x.dtype}; expected the same")
    if not isinstance(weight, BlockWeight) and any(tensor.requires_grad for tensor in weight.tensors):
        raise TypeError(f"{_OP}: weight of layout {weight.layout!r} is frozen, but a tensor of it requires a gradient")
    if bias is not None:
        check_floating(_OP, "bias", bias)
        check_shape(_OP, "bias", bias, (n,), f"weight has {n} output features")
        check_device(_OP, "bias", bias, x.device)
        if not four_bits:
            check_same_dtype(_OP, "bias", bias, weight.dtype, "weight")
    return ops.sparse_linear.sparse_linear(x, weight, bias)
