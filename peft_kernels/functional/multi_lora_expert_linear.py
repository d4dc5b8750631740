"""`multi_lora_expert_linear`: a mixture of experts, whose rows choose their own low-rank updates."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_bias, check_device, check_floating, check_shape, check_weight
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.pool import PoolLayer
from peft_kernels.functional.lora_expert_linear import check_offsets
from peft_kernels.functional.multi_lora_linear import (
    Factors,
    adapter_choice,
    check_adapters,
    dropout_of,
    flatten_lists,
    refuse_dtensors,
)

_OP = "multi_lora_expert_linear"


def multi_lora_expert_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_As: Factors,
    lora_Bs: Factors,
    offsets: Tensor,
    adapter_ids: Tensor,
    *,
    scalings: float | Sequence[float | None],
    bias: Tensor | None = None,
    adapter_weights: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A stack of linear layers, each applied to its own rows of x (mixture of experts), every row with its own adapter.

    y[m] = x[m] W_eᵀ + b_e + Σ_i w[m, i] s_a (drop(x)[m] A_aeᵀ) B_aeᵀ,   a = adapter_ids[m, i]
    for offsets[e-1] <= m < offsets[e]

    As `lora_expert_linear` with the adapters of `multi_lora_linear`: of any ranks, where they are. Rows from the last
    offset on belong to no expert: y is 0 there. Deterministic; second derivatives raise RuntimeError.

    Args:
        x: [M, in_features], sorted by expert; float32, float16, bfloat16 or float64.
        weight: [experts, out_features, in_features] in x's dtype, or an `NF4Weight` of this shape.
        lora_As: A [experts, r_a, in_features] of each adapter a, 1 <= r_a <= 512, all in one dtype; None for an adapter
            that has nothing in this layer.
        lora_Bs: B [experts, out_features, r_a] of each adapter, in the dtype of the As.
        offsets: int32 [experts], ascending: the row after the last one of each expert (`torch._grouped_mm`'s `offs`).
        adapter_ids: int32 or int64 [M], or [M, k] with `adapter_weights`: which adapter each row of x runs, in
            [-1, number of adapters), -1 for none; checked as in `multi_lora_linear`.
        scalings: s_a, usually lora_alpha / r: one for all or one for each adapter.
        bias: [experts, out_features] in x's dtype (over an `NF4Weight` in any), or None.
        adapter_weights: w, floating point, [M, k], or None for one adapter per row with w = 1. It gets a gradient.
        dropout_p: probability, in [0, 1], that an element of x is zeroed for the adapters: one for all or one for each.
        training: no dropout when False.
        seed: as for `lora_linear`; the mask is that of `philox_dropout(x, p, seed)` whichever adapters run.

    Returns:
        y: [M, out_features] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape, length, device or number does not fit, or an id or an offset that the host reads is out of
            range; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
        NotImplementedError: sharded tensors (DTensor).
    """
    check_floating(_OP, "x", x)
    check_shape(_OP, "x", x, ("rows", "in_features"), "rows are sorted by expert")
    check_weight(_OP, "weight", weight, x, ("experts", "out_features", x.shape[1]), f"x has {x.shape[1]} features")
    if bias is not None:
        check_bias(_OP, "bias", bias, "weight", weight)
    if isinstance(lora_As, PoolLayer):
        raise TypeError(
            f"{_OP}: lora_As is a layer of an AdapterPool, which holds no stacks; expected a list of tensors"
        )
    layer_scalings = (scalings,) if isinstance(scalings, Sequence) else scalings
    stacks = flatten_lists(_OP, (weight,), (lora_As,), (lora_Bs,), layer_scalings)
    check_adapters(_OP, x, (weight,), stacks)
    check_offsets(_OP, offsets, weight.shape[0])
    check_device(_OP, "offsets", offsets, x.device)
    refuse_dtensors(_OP, x, weight, bias, *stacks.lora_As, *stacks.lora_Bs, offsets)
    ids, mix = adapter_choice(_OP, x, adapter_ids, adapter_weights, stacks.count)
    dropout_ps, seeds = dropout_of(_OP, dropout_p, training, seed, stacks.count, 1, x.device)
    return ops.multi_lora_expert_linear.multi_lora_expert_linear(
        x, weight, bias, stacks, offsets, ids, mix, dropout_ps, seeds
    )
