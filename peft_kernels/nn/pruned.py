"""`replace_pruned`: the pruned linear layers of a whole model with masks of one bit a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from peft_kernels._table import table
from peft_kernels.nn._pruned import is_pruned
from peft_kernels.nn._sites import (
    Site,
    all_sites,
    check_open,
    compiled_modules,
    put_layers,
    unwrap,
)
from peft_kernels.nn.masked import MaskedLinear

_WHERE = "replace_pruned"


class MaskedLayer(NamedTuple):
    """A layer that is now a `MaskedLinear`: its name, with other names it has, its sizes, and the bytes of what pruning
    keeps of the weight: the weight and its mask."""

    name: str
    out_features: int
    in_features: int
    sparsity: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class PrunedReport:
    """What `replace_pruned` did; prints as a table."""

    layers: tuple[MaskedLayer, ...]

    def __str__(self) -> str:
        rows = [
            (x.name, f"{x.out_features} x {x.in_features}", f"{x.sparsity:.4g}", x.bytes_before, x.bytes_after)
            for x in self.layers
        ]
        before, after = sum(x.bytes_before for x in self.layers), sum(x.bytes_after for x in self.layers)
        lines = [table(rows, ("layer", "shape", "sparsity", "bytes before", "after"))]
        lines.append(f"{len(rows)} layer{'s' * (len(rows) != 1)} masked: {before:,} bytes have become {after:,}")
        return "\n".join(lines)


def replace_pruned(model: nn.Module, *, grad_layout: str = "dense", weight_is_masked: bool = False) -> PrunedReport:
    """Replaces the linear layers of a model that `torch.nn.utils.prune` prunes by `MaskedLinear`, in place. (Masks by
    name, as `peft_kernels.pruning` makes them, are put into a plain model by its `apply_masks`.)

    Args:
        model: a model in which `torch.nn.utils.prune` has pruned weights of `nn.Linear` layers. Not yet wrapped by DDP
            or FSDP.
        grad_layout, weight_is_masked: as for `MaskedLinear`.

    Returns:
        A `PrunedReport` that prints as a table.

    Raises:
        ValueError: there is no such layer, or one cannot be replaced. The model is unchanged.
    """
    wrapped, model = model, unwrap(model)
    check_open(wrapped, _WHERE)
    sites = [site for site in all_sites(model) if is_pruned(site.module)]
    if not sites:
        raise ValueError(f"{_WHERE}: torch.nn.utils.prune has pruned no nn.Linear of the model")
    compiled, layers = compiled_modules(model), {}
    for site in sites:
        if id(site.module) in compiled:
            raise ValueError(f"{_WHERE}: {site.name} is compiled by itself; compile after replacing")
        try:
            layer = MaskedLinear.from_pruned(site.module, grad_layout=grad_layout, weight_is_masked=weight_is_masked)
        except ValueError as error:
            raise ValueError(f"{_WHERE}: {site.name}: {error}") from error
        layers[site.module] = layer
    put_layers(model, layers)
    return PrunedReport(tuple(_row(site, layers[site.module]) for site in sites))


def _row(site: Site, layer: MaskedLinear) -> MaskedLayer:
    before = sum(t.nbytes for t in (site.module.weight_orig, site.module.weight_mask))
    values = 0 if layer.values is None else layer.values.nbytes
    after = layer.weight.nbytes + layer.mask.nbytes + values
    return MaskedLayer(str(site), layer.out_features, layer.in_features, layer.sparsity, before, after)
