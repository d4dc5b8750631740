"""`sparse_delta_linear`: a linear layer of which chosen weights train."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_bias, check_device, check_floating, check_same_dtype, check_shape, check_weight
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import Positions
from peft_kernels.formats.sparse_delta import SparseDelta, prepare
from peft_kernels.functional.multi_lora_linear import adapter_choice

_OP = "sparse_delta_linear"

Indices = Positions | Tensor


def sparse_delta_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    indices: Indices | Sequence[Indices],
    values: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    delta_ids: Tensor | None = None,
) -> Tensor:
    """A linear layer whose weight is changed at chosen places, forward and backward, without a copy of the weight.

    y = x (W + Δ)ᵀ + b,  Δ.flat[indices] = values;  dx = dY (W + Δ),  dvalues = (dYᵀ x).flat[indices]

    What diff pruning (Guo et al. 2020, https://arxiv.org/abs/2012.07463), SHiRA (Bhardwaj et al. 2024,
    https://arxiv.org/abs/2406.13175) and sparse fine-tuning train. Optimisers see `values` alone, so gradient and state
    are as small as the choice. W + Δ is added in at least float32 and rounded once to x's dtype (float32 on a CPU: not
    at all). Between forward and backward x is kept where values or W train, and nothing else. Non-finite values are
    computed with as they are. Second derivatives raise RuntimeError.

    Args:
        x: [..., in_features], any strides, any number of rows; float32, float16, bfloat16 or float64.
        weight: [out_features, in_features] in x's dtype (under autocast in any: the pieces of W + Δ are rounded); or an
            `NF4Weight`, which is frozen. A dense weight gets its own gradient dYᵀ x where it requires one.
        indices: which weights. `Positions` are read as they are: `formats.sparse_delta.prepare` makes them once. A
            tensor of int32 or int64, [nnz] of row · in_features + column or [2, nnz] of rows and columns, in any order,
            is checked and sorted at each call, which waits for the device: the slow way. A place that occurs twice is
            refused.
        values: [nnz], what is added there; any floating-point dtype (float32 over 16 bits is usual), which its gradient
            has too.
        bias: [out_features] in the weight's dtype (over an `NF4Weight` in any), or None.
        delta_ids: None for one delta. Else `indices` and `values` are sequences, one entry for each delta, all values
            in one dtype, and each row takes its own: int32 or int64, one per row, in the shape of x without its last
            dimension, or one per sample, [x.shape[0]]; -1 for W alone. On a CPU the range is checked; on a GPU only
            where PEFT_KERNELS_CHECK_IDS=1, and ids outside count as -1.

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast, as `F.linear`).

    Raises:
        ValueError: a shape or device does not fit, a place is outside the matrix or occurs twice, or an id is out of
            range; the message names the argument, what it is and what it should be.
        TypeError: an argument is of the wrong type or dtype.
    """
    check_floating(_OP, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{_OP}: x has no dimensions; expected (..., in_features)")
    features = x.shape[-1]
    check_weight(_OP, "weight", weight, x, ("out_features", features), f"x has {features} features")
    if bias is not None:
        check_bias(_OP, "bias", bias, "weight", weight)
    deltas = deltas_of(weight, indices, values, delta_ids is not None)
    ids = None
    if delta_ids is not None:
        ids = adapter_choice(_OP, x, delta_ids, None, len(deltas), "delta_ids")[0].squeeze(1)
    return ops.sparse_delta_linear.sparse_delta_linear(x, weight, deltas, ids, bias)


def deltas_of(weight: Tensor | NF4Weight, indices, values, several: bool) -> list[SparseDelta]:
    """The checked deltas, each with its places in order.

    Raises:
        TypeError, ValueError: as `sparse_delta_linear`.
    """
    if not several:
        return [_delta("", weight, indices, values)]
    for name, given in (("indices", indices), ("values", values)):
        if isinstance(given, (Tensor, Positions)) or not isinstance(given, Sequence):
            raise TypeError(
                f"{_OP}: {name} is {type(given).__name__}; expected a sequence with delta_ids, one entry for each delta"
            )
    if len(indices) != len(values):
        raise ValueError(f"{_OP}: indices has {len(indices)} entries and values {len(values)}; expected as many")
    deltas = [_delta(f"[{i}]", weight, *pair) for i, pair in enumerate(zip(indices, values, strict=True))]
    for i, delta in enumerate(deltas):
        check_same_dtype(_OP, f"values[{i}]", delta.values, deltas[0].values.dtype, "values[0]")
    return deltas


def _delta(entry: str, weight: Tensor | NF4Weight, indices: Indices, values: Tensor) -> SparseDelta:
    check_floating(_OP, f"values{entry}", values)
    order = None
    if isinstance(indices, Positions):
        check_shape(_OP, f"indices{entry}", indices, tuple(weight.shape), "it has the places of weight")
    elif isinstance(indices, Tensor):
        try:
            indices, order = prepare(indices, weight.shape)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{_OP}: indices{entry}: {error}") from None
    else:
        raise TypeError(f"{_OP}: indices{entry} is {type(indices).__name__}; expected Positions or a tensor")
    check_device(_OP, f"indices{entry}", indices, weight.device)
    check_device(_OP, f"values{entry}", values, weight.device)
    count = indices.flat.numel()
    check_shape(_OP, f"values{entry}", values, (count,), f"indices{entry} has {count} places")
    return SparseDelta(indices, values if order is None else torch.index_select(values, 0, order))
