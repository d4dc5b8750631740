"""What a linear LoRA layer of Hugging Face PEFT computes for a call: its operands, or why PEFT's own code has to run.

PEFT computes base(x) + s · B(A(drop(x))) by calling the layer's children. Reading the children's tensors instead is the
same only as long as calling them would do nothing else. That can change at any time (hooks, parallelism wrappers,
merging), so that `operands` looks at every call: cheap tests only, dictionaries read directly (`nn.Module.__getattr__`
costs ten times as much), and no text before a test has failed.
"""

# `parameters.get("weight", base.weight)` would look up the attribute also where it is not needed:
# ruff: noqa: SIM401

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant, MiCALinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels import functional
from peft_kernels.checks import MAX_RANK
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.integrations._peft_dora import dora_operands
from peft_kernels.integrations._peft_nf4 import input_of, output_for, quantised
from peft_kernels.integrations._peft_objections import (
    BASES,
    DROPOUTS,
    PLAIN,
    QUANTISED,
    dropout_probability,
    has_global_hook,
    hook_objection,
    in_transform,
    input_objection,
    surroundings_objection,
    tensor_objection,
    type_objection,
)

# Types of (base_layer, lora_A, lora_B, lora_dropout) whose calls do what `lora_linear` does. Exact ones: quantised
# layers, parametrised ones and those that FSDP2 wraps one by one are subclasses.
_FUSIBLE = frozenset(itertools.product(BASES, (nn.Linear,), (nn.Linear,), DROPOUTS))
_PLAIN_TRIPLES = frozenset(itertools.product(PLAIN, repeat=3))

DISABLED = "the adapters are disabled"
MERGED = "the adapter is merged into the base weight"
NOT_HERE = "no active adapter has weights in this layer"
NOT_IN_BATCH = "no adapter of the batch has weights in this layer"
# With these the base layer alone runs: nothing is lost, so that `strict` lets them pass at a call.
NOTHING_TO_FUSE = frozenset((DISABLED, MERGED, NOT_HERE, NOT_IN_BATCH))


class Several(NamedTuple):
    """Operands of a layer whose active adapters are added up: one entry of each sequence for each adapter."""

    weight: Tensor | NF4Weight
    bias: Tensor | None
    lora_As: tuple[Tensor, ...]
    lora_Bs: tuple[Tensor, ...]
    scalings: tuple[float, ...]
    dropout_ps: tuple[float, ...]

    def output(self, x: Tensor) -> Tensor:
        (y,) = functional.lora_linear_group(
            input_of(self.weight, x), (self.weight,), (self.lora_As,), (self.lora_Bs,), scalings=(self.scalings,),
            biases=(self.bias,), dropout_p=(self.dropout_ps,),
        )  # fmt: skip
        return output_for(x, self.weight, y)


class Activated(NamedTuple):
    """Operands of an activated LoRA (aLoRA): the rows where token_mask [...] is False see the base weight alone."""

    plain: tuple
    token_mask: Tensor | None

    def output(self, x: Tensor) -> Tensor:
        weight, bias, lora_A, lora_B, lora_bias, scaling, dropout_p = self.plain
        y = functional.lora_linear(
            input_of(weight, x), weight, lora_A, lora_B, scaling=scaling, bias=bias, lora_bias=lora_bias,
            dropout_p=dropout_p, token_mask=self.token_mask,
        )  # fmt: skip
        return output_for(x, weight, y)


def operands(layer: Any, x: Tensor | None, alora_offsets: Sequence[int | None] | None = None) -> Any:
    """What a call with x computes. x = None asks about the layer alone.

    Returns:
        (weight, bias, lora_A, lora_B, lora_bias, scaling, dropout_p), the arguments of `lora_linear`, for one plain
        adapter over a dense weight; an object with a method `output(x)` for everything else that can be fused; or a
        reason, as a string.
    """
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    adapters = layer._modules["lora_A"]._modules
    names = layer._active_adapter
    if type(names) is str:
        names = (names,)
    if len(names) != 1 or names[0] not in adapters:
        names = [name for name in names if name in adapters]
        if len(names) != 1:
            return _several(layer, x, names) if names else NOT_HERE
    name = names[0]
    if name in layer.lora_variant:
        return _variant(layer, x, name, alora_offsets)
    return single(layer, x, name)


def single(layer: Any, x: Tensor | None, name: str) -> tuple | str:
    """The operands with one adapter (`Quantised` over a 4-bit weight), whatever the others are."""
    children = layer._modules
    base, a, b = children["base_layer"], children["lora_A"]._modules[name], children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    if (type(base), type(a), type(b), type(dropout)) not in _FUSIBLE:
        return quantised(layer, x, name) if type(base) in QUANTISED else type_objection(base, a, b, dropout)
    for child in (base, a, b, dropout):
        state = child.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return hook_objection(base, a, b, dropout)
    if not layer.cast_input_dtype_enabled or has_global_hook() or in_transform():
        return surroundings_objection(layer)
    # What is not a parameter is an attribute: FSDP1, DataParallel and hypernetworks put the tensor of the moment there.
    parameters = base._parameters
    weight = parameters["weight"] if "weight" in parameters else base.weight
    bias = parameters["bias"] if "bias" in parameters else base.bias
    parameters = a._parameters
    lora_A = parameters["weight"] if "weight" in parameters else a.weight
    parameters = b._parameters
    lora_B = parameters["weight"] if "weight" in parameters else b.weight
    lora_bias = parameters["bias"] if "bias" in parameters else b.bias
    scaling, dtype = layer.scaling[name], weight.dtype
    if (
        (type(weight), type(lora_A), type(lora_B)) not in _PLAIN_TRIPLES
        or lora_A.dtype != lora_B.dtype
        or (bias is not None and bias.dtype != dtype)
        or (lora_bias is not None and (lora_bias.dtype != lora_B.dtype or type(lora_bias) not in PLAIN))
        or layer.r[name] > MAX_RANK
        or type(scaling) is not float
        or not -math.inf < scaling < math.inf
    ):
        return tensor_objection(weight, bias, lora_A, lora_B, lora_bias, scaling)
    if x is not None and (type(x) not in PLAIN or (x.dtype != dtype and not torch.is_autocast_enabled(x.device.type))):
        return input_objection(x, weight)
    dropout_p = dropout_probability(dropout)
    if isinstance(dropout_p, str):
        return dropout_p
    return weight.t() if type(base) is Conv1D else weight, bias, lora_A, lora_B, lora_bias, scaling, dropout_p


def _several(layer: Any, x: Tensor | None, names: list[str]) -> Several | str:
    adapters = []
    for name in names:
        if not is_plain_lora(layer.lora_variant.get(name)):
            kinds = sorted({type(layer.lora_variant[n]).__name__ for n in names if n in layer.lora_variant})
            return f"{len(names)} adapters are active at once, with LoRA variants among them ({', '.join(kinds)})"
        adapter = single(layer, x, name)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    weights, biases, lora_As, lora_Bs, lora_biases, scalings, dropout_ps = zip(*adapters, strict=True)
    if any(lora_A.dtype != lora_As[0].dtype for lora_A in lora_As):
        return f"the active adapters have several dtypes ({', '.join(sorted({str(a.dtype) for a in lora_As}))})"
    if any(lora_bias is not None for lora_bias in lora_biases):
        return f"{len(names)} adapters are active at once, some with a bias (lora_bias)"
    return Several(weights[0], biases[0], lora_As, lora_Bs, scalings, dropout_ps)


def _variant(layer: Any, x: Tensor | None, name: str, alora_offsets: Sequence[int | None] | None) -> Any:
    variant = layer.lora_variant[name]
    if is_plain_lora(variant):
        return single(layer, x, name)
    if type(variant) is DoraLinearVariant:
        return dora_operands(layer, x, single(layer, x, name), name)
    if type(variant) is ALoraLinearVariant:
        return _activated(single(layer, x, name), x, alora_offsets)
    return f"the adapter is a LoRA variant ({type(variant).__name__})"


def is_plain_lora(variant: object | None) -> bool:
    """MiCA differs from LoRA in its initial values and in what is frozen, not in what it computes."""
    return variant is None or type(variant) is MiCALinearVariant


def _activated(plain: tuple | str, x: Tensor | None, offsets: Sequence[int | None] | None) -> Activated | str:
    if isinstance(plain, str):
        return plain
    if x is None:
        return Activated(plain, None)
    if x.ndim not in (2, 3) or (offsets is not None and len(offsets) != x.shape[0]):
        return f"alora_offsets do not fit x, which has {x.ndim} dimensions"
    return Activated(plain, _last_tokens(x, offsets))


def _last_tokens(x: Tensor, offsets: Sequence[int | None] | None) -> Tensor:
    """A mask, [...] for x [..., K], of the last offsets[i] tokens of each row i (None: of no token), as PEFT's."""
    if offsets is None:
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    tokens = x.shape[1] if x.ndim == 3 else 1
    first = torch.tensor([tokens - min(int(offset or 0), tokens) for offset in offsets], device=x.device)
    mask = torch.arange(tokens, device=x.device) >= first.unsqueeze(1)
    return mask if x.ndim == 3 else mask.squeeze(1)
