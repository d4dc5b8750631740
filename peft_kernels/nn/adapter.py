"""Low-rank adapters for a whole model: put `FusedLoRALinear` in the place of linear layers, merge, count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_kernels._table import table
from peft_kernels.formats.mask import PackedMask
from peft_kernels.formats.peft_config import LoraSettings, checked_settings
from peft_kernels.nn._layers import flags_kept
from peft_kernels.nn._merge import MergeError, merge_all
from peft_kernels.nn._quantised import quantised_weights
from peft_kernels.nn._sites import (
    Site,
    check_open,
    find_targets,
    fused_sites,
    mergeable_sites,
    put_layers,
    sizes,
    skipped_linears,
    unwrap,
)
from peft_kernels.nn.embedding import FusedLoRAEmbedding, is_embedding
from peft_kernels.nn.lora import FusedLoRALinear
from peft_kernels.nn.masked import MaskedLinear
from peft_kernels.nn.masked_lora import MaskedLoRALinear
from peft_kernels.nn.nf4 import is_quantised_linear
from peft_kernels.nn.qlora import FusedQLoRALinear


class ParameterCount(NamedTuple):
    """How many parameters require gradients, of how many. A parameter with several names counts once, and the elements
    of weights in 4 bits count as parameters."""

    trainable: int
    total: int

    def __str__(self) -> str:
        percent = 100 * self.trainable / self.total if self.total else 0.0
        return f"trainable parameters: {self.trainable:,} of {self.total:,} ({percent:.4g} %)"


class AdaptedLayer(NamedTuple):
    """A layer with a low-rank update: its name, with other names it has, and its sizes."""

    name: str
    out_features: int
    in_features: int
    r: int
    scaling: float


@dataclass(frozen=True)
class AdapterReport:
    """What `add_lora` or `load_adapter` did; prints as a table.

    Attributes:
        layers: the adapted layers.
        parameters: trainable and all parameters of the model.
        unmatched: entries of `target_modules` that named no layer.
        skipped: linear layers that "all-linear" passed over, with their type.
    """

    layers: tuple[AdaptedLayer, ...]
    parameters: ParameterCount
    unmatched: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [(x.name, f"{x.out_features} x {x.in_features}", x.r, f"{x.scaling:g}") for x in self.layers]
        lines = [table(rows, ("layer", "shape", "r", "scaling"))]
        lines.append(f"{len(rows)} layer{'s' * (len(rows) != 1)} adapted; {self.parameters}")
        lines += [f"matched nothing: {name}" for name in self.unmatched]
        lines += [f"passed over: {name}" for name in self.skipped]
        return "\n".join(lines)


class _Pruned(NamedTuple):
    """Which linear layers are pruned, as `add_lora` is told."""

    masks: Mapping[str, PackedMask] | str | None
    update_masked: bool

    def has(self, site: Site) -> bool:
        return type(site.module) is MaskedLinear or isinstance(self.masks, str) or self.mask(site) is not None

    def mask(self, site: Site) -> PackedMask | None:
        if self.masks is None or isinstance(self.masks, str):
            return None
        return next((self.masks[name] for name in site.names if name in self.masks), None)


_NOT_PRUNED = _Pruned(None, True)


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """Counts the parameters of a model, each once however many names it has.

    Args:
        model: any model, with or without adapters.

    Returns:
        (trainable, total) in numbers of elements, which prints as one line.
    """
    parameters = list(model.parameters())
    quantised = {id(q.packed): q.shape.numel() for q in quantised_weights(model)}
    total = sum(p.numel() for p in parameters) + sum(quantised.values())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), total)


def add_lora(
    model: nn.Module,
    r: int = 8,
    target_modules: Iterable[str] | str = "all-linear",
    *,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    train_bias: bool = False,
    freeze_A: bool = False,
    adapter_dtype: torch.dtype | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: Iterable[str] | str | None = None,
    base_quantization: str | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    masks: Mapping[str, PackedMask] | str | None = None,
    update_masked: bool = True,
) -> AdapterReport:
    """Puts adapters into a model, in place, and freezes every other parameter.

    Linear layers are replaced by `FusedLoRALinear`, those in 4 bits (`NF4Linear`, bitsandbytes' `Linear4bit`) by
    `FusedQLoRALinear`, pruned ones (`MaskedLinear`, and those that `masks` says) by `MaskedLoRALinear`, and embeddings,
    where they are named, by `FusedLoRAEmbedding`.

    Targets are named as in Hugging Face PEFT. A module object that stands in several places is replaced in all of them
    by one layer. The layers share the weights they replace, so that the model first computes what it did before; with
    `base_quantization` it computes with those weights in 4 bits.

    Args:
        model: a model with `nn.Linear`, transformers `Conv1D` or `nn.Embedding` layers, or linear ones in 4 bits; not
            yet wrapped by DDP or FSDP.
        r: rank of each update, 1 <= r <= 512.
        target_modules: a list of names, each a layer's whole name or the end of it after a dot ("query"); a regular
            expression that fits the whole name; or "all-linear", which leaves out the output embeddings.
        lora_alpha, lora_dropout, use_rslora, adapter_dtype: as for `FusedLoRALinear`. Embeddings have no dropout.
        use_dora, lora_bias: as for `FusedLoRALinear`, for all layers; not with embeddings.
        train_bias: train the biases of the linear layers that have one as well.
        freeze_A: train B only in linear layers. Adapter files do not say so: what is loaded trains A again.
        rank_pattern: other ranks by regular expression for the name or its end after a dot; the first that fits wins.
        alpha_pattern: the same for lora_alpha.
        exclude_modules: layers to leave alone although they are targets, given as `target_modules`.
        base_quantization: "nf4" quantises the weights of the linear layers named, and of no others: `quantize_linears`
            is for those. None leaves them as they are.
        blocksize, double_quant: of `base_quantization`, as for `FusedQLoRALinear`.
        masks: which linear layers are pruned, by name, as `peft_kernels.pruning` makes them: what a mask does not keep
            becomes 0, and names that are no targets are passed over. "nonzero" keeps, in all of them, what is not 0
            already.
        update_masked: whether updates of pruned layers stay inside the mask, as for `MaskedLoRALinear`.

    Returns:
        An `AdapterReport` that prints as a table.

    Raises:
        ValueError: no layer is named, a pattern fits none, a named layer cannot be replaced or has been already, or a
            number is out of range. The model is unchanged.
        TypeError: an argument of the wrong type.
    """
    where = "add_lora"
    wrapped, model = model, unwrap(model)
    check_open(wrapped, where)
    settings = checked_settings(
        where,
        r=r,
        target_modules=_names(target_modules),
        exclude_modules=_names(exclude_modules),
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        use_dora=use_dora,
        lora_bias=lora_bias,
        train_bias=train_bias,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
    )
    if not isinstance(freeze_A, bool):
        raise TypeError(f"{where}: freeze_A is {freeze_A!r}; expected True or False")
    if base_quantization not in (None, "nf4"):
        raise ValueError(f"{where}: base_quantization is {base_quantization!r}; expected 'nf4' or None")
    if isinstance(masks, str) and masks != "nonzero":
        raise ValueError(f"{where}: masks is {masks!r}; expected masks by name, 'nonzero' or None")
    quantization = {"blocksize": blocksize, "double_quant": double_quant} if base_quantization else None
    sites = find_targets(model, settings, where)
    if train_bias and all(getattr(site.module, "bias", None) is None for site in sites):
        raise ValueError(f"{where}: train_bias is set, but none of the {len(sites)} layers has a bias")
    unused = settings.unused_patterns(site.name for site in sites)
    if unused:
        raise ValueError(f"{where}: the pattern {unused[0]!r} fits none of the {len(sites)} layers named")
    skipped = skipped_linears(model) if settings.all_linear else ()
    dtypes = [adapter_dtype] * len(sites)
    pruned = _Pruned(masks, update_masked)
    install(model, build_layers(sites, settings, dtypes, freeze_A=freeze_A, quantization=quantization, pruned=pruned))
    return report(model, unmatched=_unmatched(settings, sites), skipped=skipped)


def merge_adapter(model: nn.Module, *, requantize: bool = False) -> dict[str, MergeError]:
    """Folds every update of the model into its weight, so that inference costs one matmul a layer.

    Weights are set aside, not overwritten: `unmerge_adapter` restores them bit for bit. Merged layers stay as they are.

    Args:
        model: a model with adapters.
        requantize: what becomes of weights in 4 bits. False merges them exactly into dense ones, for which memory has
            to be there; True into 4 bits again, which loses what the result says (see `MergeError`).

    Returns:
        With `requantize`, the error of each layer in 4 bits by its name; else an empty dict.

    Raises:
        ValueError: the model has no adapters, or a merged weight would not be finite; no layer is changed.
    """
    modules = {site.name: site.module for site in _some_mergeable(model, "merge_adapter")}
    return merge_all(modules, "merge_adapter", requantize=requantize)


def unmerge_adapter(model: nn.Module) -> None:
    """Undoes `merge_adapter`. Layers that are not merged stay as they are.

    Raises:
        ValueError: the model has no adapters.
    """
    for site in _some_mergeable(model, "unmerge_adapter"):
        site.module.unmerge()


def build_layers(
    sites: Sequence[Site],
    settings: LoraSettings,
    dtypes: Sequence[torch.dtype | None],
    *,
    freeze_A: bool = False,
    quantization: Mapping[str, Any] | None = None,
    pruned: _Pruned = _NOT_PRUNED,
) -> dict[nn.Module, nn.Module]:
    """The layer for each site, not yet in the model. Should one fail, the others' weights are not left frozen.

    Args:
        sites, settings, dtypes: where, what, and the dtype of each adapter.
        freeze_A: as for `FusedLoRALinear`.
        quantization: options of `FusedQLoRALinear` for linear layers that are dense; None leaves them dense.
        pruned: which linear layers have a mask, beside those that are a `MaskedLinear`.
    """
    with flags_kept(site.module for site in sites):
        return {
            site.module: _build(site, settings, dtype, freeze_A, quantization, pruned)
            for site, dtype in zip(sites, dtypes, strict=True)
        }


def _build(
    site: Site,
    settings: LoraSettings,
    dtype: torch.dtype | None,
    freeze_A: bool,
    quantization: Mapping | None,
    pruned: _Pruned,
) -> nn.Module:
    layer, r, lora_alpha = site.module, settings.rank_of(site.name), settings.alpha_of(site.name)
    if is_embedding(layer):
        return FusedLoRAEmbedding.from_embedding(
            layer, r, lora_alpha=lora_alpha, use_rslora=settings.use_rslora, adapter_dtype=dtype
        )
    options: dict[str, Any] = {
        "lora_alpha": lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "use_rslora": settings.use_rslora,
        "train_bias": settings.train_bias and layer.bias is not None,
        "freeze_A": freeze_A,
        "adapter_dtype": dtype,
        **(quantization or {}),
    }
    if pruned.has(site):
        return _build_masked(
            site, settings, r, pruned, options | ({"base_quantization": "nf4"} if quantization else {})
        )
    quantised = quantization is not None or is_quantised_linear(layer)
    kind = FusedQLoRALinear if quantised else FusedLoRALinear
    return kind.from_linear(layer, r, use_dora=settings.use_dora, lora_bias=settings.lora_bias, **options)


def _build_masked(site: Site, settings: LoraSettings, r: int, pruned: _Pruned, options: dict[str, Any]) -> nn.Module:
    for option in ("use_dora", "lora_bias"):
        if getattr(settings, option):
            raise ValueError(f"{site.name} is pruned, which does not support {option}")
    try:
        return MaskedLoRALinear.from_linear(
            site.module, r, mask=pruned.mask(site), update_masked=pruned.update_masked, **options
        )
    except (ValueError, TypeError) as error:
        raise type(error)(f"{site.name}: {error}") from error


def install(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Puts the layers in their places and freezes everything but adapters."""
    put_layers(model, layers)
    adapters = {id(p) for site in mergeable_sites(model) for p in site.module.adapter_parameters.values()}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)


def report(model: nn.Module, *, unmatched: Iterable[str] = (), skipped: Iterable[str] = ()) -> AdapterReport:
    """The state of a model's adapters."""
    layers = tuple(
        AdaptedLayer(str(site), *sizes(site.module), site.module.r, site.module.scaling) for site in fused_sites(model)
    )
    return AdapterReport(layers, trainable_parameters(model), tuple(unmatched), tuple(skipped))


def _some_mergeable(model: nn.Module, where: str) -> list[Site]:
    sites = mergeable_sites(unwrap(model))
    if not sites:
        raise ValueError(f"{where}: the model has no FusedLoRALinear; add_lora or load_adapter puts them in")
    return sites


def _names(names: Iterable[str] | str | None) -> Iterable[str] | str | None:
    """Any iterable of names as a list; what is no iterable is left for the check to name."""
    return list(names) if isinstance(names, Iterable) and not isinstance(names, str) else names


def _unmatched(settings: LoraSettings, sites: Sequence[Site]) -> list[str]:
    if isinstance(settings.target_modules, str):
        return []
    names = [f".{name}" for site in sites for name in site.names]
    return [target for target in settings.target_modules if not any(name.endswith(f".{target}") for name in names)]
