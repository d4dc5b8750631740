"""`lora_expert_linear`: the linear layers of a mixture of experts, each with a low-rank update."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import (
    check_bias,
    check_device,
    check_finite,
    check_floating,
    check_probability,
    check_rank,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_weight,
)
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional.philox_dropout import seed_tensor

_OP = "lora_expert_linear"


def lora_expert_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    offsets: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A stack of linear layers with low-rank updates, each applied to its own rows of x (mixture of experts).

    y[m] = x[m] W_eᵀ + b_e + scaling · (drop(x)[m] A_eᵀ) B_eᵀ for offsets[e-1] <= m < offsets[e]

    Nothing of the size of the weight stack is formed. Between forward and backward x, the products of rank r and the
    seed are kept. Rows from the last offset on belong to no expert: y is 0 there. Second derivatives raise
    RuntimeError.

    Args:
        x: [M, in_features], sorted by expert; float32, float16, bfloat16 or float64.
        weight: [experts, out_features, in_features] in x's dtype, or an `NF4Weight` of this shape, which gets no
            gradient and is rounded to x's dtype for the products, one expert at a time, as in `nf4_linear`.
        lora_A: [experts, r, in_features], 1 <= r <= 512, in any of these dtypes.
        lora_B: [experts, out_features, r] in lora_A's dtype.
        offsets: int32 [experts], ascending: the row after the last one of each expert (`torch._grouped_mm`'s `offs`).
            Implementations that let the host read them raise for wrong ones; on a GPU the Triton kernels do not look.
        scaling: s, usually lora_alpha / r.
        bias: [experts, out_features] in x's dtype (over an `NF4Weight` in any), or None.
        dropout_p: probability, in [0, 1], that an element of x is zeroed for the low-rank branch.
        training: no dropout when False.
        seed: as for `lora_linear`.

    Returns:
        y: [M, out_features] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
    """
    check_floating(_OP, "x", x)
    check_shape(_OP, "x", x, ("rows", "in_features"), "rows are sorted by expert")
    check_weight(_OP, "weight", weight, x, ("experts", "out_features", x.shape[1]), f"x has {x.shape[1]} features")
    e, n, k = weight.shape
    check_floating(_OP, "lora_A", lora_A)
    check_shape(_OP, "lora_A", lora_A, (e, "r", k), f"weight has {e} experts and {k} input features")
    r = lora_A.shape[1]
    check_rank(_OP, "r", r)
    check_floating(_OP, "lora_B", lora_B)
    check_shape(_OP, "lora_B", lora_B, (e, n, r), f"weight has {e} experts, {n} output features and lora_A rank {r}")
    check_same_dtype(_OP, "lora_B", lora_B, lora_A.dtype, "lora_A")
    if bias is not None:
        check_bias(_OP, "bias", bias, "weight", weight)
    check_offsets(_OP, offsets, e)
    for name, tensor in (("lora_A", lora_A), ("lora_B", lora_B), ("offsets", offsets)):
        check_device(_OP, name, tensor, x.device)
    check_finite(_OP, "scaling", scaling)
    check_probability(_OP, "dropout_p", dropout_p)
    p = dropout_p * 1.0 if training else 0.0
    seed = seed_tensor(_OP, seed, x.device) if p else None
    return ops.lora_expert_linear.lora_expert_linear(x, weight, bias, lora_A, lora_B, offsets, scaling * 1.0, p, seed)


def check_offsets(op: str, offsets: Tensor, experts: int) -> None:
    """Raises for all but int32 [E]: where the rows of each expert end. Their values, on a GPU maybe, are not read."""
    check_tensor(op, "offsets", offsets)
    if offsets.dtype != torch.int32:
        raise TypeError(f"{op}: offsets has dtype {offsets.dtype}; expected torch.int32")
    check_shape(op, "offsets", offsets, (experts,), f"weight has {experts} experts")
