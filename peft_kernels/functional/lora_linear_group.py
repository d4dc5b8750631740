"""`lora_linear_group`: linear layers that share one x (q/k/v, gate/up), and sums of several adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import (
    check_device,
    check_finite,
    check_floating,
    check_probability,
    check_rank,
    check_same_dtype,
    check_seed,
    check_shape,
    check_tensor,
    shape_text,
)
from peft_kernels.functional.lora_linear import is_dtensor, lora_linear_on_dtensors
from peft_kernels.ops.philox_dropout import new_seeds

_OP = "lora_linear_group"
Adapters = Sequence["Tensor | Sequence[Tensor] | None"]
Numbers = "float | Sequence[float | Sequence[float]]"


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
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
        weights: of each projection, [out_features_j, in_features] in x's dtype.
        lora_As: for each projection its A [r, in_features], None for a frozen projection, or a sequence of As, whose
            updates are added up. All adapters of a group have one dtype, any of the above.
        lora_Bs: in the same nesting, B [out_features_j, r] in the dtype of the As.
        scalings: one factor for all adapters, or one for each in the nesting of `lora_As` (None where there is no
            adapter).
        biases: [out_features_j] in x's dtype or None for each projection; None for no biases.
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
    count = len(weights)
    outputs, flat_As = flat_adapters(lora_As)
    outputs_of_b, flat_Bs = flat_adapters(lora_Bs)
    if outputs_of_b != outputs or len(lora_As) != count or len(lora_Bs) != count:
        raise ValueError(
            f"{_OP}: lora_As and lora_Bs do not have the same nesting for each of the {count} weights "
            f"({_nesting(outputs, lora_As)} and {_nesting(outputs_of_b, lora_Bs)} adapters)"
        )
    flat_biases = (None,) * count if biases is None else tuple(biases)
    if len(flat_biases) != count:
        raise ValueError(f"{_OP}: biases has {len(flat_biases)} entries for {count} weights")
    flat_scalings = _per_adapter("scalings", scalings, lora_As)
    dropout_ps = _per_adapter("dropout_p", dropout_p, lora_As)
    _check(x, weights, flat_biases, flat_As, flat_Bs, outputs, flat_scalings, dropout_ps, token_mask)
    if is_dtensor(x, *weights, *flat_As, *flat_Bs):
        return _on_dtensors(
            x, weights, flat_biases, flat_As, flat_Bs, outputs, flat_scalings,
            dropout_ps if training else [0.0] * len(flat_As), seed, token_mask,
        )  # fmt: skip
    seeds = None
    if training and any(dropout_ps):
        seeds = _seeds(seed, len(flat_As), x.device)
    else:
        dropout_ps = [0.0] * len(flat_As)
    return ops.lora_linear_group.lora_linear_group(
        x, list(weights), list(flat_biases), flat_As, flat_Bs, flat_scalings, outputs, dropout_ps, seeds, token_mask
    )


def flat_adapters(nested: Adapters) -> tuple[list[int], list[Tensor]]:
    """(index of its projection, tensor) of each adapter, as two lists."""
    outputs: list[int] = []
    tensors: list[Tensor] = []
    for j, entry in enumerate(nested):
        members = () if entry is None else (entry,) if isinstance(entry, Tensor) else entry
        outputs += [j] * len(members)
        tensors += members
    return outputs, tensors


def _nesting(outputs: list[int], nested: Adapters) -> str:
    return "/".join(str(outputs.count(j)) for j in range(len(nested))) or "no"


def _per_adapter(name: str, values: float | Sequence[Any], lora_As: Adapters) -> list[float]:
    """One float for each adapter, from one for all or from the nesting of lora_As."""
    if isinstance(values, Sequence):
        if len(values) != len(lora_As):
            raise ValueError(f"{_OP}: {name} has {len(values)} entries for {len(lora_As)} weights")
    else:
        values = [values] * len(lora_As)
    flat: list[float] = []
    for j, (value, entry) in enumerate(zip(values, lora_As, strict=True)):
        adapters = 0 if entry is None else 1 if isinstance(entry, Tensor) else len(entry)
        if isinstance(value, Sequence):
            if len(value) != adapters:
                raise ValueError(f"{_OP}: {name}[{j}] has {len(value)} entries for {adapters} adapters")
            flat += value
        else:
            flat += [value] * adapters
    check = check_finite if name == "scalings" else check_probability
    for value in flat:
        check(_OP, name, value)
    return [value * 1.0 for value in flat]


def _check(x, weights, biases, lora_As, lora_Bs, outputs, scalings, dropout_ps, token_mask) -> None:
    check_floating(_OP, "x", x)
    if x.ndim == 0:
        raise ValueError(f"{_OP}: x has no dimensions; expected (..., in_features)")
    if not weights:
        raise ValueError(f"{_OP}: weights is empty; expected at least one")
    k, autocast = x.shape[-1], torch.is_autocast_enabled(x.device.type)
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        name = f"weights[{j}]"
        check_floating(_OP, name, weight)
        check_shape(_OP, name, weight, ("out_features", k), f"x has {k} features")
        check_device(_OP, name, weight, x.device)
        if not autocast:
            check_same_dtype(_OP, name, weight, x.dtype, "x")
        if bias is not None:
            check_floating(_OP, f"biases[{j}]", bias)
            check_shape(_OP, f"biases[{j}]", bias, weight.shape[:1], f"{name} has {weight.shape[0]} output features")
            check_same_dtype(_OP, f"biases[{j}]", bias, weight.dtype, name)
            check_device(_OP, f"biases[{j}]", bias, x.device)
    for i, (a, b, j) in enumerate(zip(lora_As, lora_Bs, outputs, strict=True)):
        _check_adapter(x, weights[j], a, b, f"adapter {i} (of weights[{j}])", lora_As[0])
    if token_mask is not None:
        _check_token_mask(x, token_mask)


def _check_adapter(x, weight, a, b, whose, first) -> None:
    k, n = x.shape[-1], weight.shape[0]
    for name, tensor in ((f"A of {whose}", a), (f"B of {whose}", b)):
        check_floating(_OP, name, tensor)
        check_device(_OP, name, tensor, x.device)
    check_shape(_OP, f"A of {whose}", a, ("r", k), f"x has {k} features")
    r = a.shape[0]
    check_rank(_OP, "r", r)
    check_shape(_OP, f"B of {whose}", b, (n, r), f"the weight has {n} output features and A rank {r}")
    check_same_dtype(_OP, f"A of {whose}", a, first.dtype, "the first adapter")
    check_same_dtype(_OP, f"B of {whose}", b, a.dtype, "its A")


def _check_token_mask(x: Tensor, token_mask: Any) -> None:
    check_tensor(_OP, "token_mask", token_mask)
    if token_mask.dtype != torch.bool:
        raise TypeError(f"{_OP}: token_mask has dtype {token_mask.dtype}; expected torch.bool")
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(
            f"{_OP}: token_mask has shape {shape_text(token_mask.shape)}, but x has shape {shape_text(x.shape)}; "
            f"expected {shape_text(x.shape[:-1])}"
        )
    check_device(_OP, "token_mask", token_mask, x.device)


def _seeds(seed: int | Tensor | None, count: int, device: torch.device) -> Tensor:
    if seed is None:
        return new_seeds(device, count)
    if not isinstance(seed, Tensor):
        check_seed(_OP, seed, device)
        return torch.arange(seed, seed + count, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"{_OP}: seed has dtype {seed.dtype}; expected torch.int64")
    if seed.shape != (count,):
        raise ValueError(f"{_OP}: seed has shape {shape_text(seed.shape)}; expected ({count},), one for each adapter")
    check_device(_OP, "seed", seed, device)
    return seed


def _on_dtensors(
    x, weights, biases, lora_As, lora_Bs, outputs, scalings, dropout_ps, seed, token_mask
) -> tuple[Tensor, ...]:
    """Sharded tensors (tensor parallel): each projection in PyTorch's own ops, whose sharding rules DTensor knows."""
    if seed is not None and any(dropout_ps):
        raise ValueError(f"{_OP}: seed is given, but the tensors are DTensors, whose masks torch draws")
    if token_mask is not None or sorted(set(outputs)) != outputs:
        raise ValueError(f"{_OP}: token_mask and several adapters at once are not supported on DTensors")
    adapters = dict(zip(outputs, zip(lora_As, lora_Bs, scalings, dropout_ps, strict=True), strict=True))
    return tuple(
        lora_linear_on_dtensors(x, weight, *adapters[j][:2], adapters[j][2], bias, adapters[j][3])
        if j in adapters
        else torch.nn.functional.linear(x, weight, bias)
        for j, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    )
