"""The layers of a model that an `AdapterPool` is for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.peft_adapter import PREFIX
from peft_kernels.formats.peft_config import checked_settings
from peft_kernels.nn._layers import is_conv1d
from peft_kernels.nn._sites import all_sites, is_linear, output_head, unwrap
from peft_kernels.nn.lora import FusedLoRALinear
from peft_kernels.nn.multi_lora import MultiLoRALinear

_WHERE = "AdapterPool.for_model"


class PoolSite(NamedTuple):
    """`size`: (out_features, in_features). `dtype`: of a 4-bit weight, the one it was quantised from."""

    size: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


def pool_sites(model: Any, target_modules: Iterable[str] | str | None) -> dict[str, PoolSite]:
    """The linear layers of a model by PEFT's names, those that `target_modules` names as in `add_lora`, or all.

    Raises:
        ValueError: there is none, or `target_modules` is malformed.
        TypeError: `model` is no module.
    """
    model = unwrap(model)
    settings = None
    if target_modules is not None:
        settings = checked_settings(_WHERE, r=1, lora_alpha=1, target_modules=target_modules)
    found: dict[str, PoolSite] = {}
    outer: set[str] = set()
    for site in all_sites(model):
        name = site.name.removeprefix(PREFIX)
        base = _base_layer(site.module)
        if base is None or not outer.isdisjoint(_parents(site.name)):
            continue
        outer.add(site.name)
        head = settings is not None and settings.all_linear and site.module is output_head(model)
        if name and not head and (settings is None or settings.targets(name)):
            found[name] = _site(base)
    if not found:
        meant = "" if target_modules is None else f" that target_modules = {target_modules!r} names"
        raise ValueError(f"{_WHERE}: the model has no linear layer{meant}")
    return found


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _base_layer(module: Any) -> Any:
    """The layer whose weight an adapter goes beside, or None where the module is no linear one."""
    if any(kind.__name__ == "BaseTunerLayer" for kind in type(module).__mro__):
        module = module.get_base_layer()
    return module if is_linear(module) or isinstance(module, (FusedLoRALinear, MultiLoRALinear)) else None


def _site(layer: Any) -> PoolSite:
    weight = layer.weight
    if isinstance(weight, NF4Weight):
        return PoolSite((weight.shape[0], weight.shape[1]), weight.dtype, weight.device)
    if is_conv1d(layer):
        return PoolSite((weight.shape[1], weight.shape[0]), weight.dtype, weight.device)
    dtype = weight.dtype if weight.dtype.is_floating_point else layer.weight.quant_state.dtype
    return PoolSite((layer.out_features, layer.in_features), dtype, weight.device)
