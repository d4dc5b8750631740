"""What the modules of this package have in common when they are made and called."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.checks import FLOATS, check_finite
from peft_kernels.formats.nf4 import NF4Weight

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_flags(module: str, has_bias: bool, **flags: Any) -> None:
    """Refuses what is no boolean, and combinations that mean nothing."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{module}: {name} is {value!r}; expected True or False")
    if flags.get("use_dora") and flags.get("lora_bias"):
        raise ValueError(f"{module}: lora_bias is set together with use_dora, which leaves no place for it in the norm")
    if flags.get("train_bias") and not has_bias:
        raise ValueError(f"{module}: train_bias is set, but the layer has no bias")


def resolve_adapter_dtype(module: str, weight: Tensor | NF4Weight, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """float32 for 16-bit weights and the weight's dtype for others, unless one is given."""
    if adapter_dtype is None:
        return torch.promote_types(weight.dtype, torch.float32)
    if adapter_dtype not in FLOATS:
        raise TypeError(f"{module}: adapter_dtype is {adapter_dtype}; expected a floating-point dtype")
    return adapter_dtype


def scaling_of(module: str, lora_alpha: float, r: int, use_rslora: bool) -> float:
    check_finite(module, "lora_alpha", lora_alpha)
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, a linear layer whose weight is [in_features, out_features]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module may do more than its class's forward does."""
    state = module.__dict__
    return any(state[hooks] for hooks in _HOOKS) or "forward" in state


@contextlib.contextmanager
def flags_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Should the block raise, every parameter requires gradients again as it did before."""
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    try:
        yield
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
