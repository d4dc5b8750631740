"""`save_adapter` and `load_adapter`: a model's `FusedLoRALinear` layers in Hugging Face PEFT's files and back."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from peft_kernels.checks import shape_text
from peft_kernels.formats.peft_adapter import Adapter, adapter_folder, open_adapter, write_adapter
from peft_kernels.formats.peft_config import LoraSettings, checked_settings, to_config
from peft_kernels.formats.strict_json import short
from peft_kernels.nn._sites import Site, all_sites, check_open, find_targets, fused_sites, unwrap
from peft_kernels.nn.adapter import AdapterReport, build_layers, install, report
from peft_kernels.nn.lora import FusedLoRALinear

_MATRICES = ("lora_A", "lora_B")
_T = TypeVar("_T")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    adapter_name: str = "default",
    task_type: str | None = None,
    is_main_process: bool = True,
) -> Path:
    """Saves the adapters of a model so that `load_adapter` and `peft.PeftModel.from_pretrained` can load them.

    What was in the folder stays whole until the new files are complete. Names are free of what DistributedDataParallel,
    torch.compile and FSDP add. Merged layers are saved as well; frozen parameters are not. The format has one dropout
    probability: that of most layers is written.

    Args:
        model: a model with `FusedLoRALinear` layers. With sharded parameters (DTensor) call it in every process.
        folder: created where it does not exist.
        adapter_name: an adapter not called "default" goes to the sub-folder of that name, as in PEFT.
        task_type: PEFT's task type, such as "CAUSAL_LM", for its Auto classes.
        is_main_process: whether this process writes.

    Returns:
        The folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: no adapters, non-finite values, a bad adapter name; nothing is written.
        OSError: the files could not be written; an adapter that was there before is intact.
    """
    where = "save_adapter"
    model = unwrap(model)
    layers = {name: site.module for site in fused_sites(model) for name in site.names}
    if not layers:
        raise ValueError(f"{where}: the model has no FusedLoRALinear; add_lora or load_adapter puts them in")
    for name, layer in layers.items():
        if layer.lora_A.is_meta or layer.lora_B.is_meta:
            raise ValueError(f"{where}: {name} is on the meta device and has no values")
        if layer.lora_A.shape != (layer.r, layer.in_features) or layer.lora_B.shape != (layer.out_features, layer.r):
            raise ValueError(f"{where}: {name} holds a part of its adapter only (ZeRO-3?); gather the parameters first")
    settings = _settings_of(layers, [name for site in all_sites(model) for name in site.names], where)
    base_model = getattr(model, "name_or_path", None)
    base_model = base_model if isinstance(base_model, str) and base_model else None
    config = to_config(settings, base_model=base_model, task_type=task_type)
    tensors = {name: {m: _whole(getattr(layer, m)) for m in _MATRICES} for name, layer in layers.items()}
    if is_main_process:
        return write_adapter(folder, config, tensors, adapter_name)
    return adapter_folder(folder, adapter_name)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
) -> AdapterReport:
    """Loads an adapter that `save_adapter` or PEFT's `save_pretrained` wrote.

    A plain model gets `FusedLoRALinear` layers as by `add_lora`. A model that has them must have them in the same
    places with the same ranks; they take over the values, alpha and dropout of the file and keep their dtype.

    Everything is checked before the first change: the files as `formats.peft_adapter.open_adapter` says, then that each
    tensor has its layer, each layer that the configuration names its tensors, and that shapes fit.

    Args:
        model: the base model, plain or with `FusedLoRALinear` layers.
        folder: holds adapter_config.json and adapter_model.safetensors. Pickled weights are never loaded.
        adapter_name: an adapter not called "default" lies in the sub-folder of that name.
        adapter_dtype: dtype of the adapters that are added; None keeps the file's. (PEFT makes 16-bit ones float32.)

    Returns:
        An `AdapterReport` that prints as a table.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is corrupt, unsupported or does not fit the model; the message names file and key, and the
            model is unchanged.
    """
    wrapped, model = model, unwrap(model)
    with open_adapter(folder, adapter_name) as adapter:
        where = str(adapter.path)
        present = fused_sites(model)
        if not present:
            check_open(wrapped, where)
        sites = present or find_targets(model, adapter.settings, where)
        _check_fit(adapter, sites, model)
        tensors = adapter.read()
    dtypes = [
        site.module.lora_A.dtype if present else adapter_dtype or adapter.info(site.name, "lora_A").dtype
        for site in sites
    ]
    values = [_values(site, tensors, dtype, where) for site, dtype in zip(sites, dtypes, strict=True)]
    if present:
        _fill([site.module for site in sites], values)
        _take_over(sites, adapter.settings)
    else:
        layers = build_layers(sites, adapter.settings, dtypes)
        _fill(layers.values(), values)
        install(model, layers)
    return report(model)


def _whole(parameter: Tensor) -> Tensor:
    """The gathered tensor where the parameter is a DTensor, which every process must take part in."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _check_fit(adapter: Adapter, sites: Sequence[Site], model: nn.Module) -> None:
    named = {name for site in sites for name in site.names}
    for layer in adapter.layers:
        if layer not in named:
            raise ValueError(f"{adapter.path}: has tensors for {short(layer)}, {_why_not(layer, model)}")
    for site in sites:
        for name in site.names:
            if name not in adapter.layers:
                shared = f" (the same layer as {site.name})" if name != site.name else ""
                raise ValueError(f"{adapter.path}: has no tensors for {name}{shared}, a target in the model")
        _check_site(adapter, site)


def _why_not(layer: str, model: nn.Module) -> str:
    for site in all_sites(model):
        if layer in site.names:
            return f"which in the model is a {type(site.module).__name__} and no target"
    return "a layer that the model does not have"


def _check_site(adapter: Adapter, site: Site) -> None:
    layer = site.module
    n, k = layer.weight.shape if isinstance(layer, (nn.Linear, FusedLoRALinear)) else layer.weight.shape[::-1]
    for name in site.names:
        r = adapter.settings.rank_of(name)
        for matrix, expected in (("lora_A", (r, k)), ("lora_B", (n, r))):
            shape = adapter.info(name, matrix).shape
            if shape != expected:
                raise ValueError(
                    f"{adapter.path}: {matrix} of {name} has shape {shape_text(shape)}, but the layer is "
                    f"{n} x {k}; expected {shape_text(expected)}"
                )
    if layer.weight.is_meta or hasattr(layer.weight, "full_tensor"):
        kind = "on the meta device" if layer.weight.is_meta else "sharded"
        raise ValueError(f"{adapter.path}: {site.name} of the model is {kind}; load the adapter into whole weights")
    if not isinstance(layer, FusedLoRALinear):
        return
    if layer.merged:
        raise ValueError(f"{adapter.path}: {site.name} of the model is merged; unmerge it first")
    if layer.r != adapter.settings.rank_of(site.name):
        raise ValueError(
            f"{adapter.path}: {site.name} has rank {adapter.settings.rank_of(site.name)}, in the model {layer.r}"
        )


def _values(site: Site, tensors: Mapping, dtype: torch.dtype, where: str) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of a site in the dtype and on the device where they go."""
    for name in site.names[1:]:
        if not all(torch.equal(tensors[name][m], tensors[site.name][m]) for m in _MATRICES):
            raise ValueError(f"{where}: {name} differs from {site.name}, but in the model they are the same layer")
    values = tuple(tensors[site.name][m].to(device=site.module.weight.device, dtype=dtype) for m in _MATRICES)
    for matrix, value in zip(_MATRICES, values, strict=True):
        if not value.isfinite().all():
            raise ValueError(f"{where}: {matrix} of {site.name} is not finite in {dtype}")
    return values


@torch.no_grad()
def _fill(layers: Iterable[FusedLoRALinear], values: Iterable[tuple[Tensor, Tensor]]) -> None:
    for layer, (lora_A, lora_B) in zip(layers, values, strict=True):
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)


def _take_over(sites: Iterable[Site], settings: LoraSettings) -> None:
    for site in sites:
        site.module.lora_dropout = float(settings.lora_dropout)
        site.module._set_scaling(settings.alpha_of(site.name), settings.use_rslora)


def _settings_of(layers: Mapping[str, FusedLoRALinear], names: Sequence[str], where: str) -> LoraSettings:
    """The configuration that gives each layer its rank and scaling, the frequent ones as defaults."""
    r = _most_common(layer.r for layer in layers.values())
    use_rslora = _most_common(layer.use_rslora for layer in layers.values())
    alphas = {name: _alpha(layer, use_rslora) for name, layer in layers.items()}
    lora_alpha = _most_common(alphas.values())
    return checked_settings(
        where,
        r=r,
        lora_alpha=lora_alpha,
        target_modules=_targets(set(layers), names),
        lora_dropout=_most_common(layer.lora_dropout for layer in layers.values()),
        use_rslora=use_rslora,
        fan_in_fan_out=all(layer.fan_in_fan_out for layer in layers.values()),
        rank_pattern={_exactly(name): layer.r for name, layer in layers.items() if layer.r != r},
        alpha_pattern={_exactly(name): alpha for name, alpha in alphas.items() if alpha != lora_alpha},
    )


def _alpha(layer: FusedLoRALinear, use_rslora: bool) -> float:
    """The alpha that gives the layer's scaling, which a caller may have set, by the one rule that the file states."""
    divisor = layer.r**0.5 if use_rslora else layer.r
    alpha = layer.lora_alpha if isinstance(layer.lora_alpha, int) else float(layer.lora_alpha)
    return alpha if alpha / divisor == layer.scaling else layer.scaling * divisor


def _targets(adapted: set[str], names: Sequence[str]) -> list[str] | str:
    """The shortest way to name just the adapted ones: endings, else whole names, else an expression."""
    for candidate in (sorted({name.rpartition(".")[2] for name in adapted}), sorted(adapted)):
        endings = tuple(f".{name}" for name in candidate)
        if {name for name in names if f".{name}".endswith(endings)} == adapted:
            return candidate
    return "|".join(map(re.escape, sorted(adapted)))


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"  # without ^ a pattern also fits longer names that end in it


def _most_common(values: Iterable[_T]) -> _T:
    return Counter(values).most_common(1)[0][0]
