"""Masks in a model: putting them in, keeping their zeros, reading them out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats.mask import PackedMask, full
from peft_kernels.functional import mask_apply_
from peft_kernels.nn._layers import is_conv1d
from peft_kernels.nn._masked_state import Masked
from peft_kernels.nn._sites import all_sites, compiled_modules, put_layers, replacement_objection, unwrap
from peft_kernels.nn.masked import MaskedLinear
from peft_kernels.pruning._targets import prunable


def apply_masks(model: nn.Module, masks: Mapping[str, PackedMask], *, weight_is_masked: bool = False) -> None:
    """Prunes a model in place: linear layers become `MaskedLinear`, those that are take the new mask.

    Weights are set to 0 where the mask keeps nothing; parameters stay the same objects, so that optimisers and
    DistributedDataParallel go on with them (but for transformers' `Conv1D`, whose weight is turned round). All layers
    are checked before the first is changed.

    Args:
        model: any model, wrapped or not.
        masks: by the names of the layers, as `magnitude_masks` and others give them.
        weight_is_masked: promises for new layers that W stays 0 outside the mask, as it does by elementwise optimisers
            that begin with these masks, and by `keep_zeros`: forward and dx are then plain matmuls.

    Raises:
        ValueError: a name that no linear layer has, a mask that does not fit, or a layer that cannot be replaced.
        TypeError: no masks.
    """
    where = "apply_masks"
    if not masks:
        return
    layers, names = _named(where, model, masks), {}
    compiled = compiled_modules(unwrap(model))
    for name, mask in masks.items():
        module = layers[name]
        if not isinstance(mask, PackedMask):
            raise TypeError(f"{where}: {name} has a {type(mask).__name__}; expected a PackedMask")
        sizes = shape_of(module)
        if tuple(mask.shape) != sizes or mask.device != module.weight.device:
            raise ValueError(
                f"{where}: {name} has a mask of shape {tuple(mask.shape)} on {mask.device}; expected {sizes} on "
                f"{module.weight.device}"
            )
        if not isinstance(module, Masked):
            objection = replacement_objection(module, id(module) in compiled)
            if objection is not None:
                raise ValueError(f"{where}: {name} {objection}")
            names[name] = module
    made = {module: _masked(module, weight_is_masked) for module in names.values()}
    put_layers(unwrap(model), made)
    for name, mask in masks.items():
        made.get(layers[name], layers[name]).set_mask(mask)


def _named(where: str, model: nn.Module, masks: Mapping[str, Any]) -> dict[str, Any]:
    """The layers that the masks are of."""
    found = {name: site.module for site in all_sites(unwrap(model)) for name in site.names}
    unknown = [name for name in masks if name not in found]
    if unknown:
        raise ValueError(f"{where}: the model has no layer named {', '.join(unknown)}")
    prunable(where, model, masks)
    return {name: found[name] for name in masks}


def shape_of(layer: Any) -> tuple[int, int]:
    """(out_features, in_features) of a layer that `prunable` lists."""
    n, k = reversed(layer.weight.shape) if is_conv1d(layer) else (layer.out_features, layer.in_features)
    return n, k


def _masked(module: Any, weight_is_masked: bool) -> MaskedLinear:
    # With a mask that keeps all the layer takes over the parameter itself; what is pruned is set to 0 in it later.
    everything = full(*shape_of(module), device=module.weight.device)
    return MaskedLinear.from_linear(module, everything, weight_is_masked=weight_is_masked)


def masks_of(model: nn.Module) -> dict[str, PackedMask]:
    """The masks of all masked layers of a model, by name."""
    return {site.name: site.module.mask for site in all_sites(unwrap(model)) if isinstance(site.module, Masked)}


def keep_zeros(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
    """Sets weights to 0 outside their masks after each step of the optimiser, without a wait for the device.

    For optimisers that move weights of 0 with a gradient of 0: those that mix a matrix's elements (Muon, Shampoo), and
    any that began under another mask. It costs one pass over the masked weights.

    Args:
        optimizer: of `torch.optim`, or one with its hooks.
        model: its masked layers now, whose masks may change later.

    Returns:
        A handle whose `remove()` ends it.

    Raises:
        ValueError: the model has no masked layer.
    """
    layers = [site.module for site in all_sites(unwrap(model)) if isinstance(site.module, Masked)]
    if not layers:
        raise ValueError("keep_zeros: the model has no masked layer; apply_masks makes them")
    return optimizer.register_step_post_hook(lambda *_: enforce(layers))


def enforce(layers: Any) -> None:
    """Sets the weights of masked layers to 0 outside their masks."""
    for layer in layers:
        if isinstance(layer, MaskedLinear):
            layer.enforce_()


@torch.no_grad()
def mask_optimizer_state(optimizer: Any, model: nn.Module) -> None:
    """Sets what the optimiser keeps of pruned weights (momentum, second moments, ...) to 0: what it had gathered before
    they were pruned would move them. Without a wait for the device."""
    for site in all_sites(unwrap(model)):
        layer = site.module
        weight = layer.weight if isinstance(layer, MaskedLinear) else None
        state = optimizer.state.get(weight, {}) if isinstance(weight, nn.Parameter) else {}
        for value in state.values():
            if isinstance(value, Tensor) and weight is not None and value.shape == weight.shape:
                mask_apply_(value, layer.mask)
