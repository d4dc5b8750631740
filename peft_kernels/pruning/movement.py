"""Movement pruning of a whole model: which weights are kept is trained along with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peft_kernels.checks import check_probability
from peft_kernels.formats.mask import PackedMask
from peft_kernels.nn._sites import all_sites, compiled_modules, put_layers, replacement_objection, unwrap
from peft_kernels.nn.masked import MaskedLinear
from peft_kernels.pruning._targets import prunable
from peft_kernels.pruning.movement_linear import MovementLinear


def add_movement(
    model: nn.Module,
    *,
    targets: Iterable[str] | None = None,
    sparsity: float = 0.0,
    threshold: float | None = None,
    scores: str = "zeros",
) -> dict[str, MovementLinear]:
    """Puts `MovementLinear` in the places of the linear layers of a model, with their parameters; scores are new ones.

        layers = add_movement(model)
        optimizer = AdamW([{"params": weights}, {"params": score_parameters(model), "lr": 1e-2, "weight_decay": 0}])
        ...
        set_sparsity(model, schedule(step))     # before each step
        ...
        finalize_movement(model)                # MaskedLinear, zeros in W

    Args:
        model: any model, wrapped by nothing that takes stock of parameters yet (DDP, FSDP).
        targets: names of the layers, or their endings after a dot; None takes all.
        sparsity, threshold, scores: as for `MovementLinear`.

    Returns:
        The new layers by name.

    Raises:
        ValueError: nothing to prune, or a layer that cannot be replaced; the model is unchanged.
        TypeError: a layer in 4 bits or with an adapter, which does not train.
    """
    where, inside = "add_movement", unwrap(model)
    layers, compiled = prunable(where, model, targets), compiled_modules(inside)
    made = {}
    for name, layer in layers.items():
        objection = replacement_objection(layer, id(layer) in compiled)
        if objection is not None:
            raise ValueError(f"{where}: {name} {objection}")
        try:
            made[layer] = MovementLinear.from_linear(layer, sparsity=sparsity, threshold=threshold, scores=scores)
        except TypeError as error:
            raise TypeError(f"{where}: {name}: {error}") from error
    put_layers(inside, made)
    return {name: made[layer] for name, layer in layers.items()}


def movement_layers(model: nn.Module) -> dict[str, MovementLinear]:
    """The `MovementLinear` of a model by name."""
    return {site.name: site.module for site in all_sites(unwrap(model)) if isinstance(site.module, MovementLinear)}


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scores, which want a learning rate of their own (the paper's is 1e-2 beside 3e-5) and no weight decay."""
    return [layer.scores for layer in movement_layers(model).values()]


def set_sparsity(model: nn.Module, sparsity: float) -> None:
    """How much each layer prunes from its next forward on.

    Raises:
        ValueError: outside [0, 1].
    """
    check_probability("set_sparsity", "sparsity", sparsity)
    for layer in movement_layers(model).values():
        layer.sparsity = float(sparsity)


@torch.no_grad()
def finalize_movement(model: nn.Module) -> Mapping[str, PackedMask]:
    """Ends movement pruning: each layer becomes a `MaskedLinear` with its last mask, its weights 0 outside; scores go.

    Returns:
        The masks by name.
    """
    layers = movement_layers(model)
    made: dict[nn.Module, Any] = {}
    for layer in layers.values():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta").train(layer.training)
        linear.weight = layer.weight
        linear.register_parameter("bias", layer.bias)
        made[layer] = MaskedLinear.from_linear(linear, layer.mask)
    put_layers(unwrap(model), made)
    return {name: made[layer].mask for name, layer in layers.items()}
