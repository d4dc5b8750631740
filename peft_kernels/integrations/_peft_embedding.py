"""PEFT's `lora.Embedding` with a `forward` that computes the whole layer at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding
from peft.tuners.lora.variants import MiCAEmbeddingVariant
from torch import Tensor, nn

from peft_kernels import functional
from peft_kernels.checks import MAX_RANK
from peft_kernels.integrations._peft_linear import Site, arguments_objection, record
from peft_kernels.integrations._peft_objections import (
    PLAIN,
    full_name,
    has_global_hook,
    has_hooks,
    in_transform,
    surroundings_objection,
)
from peft_kernels.integrations._peft_operands import DISABLED, MERGED, NOT_HERE
from peft_kernels.integrations.report import Calls


class FusedPeftEmbedding(Embedding):
    """PEFT's `lora.Embedding` with a `forward` that calls `functional.lora_embedding` where that computes the same.

    Made by `accelerate`, which changes the class of an existing layer; all state is PEFT's own.
    """

    _peft_kernels = Site("a layer", Calls())

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As PEFT's: indices x [...] to [..., embedding_dim]. What has no meaning here goes to PEFT's own code."""
        found = arguments_objection(args, kwargs) or embedding_operands(self, x)
        if isinstance(found, str):
            record(self, found)
            return Embedding.forward(self, x, *args, **kwargs)
        weight, lora_A, lora_B, scaling, padding_idx = found
        return functional.lora_embedding(x, weight, lora_A, lora_B, scaling=scaling, padding_idx=padding_idx)

    def _get_name(self) -> str:
        return "Embedding"


def embedding_operands(layer: Any, x: Tensor | None) -> tuple | str:
    """The arguments of `lora_embedding` for a call with x, or why PEFT's own code has to run. x = None asks about the
    layer alone."""
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    names = [name for name in layer.active_adapters if name in layer.lora_embedding_A]
    if len(names) != 1:
        return f"{len(names)} adapters of an embedding are active at once" if names else NOT_HERE
    name = names[0]
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not MiCAEmbeddingVariant:  # which differs in what is frozen only
        return f"the adapter is a LoRA variant ({type(variant).__name__})"
    base = layer.base_layer
    reason = base_objection(base) or _hook_objection(layer, name)
    if reason is not None:
        return reason
    weight, lora_A, lora_B = base.weight, layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    scaling = layer.scaling[name]
    return _tensor_objection(weight, lora_A, lora_B, scaling, x) or (weight, lora_A, lora_B, scaling, base.padding_idx)


def base_objection(base: nn.Module) -> str | None:
    """Why the table of an embedding is not just a table."""
    if type(base) is not nn.Embedding:
        return f"the base layer is a {full_name(base)}, not exactly torch.nn.Embedding"
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(base, option):
            return f"the base layer has {option}={getattr(base, option)}"
    return None


def _hook_objection(layer: Any, name: str) -> str | None:
    if has_hooks(layer.base_layer):
        return "base_layer has hooks, or its forward is replaced"
    if name in layer.input_fns or name in layer.output_fns:
        return "the embedding is split (tensor parallel)"
    if has_global_hook() or in_transform():
        return surroundings_objection(layer)
    return None


def _tensor_objection(weight, lora_A, lora_B, scaling, x: Tensor | None) -> str | None:
    for tensor in (weight, lora_A, lora_B):
        if type(tensor) not in PLAIN:
            return f"a weight is a {full_name(tensor)}, not a plain tensor"
    if lora_A.dtype != lora_B.dtype:
        return f"lora_embedding_A is {lora_A.dtype}, lora_embedding_B {lora_B.dtype}"
    if lora_A.shape[0] > MAX_RANK:
        return f"the rank is above {MAX_RANK}"
    if type(scaling) is not float or not -math.inf < scaling < math.inf:
        return f"scaling is {scaling}"
    if x is not None and (type(x) not in PLAIN or x.dtype not in (torch.int32, torch.int64)):
        return f"x is a {full_name(x)} of {x.dtype}"
    return None
