"""`accelerate` and `restore` for Hugging Face PEFT's LoRA layers, by changing their class in place.

`_peft_operands.py` says what a layer computes (`_peft_nf4.py` over 4-bit weights), `_peft_linear.py` and
`_peft_embedding.py` are the layers, `_peft_multi.py` batches whose samples name their adapters, `_peft_groups.py`
computes layers that share their input together, `_peft_mlp.py` whole feed-forward blocks.
"""

from __future__ import annotations

import logging
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.lora.layer import Embedding, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_kernels import parity
from peft_kernels.integrations._peft_embedding import FusedPeftEmbedding, base_objection, embedding_operands
from peft_kernels.integrations._peft_groups import form
from peft_kernels.integrations._peft_linear import LINEARS, Site
from peft_kernels.integrations._peft_linear import FusedPeftLinear as FusedPeftLinear
from peft_kernels.integrations._peft_mlp import fuse_mlps, restore_mlps
from peft_kernels.integrations._peft_multi import fuse_tuners, restore_tuners
from peft_kernels.integrations._peft_objections import BASES, QUANTISED, full_name, is_fsdp, type_objection
from peft_kernels.integrations._peft_operands import operands
from peft_kernels.integrations.report import Block, Calls, Report, Row

logger = logging.getLogger("peft_kernels")

PLAIN: dict[type, Any] = {**LINEARS, FusedPeftEmbedding: Embedding}
FUSED: dict[type, Any] = {plain: fused for fused, plain in PLAIN.items()}


def accelerate(model: nn.Module, *, strict: bool = False, groups: bool = True) -> Report:
    """See `peft_kernels.accelerate`."""
    layers = _tuner_layers(model, "accelerate")
    sharded = any(map(is_fsdp, model.modules()))
    reasons = {name: _objection(layer, sharded) for name, layer in layers.items()}
    calls = Calls(strict)
    report = Report(tuple(Row(name, reason is None, reason or "") for name, reason in reasons.items()), calls)
    if not layers:
        raise RuntimeError("accelerate: the model has no PEFT layers; make them with peft.get_peft_model first")
    if not report.fused:
        raise RuntimeError(f"accelerate: no layer can be fused; the model is unchanged\n{report}")
    if strict and report.skipped:
        raise RuntimeError(
            f"accelerate: not every layer can be fused, and strict=True; the model is unchanged\n{report}"
        )
    for reason, names in report.reasons.items():
        logger.warning("%d layers run PEFT's own code: %s (first: %s)", len(names), reason, names[0])
        calls.fallbacks[reason] = Counter()
    if not groups:
        restore_mlps(model)
    for name, layer in layers.items():
        if _lasting_objection(layer) is None:
            if type(layer) in FUSED:
                layer.__class__ = FUSED[type(layer)]
            layer._peft_kernels = Site(name, calls)
            layer.__dict__.pop("_peft_kernels_place", None)
    fuse_tuners(model)
    return replace(report, blocks=_together(model, calls) if groups else ())


def _together(model: nn.Module, calls: Calls) -> tuple[Block, ...]:
    """What is computed in one: whole feed-forward blocks, and elsewhere the layers that share an input. The latter are
    prepared in feed-forward blocks as well, for calls that need the block's own forward."""
    groups, mlps = form(model, LINEARS, calls), fuse_mlps(model)
    whole = {block.module for block in mlps}
    return (*(block for block in groups if block.module not in whole), *mlps)


def restore(model: nn.Module) -> int:
    """See `peft_kernels.restore`."""
    found = _tuner_layers(model, "restore")
    layers: dict[str, Any] = {n: layer for n, layer in found.items() if isinstance(layer, tuple(PLAIN))}
    for name, layer in layers.items():
        if type(layer) not in PLAIN:
            raise RuntimeError(
                f"restore: {name} has become a {full_name(layer)} since; restore before fully_shard or the like. "
                "The model is unchanged"
            )
    restore_mlps(model)
    restore_tuners(model)
    for layer in layers.values():
        fused, plain = type(layer), PLAIN[type(layer)]
        layer.__class__ = plain
        for name in ("_peft_kernels", "_peft_kernels_place", "_peft_kernels_norms", "_peft_kernels_stored"):
            layer.__dict__.pop(name, None)
        # accelerate's hooks keep the method that they replaced.
        old = layer.__dict__.get("_old_forward")
        if getattr(old, "__func__", None) is fused.forward:
            layer._old_forward = types.MethodType(plain.forward, layer)
    return len(layers)


def _tuner_layers(model: nn.Module, who: str) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is {type(model).__name__}; expected a torch.nn.Module")
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _lasting_objection(layer: Any) -> str | None:
    """Why a layer can never be fused, whatever its state."""
    if not isinstance(layer, tuple(PLAIN)):  # also of the subclass that FSDP2 makes of it
        if type(layer) not in FUSED:
            name = full_name(layer).removeprefix("peft.tuners.")
            if isinstance(layer, ParamWrapper):
                return f"the layer is a {name} (target_parameters), whose module reads W + s B A itself"
            when = "; call accelerate before fully_shard" if is_fsdp(layer) else ""
            return f"the layer is a {name}, not exactly PEFT's lora.Linear, lora.bnb.Linear4bit or lora.Embedding{when}"
        if "forward" in layer.__dict__:
            return "the forward of the layer is replaced; call accelerate before whatever replaces it"
    if isinstance(layer, Embedding):
        return base_objection(layer.base_layer)
    if type(layer.base_layer) not in (*BASES, *QUANTISED):
        return type_objection(layer.base_layer, None, None, None)
    return None


def _objection(layer: Any, sharded: bool) -> str | None:
    """Why a layer would not run fused as it is now."""
    reason = _lasting_objection(layer)
    if reason is None:
        found = embedding_operands(layer, None) if isinstance(layer, Embedding) else operands(layer, None)
        reason = found if isinstance(found, str) else None
    if sharded and reason is not None and "DTensor" in reason:
        return None  # FSDP2 gathers it into a plain tensor before the layer is called
    return reason


def _accelerated(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module) in PLAIN}


def _fallen_back(layers: dict[str, Any]) -> dict[str, int]:
    return {
        name: sum(layers_of[layer._peft_kernels.name] for layers_of in layer._peft_kernels.calls.fallbacks.values())
        for name, layer in layers.items()
    }


@contextmanager
def _plain(layers: dict[str, Any]) -> Iterator[None]:
    bases = [layer.base_layer for layer in layers.values() if type(layer.base_layer) in QUANTISED]
    repacking = [(base, base.support_avx512bf16_for_cpu) for base in bases]
    for base in bases:
        # Evaluated on such a CPU, bitsandbytes would repack the weight for good.
        base.support_avx512bf16_for_cpu = False
    for layer in layers.values():
        layer.__class__ = PLAIN[type(layer)]
    try:
        yield
    finally:
        for layer in layers.values():
            layer.__class__ = FUSED[type(layer)]
        for base, before in repacking:
            base.support_avx512bf16_for_cpu = before


parity.FAMILIES.append(parity.Family(_accelerated, _plain, _fallen_back))
