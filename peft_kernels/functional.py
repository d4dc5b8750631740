"""One documented function per op: checks shapes, dtypes and devices, then calls the op.

The checks come in two parts so that they cost about 2 µs: one boolean expression that is true of every valid
call, and a function that finds out what is wrong only when it was false.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import Parameter

from peft_kernels import ops
from peft_kernels.checks import (
    FLOATS,
    MAX_RANK,
    check_device,
    check_finite,
    check_floating,
    check_probability,
    check_rank,
    check_same_dtype,
    check_seed,
    check_shape,
)

__all__ = ["lora_linear", "philox_dropout", "splitk_reduce"]

_PLAIN = frozenset((Tensor, Parameter))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank update beside it, forward and backward in the fewest passes over memory.

    y = x Wᵀ + b + scaling · (drop(x) Aᵀ) Bᵀ

    Between forward and backward only x, the [..., r] product drop(x) Aᵀ and the seed are kept (LoRA, Hu et al. 2021,
    https://arxiv.org/abs/2106.09685, in the layout of Hugging Face PEFT). The dropout mask is recomputed from the seed
    (`philox_dropout`); dropout applies to the low-rank branch only. Second derivatives raise RuntimeError.

    Args:
        x: [..., in_features], any strides, any number of rows; float32, float16, bfloat16 or float64.
        weight: [out_features, in_features] in x's dtype; usually frozen.
        lora_A: [r, in_features], 1 <= r <= 512, in any of the dtypes above, also another than x's: it is cast to x's
            dtype for the products, and its gradient comes back in its own dtype.
        lora_B: [out_features, r] in lora_A's dtype.
        scaling: s, usually lora_alpha / r.
        bias: [out_features] in x's dtype, or None.
        dropout_p: the probability, in [0, 1], that an element of x is zeroed for the low-rank branch; kept ones are
            scaled by 1 / (1 - p). The probability is rounded to a multiple of 1/65536.
        training: no dropout when False.
        seed: an integer or an int64 tensor [1] on x's device that fixes the dropout mask. None draws one from torch's
            generator of that device, so that `torch.manual_seed` and activation checkpointing reproduce it. Not for
            DTensors (tensor parallel), whose masks `torch.nn.functional.dropout` draws.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast, as `F.linear`).

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument, what it is and what it
            should be.
        TypeError: an argument is of the wrong type or dtype.
    """
    if not _lora_linear_fits(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
        _explain_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p)
        scaling, dropout_p = scaling * 1.0, dropout_p * 1.0  # integers, fractions, symbolic numbers of torch.compile
    drop = training and dropout_p > 0
    if type(weight) not in _PLAIN and _is_dtensor(x, weight, lora_A, lora_B):
        if drop and seed is not None:
            raise ValueError("lora_linear: seed is given, but the tensors are DTensors, whose masks torch draws")
        return _lora_linear_on_dtensors(x, weight, lora_A, lora_B, scaling, bias, dropout_p if drop else 0.0)
    if not drop:
        return ops.lora_linear.lora_linear(x, weight, bias, lora_A, lora_B, scaling, 0.0, None)
    seed = _seed_tensor("lora_linear", seed, x.device)
    return ops.lora_linear.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def philox_dropout(x: Tensor, p: float, seed: int | Tensor | None = None) -> Tensor:
    """Dropout whose mask is a pure function of (seed, element), the same bits in every implementation.

    y[m, k] = x[m, k] / (1 - p) where lane(seed, m, k) >= round(65536 p), else 0, with the 16-bit lanes of Philox
    4x32-10 (Salmon et al., SC 2011; layout in `kernels/reference/philox_dropout.py`). Backward keeps only the seed.

    Args:
        x: [..., K]; m counts the rows of x flattened to two dimensions.
        p: probability, in [0, 1], that an element is zeroed.
        seed: integer, int64 tensor [1] on x's device, or None to draw one from torch's generator.

    Returns:
        A new contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: p is outside [0, 1], x has no dimension, or the seed's shape or device does not fit.
        TypeError: x is not a floating-point tensor or the seed is not an integer.
    """
    check_floating("philox_dropout", "x", x)
    if x.ndim == 0:
        raise ValueError("philox_dropout: x has no dimensions; expected (..., K)")
    check_probability("philox_dropout", "p", p)
    return ops.philox_dropout.philox_dropout(x, float(p), _seed_tensor("philox_dropout", seed, x.device))


def splitk_reduce(partials: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """Sums the partial results of a split reduction in a fixed order: the same bits run to run, with no atomics.

    y = dtype(scale · (((0 + partials[0]) + partials[1]) + ...)), summed in float32, rounded once.

    Args:
        partials: [P, ...] float32 (float64 on the reference), one partial result per split.
        scale: factor applied to the sum before the rounding.
        dtype: dtype of the result; None keeps that of `partials`.

    Returns:
        A new tensor of shape partials.shape[1:]; zeros when P = 0.

    Raises:
        ValueError: partials has no dimensions, or scale is not finite.
        TypeError: partials is not a floating-point tensor, or dtype is not floating-point.
    """
    check_floating("splitk_reduce", "partials", partials)
    if partials.ndim == 0:
        raise ValueError("splitk_reduce: partials has no dimensions; expected (P, ...)")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"splitk_reduce: dtype is {dtype}; expected a floating-point dtype")
    check_finite("splitk_reduce", "scale", scale)
    return ops.splitk_reduce.splitk_reduce(partials, float(scale), dtype or partials.dtype)


def _seed_tensor(op: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return ops.philox_dropout.new_seed(device)
    check_seed(op, seed, device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _lora_linear_fits(x, weight, lora_A, lora_B, scaling, bias, dropout_p) -> bool:
    try:
        n, k = weight.shape
        r, a_k = lora_A.shape
        dtype, device = x.dtype, x.device
        return (
            x.shape[-1] == k == a_k
            and lora_B.shape == (n, r)
            and 1 <= r <= MAX_RANK
            and dtype in FLOATS
            and (weight.dtype == dtype or torch.is_autocast_enabled(device.type))
            and lora_A.dtype in FLOATS
            and lora_A.dtype == lora_B.dtype
            and device == weight.device == lora_A.device == lora_B.device
            and (bias is None or (bias.shape == (n,) and bias.device == device and bias.dtype == weight.dtype))
            and type(scaling) is float
            and -math.inf < scaling < math.inf
            and type(dropout_p) is float
            and 0.0 <= dropout_p <= 1.0
        )
    except (AttributeError, ValueError, IndexError, TypeError):
        return False  # not a tensor, or not of two dimensions: the caller finds out which and says so


def _explain_lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p) -> None:
    """Raises for the first argument that does not fit. Returns when all do (integers given for floats)."""
    op = "lora_linear"
    tensors = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        check_floating(op, name, tensor)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no dimensions; expected (..., in_features)")
    k = x.shape[-1]
    check_shape(op, "weight", weight, ("out_features", k), f"x has {k} features")
    n = weight.shape[0]
    check_shape(op, "lora_A", lora_A, ("r", k), f"x has {k} features")
    r = lora_A.shape[0]
    check_rank(op, "r", r)
    check_shape(op, "lora_B", lora_B, (n, r), f"weight has {n} output features and lora_A rank {r}")
    if bias is not None:
        check_shape(op, "bias", bias, (n,), f"weight has {n} output features")
        check_same_dtype(op, "bias", bias, weight.dtype, "weight")
    for name, tensor in tensors.items():
        check_device(op, name, tensor, x.device)
    if not torch.is_autocast_enabled(x.device.type):
        check_same_dtype(op, "weight", weight, x.dtype, "x")
    check_same_dtype(op, "lora_B", lora_B, lora_A.dtype, "lora_A")
    check_finite(op, "scaling", scaling)
    check_probability(op, "dropout_p", dropout_p)


def _is_dtensor(*tensors: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def _lora_linear_on_dtensors(x, weight, lora_A, lora_B, scaling, bias, dropout_p) -> Tensor:
    """Sharded tensors (tensor parallel) take the formula in PyTorch's own ops, whose sharding rules DTensor knows."""
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    low_rank = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * low_rank
