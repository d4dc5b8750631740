"""Which weights of a model are pruned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.nn._sites import all_sites, output_head, unwrap
from peft_kernels.nn.lora import FusedLoRALinear
from peft_kernels.nn.nf4 import NF4Linear

Weights = Mapping[str, Tensor | NF4Weight]


def prunable(where: str, model: nn.Module, targets: Iterable[str] | None = None) -> dict[str, Any]:
    """The linear layers of a model by name: plain ones, those in NF4, and those of this library over either.

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
    model = unwrap(model)
    head, sites = output_head(model), all_sites(model)
    owners = Counter(id(p) for site in sites for p in site.module.parameters(recurse=False))
    found = {}
    asked = None if targets is None else {f".{name}": False for name in targets}
    for site in sites:
        module = site.module
        if not _is_prunable(module) or module is head or owners[id(module.weight)] > 1:
            continue
        named = [] if asked is None else [t for t in asked if any(f".{name}".endswith(t) for name in site.names)]
        if asked is None or named:
            found[site.name] = module
            for target in named:
                asked[target] = True
    missing = [target[1:] for target, seen in (asked or {}).items() if not seen]
    if missing or not found:
        what = f"named {', '.join(missing)} " if missing else ""
        raise ValueError(f"{where}: the model has no linear layer {what}to prune")
    return found


def _is_prunable(module: nn.Module) -> bool:
    ours = (NF4Linear, FusedLoRALinear)
    return type(module) is nn.Linear or isinstance(module, ours)


def weights_of(where: str, model: Any, targets: Iterable[str] | None = None) -> dict[str, Tensor | NF4Weight]:
    """Weights [out_features, in_features] by name, of a model or of a mapping that holds them.

    Raises:
        ValueError, TypeError: as `prunable`, or neither a module nor a mapping.
    """
    if isinstance(model, nn.Module):
        return {name: module.weight for name, module in prunable(where, model, targets).items()}
    if not isinstance(model, Mapping):
        raise TypeError(f"{where}: model is {type(model).__name__}; expected a torch.nn.Module, or weights by name")
    if targets is not None:
        raise ValueError(f"{where}: targets is given beside a mapping, which says itself what is meant")
    return dict(model)
