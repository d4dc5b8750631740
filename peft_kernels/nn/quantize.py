"""`quantize_linears`: the linear layers of a whole model in 4 bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from peft_kernels._table import table
from peft_kernels.nn._sites import (
    Site,
    all_sites,
    check_open,
    compiled_modules,
    output_head,
    put_layers,
    replacement_objection,
    sizes,
    unwrap,
)
from peft_kernels.nn.lora import is_linear
from peft_kernels.nn.nf4 import NF4Linear, is_quantised_linear

_WHERE = "quantize_linears"


class QuantisedLayer(NamedTuple):
    """A layer that is now in 4 bits: its name, with other names it has, its sizes, and the bytes of its weight."""

    name: str
    out_features: int
    in_features: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_linears` did; prints as a table.

    Attributes:
        layers: the layers in 4 bits.
        skipped: linear layers that stayed as they are, with the reason.
    """

    layers: tuple[QuantisedLayer, ...]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        rows = [(x.name, f"{x.out_features} x {x.in_features}", x.bytes_before, x.bytes_after) for x in self.layers]
        before, after = sum(x.bytes_before for x in self.layers), sum(x.bytes_after for x in self.layers)
        lines = [table(rows, ("layer", "shape", "bytes before", "after"))]
        lines.append(f"{len(rows)} layer{'s' * (len(rows) != 1)} in NF4: {before:,} bytes have become {after:,}")
        lines += [f"passed over: {name}" for name in self.skipped]
        return "\n".join(lines)


def quantize_linears(
    model: nn.Module,
    *,
    skip: Iterable[str] = ("lm_head",),
    blocksize: int = 64,
    double_quant: bool = True,
) -> QuantizeReport:
    """Replaces the linear layers of a model by `NF4Linear`, in place. `add_lora` then puts adapters beside them.

    Passed over, as transformers does, are the output embeddings and layers whose weight another module shares, and
    beside them what is adapted or quantised already (bitsandbytes' `Linear4bit` becomes an `NF4Linear` that shares its
    weight) and subclasses of `nn.Linear`, which may compute something else. The dense weights are freed at the end,
    where nobody else holds them.

    Args:
        model: a model with `nn.Linear`, transformers `Conv1D` or bitsandbytes `Linear4bit` layers; not yet wrapped by
            DDP or FSDP.
        skip: names of layers to leave alone, each a whole name or the end of one after a dot.
        blocksize: elements that share an absmax; one of 32, 64, ..., 4096.
        double_quant: keep the absmax values in 8 bits too.

    Returns:
        A `QuantizeReport` that prints as a table.

    Raises:
        ValueError: there is no layer to quantise, one cannot be replaced, a weight is not finite, or no such blocksize.
            The model is unchanged.
        TypeError: a weight is float64, or `skip` is a string.
    """
    wrapped, model = model, unwrap(model)
    check_open(wrapped, _WHERE)
    if isinstance(skip, str):
        raise TypeError(f"{_WHERE}: skip is {skip!r}; expected a list of names")
    endings = tuple(f".{name}" for name in skip)
    chosen, skipped = [], []
    sites, head = all_sites(model), output_head(model)
    owners = Counter(id(p) for site in sites for p in site.module.parameters(recurse=False))
    for site in sites:
        reason = _reason_to_skip(site, head, endings, owners)
        if reason is None:
            chosen.append(site)
        elif reason:
            skipped.append(f"{site} ({reason})")
    if not chosen:
        raise ValueError(f"{_WHERE}: the model has no linear layer to quantise")
    compiled = compiled_modules(model)
    for site in chosen:
        objection = replacement_objection(site.module, id(site.module) in compiled)
        if objection is not None:
            raise ValueError(f"{_WHERE}: {site.name} {objection}")
    layers: dict[nn.Module, Any] = {}
    for site in chosen:
        layers[site.module] = _quantised(site, blocksize, double_quant)
    put_layers(model, layers)
    rows = [_row(site, layers[site.module]) for site in chosen]
    return QuantizeReport(tuple(rows), tuple(skipped))


def _reason_to_skip(site: Site, head: nn.Module | None, endings: tuple[str, ...], owners: Counter) -> str | None:
    """Why a module stays as it is: None for one to quantise, "" for one that nobody would expect to be.

    Args:
        site: the module.
        head: the output embeddings.
        endings: of names that are to be left alone.
        owners: how many modules hold each parameter, by its id.
    """
    module = site.module
    if isinstance(module, NF4Linear) or not (isinstance(module, nn.Linear) or is_linear(module)):
        return ""
    if any(f".{name}".endswith(endings) for name in site.names):
        return "named in skip"
    if is_quantised_linear(module):
        return None
    if not is_linear(module):
        return type(module).__name__
    if module is head:
        return "output embeddings"
    return "its weight is shared" if owners[id(module.weight)] > 1 else None


def _quantised(site: Site, blocksize: int, double_quant: bool) -> NF4Linear:
    try:
        return NF4Linear.from_linear(site.module, blocksize=blocksize, double_quant=double_quant)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{_WHERE}: {site.name}: {error}") from error


def _row(site: Site, layer: NF4Linear) -> QuantisedLayer:
    n, k = sizes(layer)
    before = layer.weight.nbytes if is_quantised_linear(site.module) else site.module.weight.nbytes
    return QuantisedLayer(str(site), n, k, before, layer.weight.nbytes)
