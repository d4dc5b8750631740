"""Why PEFT's own code has to run: the texts, made only when a test has failed."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hook
from torch.nn.parameter import Parameter
from transformers.pytorch_utils import Conv1D

from peft_kernels.checks import MAX_RANK
from peft_kernels.formats.nf4 import NF4Weight

BASES = (nn.Linear, Conv1D)
# Whose weight is quantised: frozen, and of another dtype than the computation.
QUANTISED: tuple[type[nn.Module], ...] = ()
if is_bnb_4bit_available():
    from bitsandbytes.nn import Linear4bit, LinearNF4

    QUANTISED = (Linear4bit, LinearNF4)
DROPOUTS = (nn.Identity, nn.Dropout)
PLAIN = frozenset((Tensor, Parameter))

in_transform = torch._C._are_functorch_transforms_active


def surroundings_objection(layer: Any) -> str:
    if not layer.cast_input_dtype_enabled:
        return "PEFT's casting of the input is switched off (cast_input_dtype_enabled)"
    if has_global_hook():
        return "a global module hook is registered"
    return "a torch.func transform (vmap, grad, ...) is active"


def tensor_objection(weight, bias, lora_A, lora_B, lora_bias, scaling) -> str:
    for tensor in (weight, lora_A, lora_B, lora_bias):
        if tensor is not None and type(tensor) not in PLAIN and type(tensor) is not NF4Weight:
            return f"a weight is a {full_name(tensor)}, not a plain tensor"
    if lora_A.dtype != lora_B.dtype:
        return f"lora_A is {lora_A.dtype}, lora_B {lora_B.dtype}"
    if bias is not None and bias.dtype != weight.dtype and type(weight) is not NF4Weight:
        return f"the base weight is {weight.dtype}, its bias {bias.dtype}"
    if lora_bias is not None and lora_bias.dtype != lora_B.dtype:
        return f"lora_B is {lora_B.dtype}, its bias {lora_bias.dtype}"
    if type(scaling) is not float:
        return f"scaling is a {full_name(scaling)}, not a float"
    if not -math.inf < scaling < math.inf:
        return f"scaling is {scaling}"
    return f"the rank is above {MAX_RANK}"


def input_objection(x: Tensor, weight: Tensor) -> str:
    if type(x) not in PLAIN:
        return f"x is a {full_name(x)}, not a plain tensor"
    return f"x is {x.dtype}, the base weight {weight.dtype}"


def type_objection(base, a, b, dropout) -> str:
    """Which of the children is of a type whose call may do something else."""
    if type(base) not in BASES and type(base) not in QUANTISED:
        return f"the base layer is a {full_name(base)}, not exactly torch.nn.Linear or transformers' Conv1D"
    if type(dropout) not in DROPOUTS:
        return f"lora_dropout is a {full_name(dropout)}, not torch.nn.Dropout"
    child = b if type(a) is nn.Linear else a
    return f"an adapter weight is in a {full_name(child)}, not in a torch.nn.Linear"


def hook_objection(*children: nn.Module) -> str:
    names = ("base_layer", "lora_A", "lora_B", "lora_dropout")
    for name, child in zip(names, children, strict=True):
        if "forward" in child.__dict__:
            return f"the forward of {name} is replaced (by accelerate's or tensor-parallel hooks, for example)"
        if has_hooks(child):
            return f"{name} has hooks"
    raise AssertionError("no child has hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module would do more than its forward, or another forward than its class's."""
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def dropout_probability(dropout: nn.Module) -> float | str:
    """Of one of `DROPOUTS`, or why it cannot be taken over."""
    if type(dropout) is nn.Dropout and dropout.training:
        return "lora_dropout works in place" if dropout.inplace else dropout.p
    return 0.0


def tensor_of(module: nn.Module, name: str) -> Any:
    """A parameter, or the attribute in its place: FSDP1, DataParallel and hypernetworks put the tensor of the moment
    there. Faster than `getattr`."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def full_name(value: object) -> str:
    """module.Class of a value, for messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 has made the module a unit of its own, and its class another."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
