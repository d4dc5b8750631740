"""`replace_pruned`: the pruned linear layers of a whole model with masks of one bit a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from peft_kernels._table import table
from peft_kernels.formats.mask import PackedMask
from peft_kernels.nn._pruned import is_pruned, pruned_objection
from peft_kernels.nn._sites import (
    Site,
    all_sites,
    check_open,
    compiled_modules,
    put_layers,
    replacement_objection,
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


def replace_pruned(
    model: nn.Module,
    masks: Mapping[str, PackedMask] | None = None,
    *,
    grad_layout: str = "dense",
    weight_is_masked: bool = False,
) -> PrunedReport:
    """Replaces pruned linear layers of a model by `MaskedLinear`, in place.

    Args:
        model: a model in which `torch.nn.utils.prune` has pruned weights of `nn.Linear` layers; with `masks` a plain
            one. Not yet wrapped by DDP or FSDP.
        masks: by the layer's name, as `peft_kernels.pruning` makes them. None takes the layers that
            `torch.nn.utils.prune` prunes, with their masks.
        grad_layout, weight_is_masked: as for `MaskedLinear`.

    Returns:
        A `PrunedReport` that prints as a table.

    Raises:
        ValueError: there is no such layer, one cannot be replaced, or a mask does not fit. The model is unchanged.
        TypeError: a name in `masks` is that of another kind of layer, or something is no mask.
    """
    wrapped, model = model, unwrap(model)
    check_open(wrapped, _WHERE)
    compiled, layers, rows = compiled_modules(model), {}, []
    for site in _chosen(model, masks):
        objection = pruned_objection(site.module) if masks is None else replacement_objection(site.module, False)
        if objection is None and id(site.module) in compiled:
            objection = "is compiled by itself, and its compiled code would stay; compile after replacing"
        if objection is not None:
            raise ValueError(f"{_WHERE}: {site.name} {objection}")
        layer = layers[site.module] = _masked(site, masks, grad_layout, weight_is_masked)
        rows.append(_row(site, layer))
    put_layers(model, layers)
    return PrunedReport(tuple(rows))


def _chosen(model: nn.Module, masks: Mapping[str, PackedMask] | None) -> list[Site]:
    sites = all_sites(model)
    if masks is None:
        found = [site for site in sites if is_pruned(site.module)]
        if not found:
            raise ValueError(f"{_WHERE}: torch.nn.utils.prune has pruned no nn.Linear of the model")
        return found
    names = {name for site in sites for name in site.names}
    unknown = sorted(set(masks) - names)
    if unknown or not masks:
        raise ValueError(f"{_WHERE}: masks has {f'{unknown[0]!r}, which the model has not' if unknown else 'no masks'}")
    return [site for site in sites if any(name in masks for name in site.names)]


def _masked(site: Site, masks: Mapping | None, grad_layout: str, weight_is_masked: bool) -> MaskedLinear:
    options = {"grad_layout": grad_layout, "weight_is_masked": weight_is_masked}
    try:
        if masks is None:
            return MaskedLinear.from_pruned(site.module, **options)
        mask = next(masks[name] for name in site.names if name in masks)
        return MaskedLinear.from_linear(site.module, mask, **options)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{_WHERE}: {site.name}: {error}") from error


def _row(site: Site, layer: MaskedLinear) -> MaskedLayer:
    n, k = layer.out_features, layer.in_features
    state = {**site.module._parameters, **site.module._buffers}
    before = sum(t.nbytes for name, t in state.items() if name.startswith("weight")) or site.module.weight.nbytes
    values = 0 if layer.values is None else layer.values.nbytes
    return MaskedLayer(str(site), n, k, layer.sparsity, before, layer.weight.nbytes + layer.mask.nbytes + values)
