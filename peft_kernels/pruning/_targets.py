"""Which weights of a model are pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.nn._layers import is_conv1d
from peft_kernels.nn._masked_state import Masked
from peft_kernels.nn._sites import all_sites, is_linear, output_head, unwrap
from peft_kernels.nn.lora import FusedLoRALinear
from peft_kernels.nn.masked import MaskedLinear, prunable_weight
from peft_kernels.nn.nf4 import is_quantised_linear
from peft_kernels.pruning.movement_linear import MovementLinear


def prunable(where: str, model: nn.Module, targets: Iterable[str] | None = None) -> dict[str, Any]:
    """The linear layers of a model by name: plain ones, those in 4 bits, transformers' `Conv1D`, and those of this
    library in the place of either.

    Left out are the output embeddings, layers whose weight another module shares, and subclasses of `nn.Linear` of
    others, which may compute something else.

    Args:
        where: what messages begin with.
        model: any model, wrapped or not.
        targets: names, or their endings after a dot; None takes all.

    Raises:
        ValueError: there is none, or a target names none.
        TypeError: `targets` is a string, or the model no module.
    """
    if isinstance(targets, str):
        raise TypeError(f"{where}: targets is {targets!r}; expected a list of names")
    asked = None if targets is None else {f".{name}": False for name in targets}
    model = unwrap(model)
    head, sites = output_head(model), all_sites(model)
    owners = Counter(id(p) for site in sites for p in site.module.parameters(recurse=False))
    found = {}
    for site in sites:
        if not _is_prunable(site.module) or site.module is head or owners[id(site.module.weight)] > 1:
            continue
        named = [end for end in asked or () if any(f".{name}".endswith(end) for name in site.names)]
        if asked is None or named:
            found[site.name] = site.module
        if asked is not None:
            asked.update(dict.fromkeys(named, True))
    missing = [end[1:] for end, seen in (asked or {}).items() if not seen]
    if missing or not found:
        what = f"named {', '.join(missing)} " if missing else ""
        raise ValueError(f"{where}: the model has no linear layer {what}to prune")
    return found


def _is_prunable(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, (Masked, FusedLoRALinear, MovementLinear))


def weights_of(where: str, model: Any, targets: Iterable[str] | None = None) -> dict[str, Tensor | NF4Weight]:
    """Weights [out_features, in_features] by name, of a model or of a mapping that holds them.

    Raises:
        ValueError, TypeError: as `prunable`, or neither a module nor a mapping.
    """
    if isinstance(model, nn.Module):
        return {name: _weight(module) for name, module in prunable(where, model, targets).items()}
    if not isinstance(model, Mapping):
        raise TypeError(f"{where}: model is {type(model).__name__}; expected a torch.nn.Module, or weights by name")
    if targets is not None:
        raise ValueError(f"{where}: targets is given beside a mapping, which says itself what is meant")
    return dict(model)


def _weight(module: Any) -> Tensor | NF4Weight:
    if is_quantised_linear(module):
        return prunable_weight("weights_of", module)
    if is_conv1d(module):
        return module.weight.detach().t()
    if isinstance(module, MaskedLinear) and module.grad_layout == "compact":
        module.enforce_()  # what trains are the kept values beside it
    return module.weight
