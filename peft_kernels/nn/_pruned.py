"""What `torch.nn.utils.prune` leaves in a module, checked and taken out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from peft_kernels.formats.mask import PackedMask, pack
from peft_kernels.functional.mask_apply import mask_apply


def is_pruned(module: nn.Module) -> bool:
    """Whether `torch.nn.utils.prune` prunes the weight of an `nn.Linear` before each forward."""
    return type(module) is nn.Linear and "weight_orig" in module._parameters and "weight_mask" in module._buffers


@torch.no_grad()
def taken_from_pruned(name: str, module: Any) -> tuple[nn.Parameter, PackedMask, nn.Parameter | None]:
    """(W ⊙ M as a new parameter, M, the module's own bias) of an `nn.Linear` that was pruned.

    Raises:
        TypeError: no `nn.Linear`.
        ValueError: not pruned, or more than that.
    """
    if type(module) is not nn.Linear and not parametrize.is_parametrized(module):
        kind = type(module)
        raise TypeError(f"{name}: got {kind.__module__}.{kind.__qualname__}; expected exactly torch.nn.Linear")
    objection, state = pruned_objection(module), {**module._parameters, **module._buffers}
    if objection is not None:
        raise ValueError(f"{name}: the module {objection}")
    weight, mask = state["weight_orig"], pack(state["weight_mask"])
    return nn.Parameter(mask_apply(weight, mask), requires_grad=weight.requires_grad), mask, module.bias


_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def pruned_objection(module: Any) -> str | None:
    """Why a `MaskedLinear` cannot take the place of an `nn.Linear`, pruned or not."""
    if parametrize.is_parametrized(module):
        return "has parametrisations, which would be lost; remove them first"
    if not is_pruned(module):
        return (
            "has no weight_orig and weight_mask: torch.nn.utils.prune has not pruned its weight "
            "(MaskedLinear.from_linear takes weights that have zeros)"
        )
    if "bias_orig" in module._parameters:
        return (
            "has a pruned bias, which MaskedLinear would train; make it permanent first: prune.remove(module, 'bias')"
        )
    state = module.__dict__
    others = any(not isinstance(hook, BasePruningMethod) for hook in state["_forward_pre_hooks"].values())
    if others or any(state[hooks] for hooks in _HOOKS) or "forward" in state:
        return "has hooks or a forward of its own beside those of pruning, which would be lost; remove them first"
    if not _is_boolean(module.weight_mask):
        return "has a weight_mask with other values than 0 and 1"
    return None


def _is_boolean(mask: Tensor) -> bool:
    return bool(((mask == 0) | (mask == 1)).all())
