"""`lora_linear_group`: linear layers that share one x (q/k/v, gate/up), and sums of several adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
    check_seed,
    check_shape,
    check_tensor,
    check_weight,
    shape_text,
)
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional.lora_linear import PLAIN, dense_beside_dtensors, is_dtensor, lora_linear_on_dtensors
from peft_kernels.ops._weights import split
from peft_kernels.ops.philox_dropout import new_seeds

_OP = "lora_linear_group"
Adapters = Sequence["Tensor | Sequence[Tensor] | None"]


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_As: Adapters,
    lora_Bs: Adapters,
    *,
    scalings: float | Sequence[Any],
    biases: Sequence[Tensor | None] | None = None,
    dropout_p: float | Sequence[Any] = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Several linear layers over one x, such as q/k/v or gate/up, each with the sum of its low-rank updates.

    y_j = x W_jᵀ + b_j + Σ_i s_i (drop_i(x) A_iᵀ) B_iᵀ, summed over the adapters i of projection j

    One pass over x serves all down-projections and one all gradients of A; the ranks of all adapters are concatenated,
    and x is kept for backward once. Widths and ranks may differ (grouped-query attention), projections may have no
    adapter, one, or several at once. Second derivatives raise RuntimeError.

    Args:
        x: [..., in_features]; float32, float16, bfloat16 or float64, any strides.
        weights: of each projection, [out_features_j, in_features] in x's dtype, or an `NF4Weight` (also beside dense
            ones), which gets no gradient and is rounded to x's dtype for the products, as in `nf4_linear`.
        lora_As: for each projection its A [r, in_features], None for a frozen projection, or a sequence of As, whose
            updates are added up. All adapters of a group have one dtype, any of the above.
        lora_Bs: in the same nesting, B [out_features_j, r] in the dtype of the As.
        scalings: one factor for all adapters, or one for each in the nesting of `lora_As` (None where there is no
            adapter).
        biases: [out_features_j] in x's dtype (over an `NF4Weight` in any) or None for each projection; None for no
            biases.
        dropout_p: probability, in [0, 1], that an element of x is zeroed for an adapter: one for all or one for each
            adapter, in the nesting of `lora_As`. Each adapter draws its own mask, as in Hugging Face PEFT.
        training: no dropout when False.
        seed: an integer s, with which adapter i (counted through all projections) takes the mask of
            `philox_dropout(x, p, seed=s + i)`; an int64 tensor [number of adapters]; or None to draw from torch's
            generator.
        token_mask: boolean, x's shape without its last dimension, or None. Rows where it is False get no update.

    Returns:
        A tuple with y_j [..., out_features_j] for each projection, in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape, length, device or number does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
    """
    if not weights:
        raise ValueError(f"{_OP}: weights is empty; expected at least one")
    group = flatten_group(_OP, weights, lora_As, lora_Bs, scalings, biases, dropout_p)
    if token_mask is not None:
        check_input(_OP, x)
        check_token_mask(_OP, x, token_mask)
    signature = _signature(x, group)
    if signature is None or signature not in _verified:
        check_input(_OP, x)
        check_group(_OP, x, x.shape[-1], group)
        _remember(signature)
    if signature is None and is_dtensor(x, *weights, *group.lora_As, *group.lora_Bs):
        return _on_dtensors(x, group, training, seed, token_mask)
    dropout_ps, seeds = seeds_tensor(_OP, group, training, seed, x.device)
    return ops.lora_linear_group.lora_linear_group(
        x, group.weights, group.biases, group.lora_As, group.lora_Bs, group.scalings, group.outputs, dropout_ps, seeds,
        token_mask,
    )  # fmt: skip


# Signatures of calls whose arguments were found valid: checking three projections anew takes as long as tiny matmuls.
_verified: set[tuple] = set()


def _signature(x: Tensor, group: Group) -> tuple | None:
    """Everything that `check_group` looks at, or None where a check by itself is due (subclasses, tracing)."""
    firsts, others, layouts = split(group.weights)
    tensors = (x, *firsts, *group.lora_As, *group.lora_Bs, *others)
    biases = group.biases
    if torch.compiler.is_compiling() or not all(type(t) in PLAIN for t in tensors):
        return None
    if not all(bias is None or type(bias) in PLAIN for bias in biases):
        return None
    properties: list[Any] = [(t.shape, t.dtype, t.device) for t in tensors[1:]]
    properties += [None if bias is None else (bias.shape, bias.dtype, bias.device) for bias in biases]
    if layouts:
        properties += [*layouts, *(weight.shape for weight in group.weights)]
        properties += [t.is_contiguous() for t in (*firsts, *others)]
    autocast = torch.is_autocast_enabled(x.device.type)
    return (x.shape[-1:], x.dtype, x.device, autocast, *group.outputs, *properties)


def _remember(signature: tuple | None) -> None:
    """Calls of this signature need no checks any more; the least that bounds the memory is to forget all of them."""
    if signature is not None:
        if len(_verified) >= 4096:
            _verified.clear()
        _verified.add(signature)


class Group(NamedTuple):
    """The arguments with one entry per projection (weights, biases) or per adapter (the others)."""

    weights: list[Tensor | NF4Weight]
    biases: list[Tensor | None]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    scalings: list[float]
    outputs: list[int]
    dropout_ps: list[float]


def flatten_group(op, weights, lora_As, lora_Bs, scalings, biases, dropout_p) -> Group:
    """The nested arguments, flat.

    Raises:
        ValueError: lengths or nestings do not fit, or a number is out of range.
        TypeError: a number is none.
    """
    count = len(weights)
    if count == 0:
        raise ValueError(f"{op}: weights is empty; expected at least one")
    outputs, flat_As = flat_adapters(lora_As)
    outputs_of_b, flat_Bs = flat_adapters(lora_Bs)
    if outputs_of_b != outputs or len(lora_As) != count or len(lora_Bs) != count:
        raise ValueError(
            f"{op}: lora_As has {_nesting(outputs, lora_As)} and lora_Bs {_nesting(outputs_of_b, lora_Bs)} adapters; "
            f"expected the same for each of the {count} weights"
        )
    flat_biases = [None] * count if biases is None else list(biases)
    if len(flat_biases) != count:
        raise ValueError(f"{op}: biases has {len(flat_biases)} entries; expected one for each of the {count} weights")
    flat_scalings = _per_adapter(op, "scalings", scalings, lora_As, len(outputs))
    dropout_ps = _per_adapter(op, "dropout_p", dropout_p, lora_As, len(outputs))
    return Group(list(weights), flat_biases, flat_As, flat_Bs, flat_scalings, outputs, dropout_ps)


def flat_adapters(nested: Adapters) -> tuple[list[int], list[Tensor]]:
    """Two lists with an entry for each adapter: the index of its projection, and its tensor. An entry of `nested` is
    one tensor, several, or None where the projection has no adapter; the order is theirs."""
    outputs: list[int] = []
    tensors: list[Tensor] = []
    for j, entry in enumerate(nested):
        if isinstance(entry, Tensor):
            outputs.append(j)
            tensors.append(entry)
        elif entry is not None:
            outputs += [j] * len(entry)
            tensors += entry
    return outputs, tensors


def _nesting(outputs: list[int], nested: Adapters) -> str:
    """How many adapters each projection has, such as "1/0/2", for messages."""
    return "/".join(str(outputs.count(j)) for j in range(len(nested))) or "no"


def _per_adapter(op: str, name: str, values: float | Sequence[Any], lora_As: Adapters, adapters: int) -> list[float]:
    """One float for each adapter, from one for all or from the nesting of lora_As."""
    check = check_finite if name == "scalings" else check_probability
    if type(values) is float or not isinstance(values, Sequence):  # the first test is the cheaper one
        check(op, name, values)
        return [values * 1.0] * adapters
    if len(values) != len(lora_As):
        raise ValueError(f"{op}: {name} has {len(values)} entries; expected one for each of the {len(lora_As)} weights")
    flat: list[float] = []
    for j, (value, entry) in enumerate(zip(values, lora_As, strict=True)):
        members = 0 if entry is None else 1 if isinstance(entry, Tensor) else len(entry)
        if type(value) is not float and isinstance(value, Sequence):
            if len(value) != members:
                raise ValueError(
                    f"{op}: {name}[{j}] has {len(value)} entries; expected one for each of {members} adapters"
                )
            flat += value
        else:
            flat += [value] * members
    for value in flat:
        check(op, name, value)
    return [value * 1.0 for value in flat]


def check_input(op: str, x: Tensor) -> None:
    """Raises for an x that is no floating-point tensor [..., K]."""
    check_floating(op, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no dimensions; expected (..., in_features)")


def check_group(op: str, x: Tensor, in_features: int, group: Group, projections: range | None = None) -> None:
    """Raises for the first tensor that does not fit x's dtype and device or `in_features`.

    Args:
        projections: the indices of the projections that read this input; None means all.
    """
    chosen = range(len(group.weights)) if projections is None else projections
    for j in chosen:
        name, weight, bias = f"weights[{j}]", group.weights[j], group.biases[j]
        check_weight(op, name, weight, x, ("out_features", in_features), f"its input has {in_features} features")
        if bias is not None:
            check_bias(op, f"biases[{j}]", bias, name, weight)
    for i, j in enumerate(group.outputs):
        if j in chosen:
            _check_adapter(op, x, group, i, in_features)


def _check_adapter(op: str, x: Tensor, group: Group, i: int, k: int) -> None:
    """Raises unless adapter i is A [r, k] and B [N, r] on x's device, in the dtype that all adapters have."""
    a, b, n = group.lora_As[i], group.lora_Bs[i], group.weights[group.outputs[i]].shape[0]
    whose = f"adapter {i} (of weights[{group.outputs[i]}])"
    for name, tensor in ((f"A of {whose}", a), (f"B of {whose}", b)):
        check_floating(op, name, tensor)
        check_device(op, name, tensor, x.device)
    check_shape(op, f"A of {whose}", a, ("r", k), f"its input has {k} features")
    r = a.shape[0]
    check_rank(op, "r", r)
    check_shape(op, f"B of {whose}", b, (n, r), f"the weight has {n} output features and A rank {r}")
    check_same_dtype(op, f"A of {whose}", a, group.lora_As[0].dtype, "the first adapter")
    check_same_dtype(op, f"B of {whose}", b, a.dtype, "its A")


def check_token_mask(op: str, x: Tensor, token_mask: Any) -> None:
    """Raises for what is not bool [...] on x's device, for x [..., K]."""
    check_tensor(op, "token_mask", token_mask)
    if token_mask.dtype != torch.bool:
        raise TypeError(f"{op}: token_mask has dtype {token_mask.dtype}; expected torch.bool")
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: token_mask has shape {shape_text(token_mask.shape)}, but x has shape {shape_text(x.shape)}; "
            f"expected {shape_text(x.shape[:-1])}"
        )
    check_device(op, "token_mask", token_mask, x.device)


def seeds_tensor(
    op: str, group: Group, training: bool, seed: int | Tensor | None, device: torch.device
) -> tuple[list[float], Tensor | None]:
    """(probability of each adapter, their seeds as int64 [adapters]); zeros and None where nothing is dropped. From a
    number on adapters have successive seeds, of a tensor an entry each; raises for another dtype or shape."""
    count = len(group.outputs)
    if not training or not any(group.dropout_ps):
        return [0.0] * count, None
    if seed is None:
        return group.dropout_ps, new_seeds(device, count)
    if not isinstance(seed, Tensor):
        check_seed(op, seed, device)
        return group.dropout_ps, torch.arange(seed, seed + count, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"{op}: seed has dtype {seed.dtype}; expected torch.int64")
    if seed.shape != (count,):
        raise ValueError(f"{op}: seed has shape {shape_text(seed.shape)}; expected ({count},), one for each adapter")
    check_device(op, "seed", seed, device)
    return group.dropout_ps, seed


def _on_dtensors(x, group: Group, training, seed, token_mask) -> tuple[Tensor, ...]:
    """Sharded tensors (tensor parallel): each projection in PyTorch's own ops, whose sharding rules DTensor knows."""
    if seed is not None and training and any(group.dropout_ps):
        raise ValueError(f"{_OP}: seed is given, but the tensors are DTensors, whose masks torch draws")
    if token_mask is not None or sorted(set(group.outputs)) != group.outputs:
        raise ValueError(f"{_OP}: token_mask and several adapters at once are not supported on DTensors")
    weights, ys = dense_beside_dtensors(_OP, group.weights), []
    for j, (weight, bias) in enumerate(zip(weights, group.biases, strict=True)):
        if j in group.outputs:
            i = group.outputs.index(j)
            p = group.dropout_ps[i] if training else 0.0
            y = lora_linear_on_dtensors(x, weight, group.lora_As[i], group.lora_Bs[i], group.scalings[i], bias, p)
        else:
            y = F.linear(x, weight, bias)
        ys.append(y)
    return tuple(ys)
