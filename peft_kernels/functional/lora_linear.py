"""`lora_linear`: a linear layer with a low-rank update beside it.

The checks come in two parts so that they cost about 2 µs: one boolean expression that is true of every valid call,
and a function that finds out what is wrong only when it was false.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import Parameter

from peft_kernels import ops
from peft_kernels.checks import (
    FLOATS,
    MAX_RANK,
    check_bias,
    check_device,
    check_finite,
    check_floating,
    check_nf4,
    check_probability,
    check_rank,
    check_same_dtype,
    check_shape,
    check_weight,
)
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional.philox_dropout import seed_tensor

PLAIN = frozenset((Tensor, Parameter))


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    token_mask: Tensor | None = None,
) -> Tensor:
    """A linear layer with a low-rank update beside it, forward and backward in the fewest passes over memory.

    y = x Wᵀ + b + scaling · ((drop(x) Aᵀ) Bᵀ + lora_bias)

    Between forward and backward only x, the [..., r] product drop(x) Aᵀ and the seed are kept (LoRA, Hu et al. 2021,
    https://arxiv.org/abs/2106.09685, in the layout of Hugging Face PEFT). The dropout mask is recomputed from the seed
    (`philox_dropout`); dropout applies to the low-rank branch only. Second derivatives raise RuntimeError.

    Args:
        x: [..., in_features], any strides, any number of rows; float32, float16, bfloat16 or float64.
        weight: [out_features, in_features] in x's dtype, usually frozen; or an `NF4Weight`, always frozen (see
            `nf4_lora_linear`).
        lora_A: [r, in_features], 1 <= r <= 512, in any of the dtypes above, also another than x's: it is cast to x's
            dtype for the products, and its gradient comes back in its own dtype.
        lora_B: [out_features, r] in lora_A's dtype.
        scaling: s, usually lora_alpha / r.
        bias: [out_features] in x's dtype (over an `NF4Weight` in any), or None.
        lora_bias: [out_features] in lora_B's dtype, or None; scaling · lora_bias is added (PEFT's `lora_bias=True`).
        dropout_p: the probability, in [0, 1], that an element of x is zeroed for the low-rank branch; kept ones are
            scaled by 1 / (1 - p). The probability is rounded to a multiple of 1/65536.
        training: no dropout when False.
        seed: an integer or an int64 tensor [1] on x's device that fixes the dropout mask. None draws one from torch's
            generator of that device, so that `torch.manual_seed` and activation checkpointing reproduce it. Not for
            DTensors (tensor parallel), whose masks `torch.nn.functional.dropout` draws.
        token_mask: boolean, x's shape without its last dimension, or None. Where it is False the row gets no low-rank
            update (activated LoRA, Greenewald et al. 2025, https://arxiv.org/abs/2504.12397).

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast, as `F.linear`).

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument, what it is and what it
            should be.
        TypeError: an argument is of the wrong type or dtype.
    """
    dense = type(weight) in PLAIN
    if not dense and isinstance(weight, NF4Weight):
        return _over_nf4(x, weight, lora_A, lora_B, scaling, bias, lora_bias, dropout_p, training, seed, token_mask)
    if token_mask is not None:
        return _with_token_mask(
            x, weight, lora_A, lora_B, scaling, bias, lora_bias, dropout_p, training, seed, token_mask
        )
    if not lora_fits(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
        explain_lora("lora_linear", x, weight, lora_A, lora_B, scaling, bias, dropout_p)
        scaling, dropout_p = scaling * 1.0, dropout_p * 1.0  # integers, fractions, symbolic numbers of torch.compile
    if lora_bias is not None:
        bias = _joint_bias(weight, bias, lora_B, lora_bias, scaling)
    drop = training and dropout_p > 0
    if not dense and is_dtensor(x, weight, lora_A, lora_B):
        if drop and seed is not None:
            raise ValueError("lora_linear: seed is given, but the tensors are DTensors, whose masks torch draws")
        return lora_linear_on_dtensors(x, weight, lora_A, lora_B, scaling, bias, dropout_p if drop else 0.0)
    if not drop:
        return ops.lora_linear.lora_linear(x, weight, bias, lora_A, lora_B, scaling, 0.0, None)
    seed = seed_tensor("lora_linear", seed, x.device)
    return ops.lora_linear.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed)


def lora_fits(x, weight, lora_A, lora_B, scaling, bias, dropout_p) -> bool:
    """Whether the arguments that all LoRA linears have are valid: x [..., K], weight [N, K], A [r, K], B [N, r], a
    finite scaling, bias [N] or None, a probability. Cheap, and silent about what is not: `explain_lora` raises."""
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


def explain_lora(op: str, x, weight, lora_A, lora_B, scaling, bias, dropout_p, name: str = "weight") -> None:
    """Raises for the first argument that does not fit; `name` is what the op calls its weight. Returns when all do
    (integers given for floats)."""
    check_floating(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no dimensions; expected (..., in_features)")
    k = x.shape[-1]
    check_weight(op, name, weight, x, ("out_features", k), f"x has {k} features")
    n = weight.shape[0]
    check_floating(op, "lora_A", lora_A)
    check_shape(op, "lora_A", lora_A, ("r", k), f"x has {k} features")
    r = lora_A.shape[0]
    check_rank(op, "r", r)
    check_floating(op, "lora_B", lora_B)
    check_shape(op, "lora_B", lora_B, (n, r), f"{name} has {n} output features and lora_A rank {r}")
    check_same_dtype(op, "lora_B", lora_B, lora_A.dtype, "lora_A")
    for factor, tensor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_device(op, factor, tensor, x.device)
    if bias is not None:
        check_bias(op, "bias", bias, name, weight)
    check_finite(op, "scaling", scaling)
    check_probability(op, "dropout_p", dropout_p)


def check_lora_over_nf4(op: str, name: str, x, q, lora_A, lora_B, scaling, bias, dropout_p) -> None:
    """As `explain_lora` for a weight of 4 bits. Of what is valid no message is formed: under torch.compile sizes may be
    symbolic, and those cannot be part of one."""
    check_nf4(op, name, q)
    if not isinstance(x, Tensor) or not lora_fits(
        x, q._replace(dtype=x.dtype), lora_A, lora_B, scaling, bias, dropout_p
    ):
        explain_lora(op, x, q, lora_A, lora_B, scaling, bias, dropout_p, name)


def _joint_bias(weight, bias, lora_B, lora_bias, scaling) -> Tensor:
    """bias + scaling · lora_bias in at least float32: the op rounds it once, and its gradient comes back unrounded."""
    check_floating("lora_linear", "lora_bias", lora_bias)
    n = weight.shape[0]
    check_shape("lora_linear", "lora_bias", lora_bias, (n,), f"weight has {n} output features")
    check_same_dtype("lora_linear", "lora_bias", lora_bias, lora_B.dtype, "lora_B")
    check_device("lora_linear", "lora_bias", lora_bias, weight.device)
    shift = lora_bias.to(torch.promote_types(torch.float32, lora_bias.dtype))
    return scaling * shift if bias is None else torch.add(bias, shift, alpha=scaling)


def _over_nf4(
    x, q, lora_A, lora_B, scaling, bias, lora_bias, dropout_p, training, seed, token_mask
) -> Tensor:  # fmt: skip
    """By the op for weights of 4 bits. It is chosen here, so that callers need not know what a layer's weight is."""
    if token_mask is not None:
        return _with_token_mask(x, q, lora_A, lora_B, scaling, bias, lora_bias, dropout_p, training, seed, token_mask)
    check_lora_over_nf4("lora_linear", "weight", x, q, lora_A, lora_B, scaling, bias, dropout_p)
    if type(x) not in PLAIN and is_dtensor(x, lora_A, lora_B):
        dense_beside_dtensors("lora_linear", (q,))
    scaling, dropout_p = scaling * 1.0, dropout_p * 1.0 if training else 0.0
    if lora_bias is not None:
        bias = _joint_bias(q, bias, lora_B, lora_bias, scaling)
    seed = seed_tensor("lora_linear", seed, x.device) if dropout_p else None
    return ops.nf4_lora_linear.nf4_lora_linear(x, q, bias, lora_A, lora_B, scaling, dropout_p, seed)


def _with_token_mask(
    x, weight, lora_A, lora_B, scaling, bias, lora_bias, dropout_p, training, seed, token_mask
) -> Tensor:
    """By the op for groups, which knows of masks, so that a call without one stays lean."""
    from peft_kernels.functional.lora_linear_group import check_token_mask, lora_linear_group

    if isinstance(weight, NF4Weight) or not lora_fits(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
        explain_lora("lora_linear", x, weight, lora_A, lora_B, scaling, bias, dropout_p)
    check_token_mask("lora_linear", x, token_mask)
    if seed is not None and training and dropout_p > 0:
        seed = seed_tensor("lora_linear", seed, x.device)
    (y,) = lora_linear_group(
        x, (weight,), (lora_A,), (lora_B,), scalings=scaling, biases=(bias,), dropout_p=dropout_p, training=training,
        seed=seed, token_mask=token_mask,
    )  # fmt: skip
    if lora_bias is None:
        return y
    shift = _joint_bias(weight, None, lora_B, lora_bias, scaling)
    return y + torch.where(token_mask.unsqueeze(-1), shift.to(y.dtype), 0.0)


def is_dtensor(*tensors: Tensor | NF4Weight) -> bool:
    """Whether any is sharded. Imports `torch.distributed`: only for calls that plain tensors do not explain."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors)


def dense_beside_dtensors(op: str, weights: Sequence[Tensor | NF4Weight]) -> list[Tensor]:
    """The weights as they are; NotImplementedError for one in 4 bits, whose blocks a shard could cut."""
    dense = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(dense) < len(weights):
        raise NotImplementedError(f"{op}: DTensors are not supported over weights of 4 bits")
    return dense


def lora_linear_on_dtensors(x, weight, lora_A, lora_B, scaling, bias, dropout_p) -> Tensor:
    """Sharded tensors (tensor parallel) take the formula in PyTorch's own ops, whose sharding rules DTensor knows."""
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    low_rank = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * low_rank
