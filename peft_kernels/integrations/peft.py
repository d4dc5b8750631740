"""Hugging Face PEFT's LoRA layers through `functional.lora_linear`, by changing their class in place.

PEFT's `lora.Linear` computes base(x) + s · B(A(drop(x))) by calling its children. `FusedPeftLinear` reads the
children's tensors instead, which is the same only as long as calling them would do nothing else. That can change at any
time (hooks, parallelism wrappers, a second adapter, merging), so `_operands` tests it at every call.
"""

# `parameters.get("weight", base.weight)` would look up the attribute also where it is not needed:
# ruff: noqa: SIM401

from __future__ import annotations

import itertools
import logging
import math
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hook
from torch.nn.parameter import Parameter
from transformers.pytorch_utils import Conv1D

from peft_kernels import functional, parity
from peft_kernels.checks import MAX_RANK
from peft_kernels.integrations.report import Calls, Report, Row

logger = logging.getLogger("peft_kernels")

_BASES = (nn.Linear, Conv1D)
_DROPOUTS = (nn.Identity, nn.Dropout)
# Types of (base_layer, lora_A, lora_B, lora_dropout) whose calls do what `lora_linear` does. Exact ones: quantised
# layers, parametrised ones and those that FSDP2 wraps one by one are subclasses.
_FUSIBLE = frozenset(itertools.product(_BASES, (nn.Linear,), (nn.Linear,), _DROPOUTS))
_PLAIN = frozenset((Tensor, Parameter))
_PLAIN_TRIPLES = frozenset(itertools.product(_PLAIN, repeat=3))

in_transform = torch._C._are_functorch_transforms_active

DISABLED = "the adapters are disabled"
MERGED = "the adapter is merged into the base weight"
NOT_HERE = "no active adapter has weights in this layer"
# With these the base layer alone runs: nothing is lost, so that `strict` lets them pass at a call.
NOTHING_TO_FUSE = frozenset((DISABLED, MERGED, NOT_HERE))


class Site(NamedTuple):
    """A layer's name in its model, and the record that the layers of the model share."""

    name: str
    calls: Calls


class FusedPeftLinear(Linear):
    """PEFT's `lora.Linear` with a `forward` that calls `functional.lora_linear` where that computes the same.

    Made by `accelerate`, which changes the class of an existing layer; all state is PEFT's own.
    """

    _peft_kernels = Site("a layer", Calls())

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As PEFT's: x [..., in_features] to [..., out_features]. Anything but x goes to PEFT's own code."""
        operands = _arguments_objection(args, kwargs) if args or kwargs else _operands(self, x)
        if isinstance(operands, str):
            _record(self, operands)
            return Linear.forward(self, x, *args, **kwargs)
        weight, bias, lora_A, lora_B, scaling, dropout_p = operands
        return functional.lora_linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, dropout_p=dropout_p)

    def _get_name(self) -> str:
        return "Linear"  # so that repr says `lora.Linear`, as PEFT's


def _arguments_objection(args: tuple, kwargs: dict) -> str:
    names = sorted(kwargs) or [f"{len(args)} positional"]
    return f"the call has arguments besides x ({', '.join(names)})"


def _operands(layer: Any, x: Tensor | None) -> tuple | str:
    """The arguments of `lora_linear` for a call with x, or why PEFT's own code has to run. x = None asks about the
    layer alone. This runs at every call: cheap tests only, dictionaries read directly (`nn.Module.__getattr__` costs
    ten times as much), and no text before a test has failed."""
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    children = layer._modules
    adapters = children["lora_A"]._modules
    names = layer._active_adapter
    if type(names) is str:
        names = (names,)
    if len(names) != 1 or names[0] not in adapters:
        names = [name for name in names if name in adapters]
        if len(names) != 1:
            return f"{len(names)} adapters are active at once" if names else NOT_HERE
    name = names[0]
    if name in layer.lora_variant:
        return f"the adapter is a LoRA variant ({type(layer.lora_variant[name]).__name__})"
    base, a, b = children["base_layer"], adapters[name], children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    if (type(base), type(a), type(b), type(dropout)) not in _FUSIBLE:
        return _type_objection(base, a, b, dropout)
    for child in (base, a, b, dropout):
        state = child.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return _hook_objection(base, a, b, dropout)
    if not layer.cast_input_dtype_enabled or has_global_hook() or in_transform():
        return _surroundings_objection(layer)
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
        or lora_bias is not None
        or lora_A.dtype != lora_B.dtype
        or (bias is not None and bias.dtype != dtype)
        or layer.r[name] > MAX_RANK
        or type(scaling) is not float
        or not -math.inf < scaling < math.inf
    ):
        return _tensor_objection(weight, bias, lora_A, lora_B, lora_bias, scaling)
    if x is not None and (type(x) not in _PLAIN or (x.dtype != dtype and not torch.is_autocast_enabled(x.device.type))):
        return _input_objection(x, weight)
    dropout_p = 0.0
    if type(dropout) is nn.Dropout and dropout.training:
        if dropout.inplace:
            return "lora_dropout works in place"
        dropout_p = dropout.p
    return weight.t() if type(base) is Conv1D else weight, bias, lora_A, lora_B, scaling, dropout_p


def _surroundings_objection(layer: Linear) -> str:
    if not layer.cast_input_dtype_enabled:
        return "PEFT's casting of the input is switched off (cast_input_dtype_enabled)"
    if has_global_hook():
        return "a global module hook is registered"
    return "a torch.func transform (vmap, grad, ...) is active"


def _tensor_objection(weight, bias, lora_A, lora_B, lora_bias, scaling) -> str:
    if lora_bias is not None:
        return "the adapter has a bias (lora_bias)"
    for tensor in (weight, lora_A, lora_B):
        if type(tensor) not in _PLAIN:
            return f"a weight is a {_full_name(tensor)}, not a plain tensor"
    if lora_A.dtype != lora_B.dtype:
        return f"lora_A is {lora_A.dtype}, lora_B {lora_B.dtype}"
    if bias is not None and bias.dtype != weight.dtype:
        return f"the base weight is {weight.dtype}, its bias {bias.dtype}"
    if type(scaling) is not float:
        return f"scaling is a {_full_name(scaling)}, not a float"
    if not -math.inf < scaling < math.inf:
        return f"scaling is {scaling}"
    return f"the rank is above {MAX_RANK}"


def _input_objection(x: Tensor, weight: Tensor) -> str:
    if type(x) not in _PLAIN:
        return f"x is a {_full_name(x)}, not a plain tensor"
    return f"x is {x.dtype}, the base weight {weight.dtype}"


def _full_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _type_objection(base, a, b, dropout) -> str:
    if type(base) not in _BASES:
        return f"the base layer is a {_full_name(base)}, not exactly torch.nn.Linear or transformers' Conv1D"
    if type(dropout) not in _DROPOUTS:
        return f"lora_dropout is a {_full_name(dropout)}, not torch.nn.Dropout"
    child = b if type(a) is nn.Linear else a
    return f"an adapter weight is in a {_full_name(child)}, not in a torch.nn.Linear"


def _hook_objection(*children: nn.Module) -> str:
    names = ("base_layer", "lora_A", "lora_B", "lora_dropout")
    for name, child in zip(names, children, strict=True):
        if "forward" in child.__dict__:
            return f"the forward of {name} is replaced (by accelerate's or tensor-parallel hooks, for example)"
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(child.__dict__[kind] for kind in kinds):
            return f"{name} has hooks"
    raise AssertionError("no child has hooks")


def _record(layer: FusedPeftLinear, reason: str) -> None:
    """Counts a call of PEFT's own code and logs its reason, the first time. Compiled code is not counted: a counter
    that changes would make it recompile."""
    name, calls = layer._peft_kernels
    if calls.strict and reason not in NOTHING_TO_FUSE:
        raise RuntimeError(f"{name}: {reason}, which needs PEFT's own code; accelerate(..., strict=True) refuses that")
    if torch.compiler.is_compiling():
        return
    if reason not in calls.fallbacks:
        logger.warning("%s runs PEFT's own code: %s", name, reason)
        calls.fallbacks[reason] = Counter()
    calls.fallbacks[reason][name] += 1


def _lasting_objection(layer: Any) -> str | None:
    """Why a layer can never be fused, whatever its state."""
    if not isinstance(layer, FusedPeftLinear):  # also of the subclass that FSDP2 makes of it
        if type(layer) is not Linear:
            name = _full_name(layer).removeprefix("peft.tuners.")
            when = "; call accelerate before fully_shard" if _is_fsdp(layer) else ""
            return f"the layer is a {name}, not exactly PEFT's lora.Linear{when}"
        if "forward" in layer.__dict__:
            return "the forward of the layer is replaced; call accelerate before whatever replaces it"
    if type(layer.base_layer) not in _BASES:
        return _type_objection(layer.base_layer, None, None, None)
    return None


def _objection(layer: Any, sharded: bool) -> str | None:
    """Why a layer would not run fused as it is now."""
    reason = _lasting_objection(layer)
    if reason is None:
        operands = _operands(layer, None)
        reason = operands if isinstance(operands, str) else None
    if sharded and reason is not None and "DTensor" in reason:
        return None  # FSDP2 gathers it into a plain tensor before the layer is called
    return reason


def _tuner_layers(model: nn.Module, who: str) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is {type(model).__name__}; expected a torch.nn.Module")
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _is_fsdp(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
    """See `peft_kernels.accelerate`."""
    layers = _tuner_layers(model, "accelerate")
    sharded = any(map(_is_fsdp, model.modules()))
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
    for name, layer in layers.items():
        if _lasting_objection(layer) is None:
            if type(layer) is Linear:
                layer.__class__ = FusedPeftLinear
            layer._peft_kernels = Site(name, calls)
    return report


def restore(model: nn.Module) -> int:
    """See `peft_kernels.restore`."""
    found = _tuner_layers(model, "restore")
    layers: dict[str, Any] = {n: layer for n, layer in found.items() if isinstance(layer, FusedPeftLinear)}
    for name, layer in layers.items():
        if type(layer) is not FusedPeftLinear:
            raise RuntimeError(
                f"restore: {name} has become a {_full_name(layer)} since; restore before fully_shard or the like. "
                "The model is unchanged"
            )
    for layer in layers.values():
        layer.__class__ = Linear
        layer.__dict__.pop("_peft_kernels", None)
        # accelerate's hooks keep the method that they replaced.
        old = layer.__dict__.get("_old_forward")
        if getattr(old, "__func__", None) is FusedPeftLinear.forward:
            layer._old_forward = types.MethodType(Linear.forward, layer)
    return len(layers)


def _accelerated(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module) is FusedPeftLinear}


def _fallen_back(layers: dict[str, Any]) -> dict[str, int]:
    return {
        name: sum(layers_of[layer._peft_kernels.name] for layers_of in layer._peft_kernels.calls.fallbacks.values())
        for name, layer in layers.items()
    }


@contextmanager
def _plain(layers: dict[str, Any]) -> Iterator[None]:
    for layer in layers.values():
        layer.__class__ = Linear
    try:
        yield
    finally:
        for layer in layers.values():
            layer.__class__ = FusedPeftLinear


parity.FAMILIES.append(parity.Family(_accelerated, _plain, _fallen_back))
