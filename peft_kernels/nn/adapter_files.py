"""`save_adapter` and `load_adapter`: a model's adapted layers in Hugging Face PEFT's files and back."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peft_kernels.checks import shape_text
from peft_kernels.formats.peft_adapter import Adapter, adapter_folder, matrix_names, open_adapter, write_adapter
from peft_kernels.formats.peft_config import LoraSettings, checked_settings, to_config
from peft_kernels.formats.strict_json import short
from peft_kernels.nn._merge import Mergeable
from peft_kernels.nn._sites import (
    Site,
    all_sites,
    check_open,
    find_targets,
    fused_sites,
    has_embedding,
    mergeable_sites,
    sizes,
    unwrap,
)
from peft_kernels.nn.adapter import AdapterReport, build_layers, install, report
from peft_kernels.nn.lora import FusedLoRALinear

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
    torch.compile and FSDP add. Merged layers are saved as well, and A also where it is frozen. The format has one
    dropout probability: that of most layers is written.

    Args:
        model: a model with `FusedLoRALinear` or `FusedLoRAEmbedding` layers. With sharded parameters (DTensor) call it
            in every process.
        folder: created where it does not exist.
        adapter_name: an adapter not called "default" goes to the sub-folder of that name, as in PEFT.
        task_type: PEFT's task type, such as "CAUSAL_LM", for its Auto classes.
        is_main_process: whether this process writes.

    Returns:
        The folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: no adapters, some that the format cannot hold (experts, DoRA or biases in some layers only),
            non-finite values, a bad adapter name; nothing is written.
        OSError: the files could not be written; an adapter that was there before is intact.
    """
    where = "save_adapter"
    model = unwrap(model)
    layers = {name: site.module for site in fused_sites(model) for name in site.names}
    if not layers:
        raise ValueError(f"{where}: the model has no FusedLoRALinear; add_lora or load_adapter puts them in")
    stacks = [site.name for site in mergeable_sites(model) if site.module not in layers.values()]
    if stacks:
        raise ValueError(
            f"{where}: {stacks[0]} is a stack of experts, which has no place in the file; keep its state_dict"
        )
    for name, layer in layers.items():
        _check_whole(name, layer, where)
    settings = _settings_of(layers, [name for site in all_sites(model) for name in site.names], where)
    base_model = getattr(model, "name_or_path", None)
    base_model = base_model if isinstance(base_model, str) and base_model else None
    config = to_config(settings, base_model=base_model, task_type=task_type)
    tensors = {name: {n: _whole(p) for n, p in layer.adapter_parameters.items()} for name, layer in layers.items()}
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

    A plain model gets adapted layers as by `add_lora`. A model that has them must have them in the same places with the
    same ranks and options; they take over the values, alpha and dropout of the file and keep their dtype. Trained
    biases are written into those of the model.

    Everything is checked before the first change: the files as `formats.peft_adapter.open_adapter` says, then that each
    tensor has its layer, each layer that the configuration names its tensors, and that shapes fit.

    Args:
        model: the base model, plain or with adapted layers.
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
    dtypes = [_dtype(site, adapter, adapter_dtype) for site in sites]
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


def _check_whole(name: str, layer: Any, where: str) -> None:
    (n, k), parts = sizes(layer), layer.adapter_parameters
    if any(p.is_meta for p in parts.values()):
        raise ValueError(f"{where}: {name} is on the meta device and has no values")
    if any(p.shape != _shape(part, n, k, layer.r) for part, p in parts.items()):
        raise ValueError(f"{where}: {name} holds a part of its adapter only (ZeRO-3?); gather the parameters first")


def _shape(part: str, n: int, k: int, r: int) -> tuple[int, ...]:
    """Of a tensor of an adapter by its name: A, B, or a vector."""
    return (r, k) if part.endswith("_A") else (n, r) if part.endswith("_B") else (n,)


def _dtype(site: Site, adapter: Adapter, adapter_dtype: torch.dtype | None) -> torch.dtype:
    """Of A in an adapted layer, else what is asked for, else of A in the file."""
    if isinstance(site.module, Mergeable):
        return next(iter(site.module.adapter_parameters.values())).dtype
    return adapter_dtype or adapter.info(site.name, matrix_names(adapter.layers[site.name])[0]).dtype


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
    layer, (n, k) = site.module, sizes(site.module)
    for name in site.names:
        _check_parts(adapter, name, layer)
        r = adapter.settings.rank_of(name)
        for part in adapter.layers[name]:
            shape, expected = adapter.info(name, part).shape, _shape(part, n, k, r)
            if shape != expected:
                raise ValueError(
                    f"{adapter.path}: {part} of {name} has shape {shape_text(shape)}, but the layer is "
                    f"{n} x {k}; expected {shape_text(expected)}"
                )
    is_meta = layer.weight.device.type == "meta"
    if is_meta or hasattr(layer.weight, "full_tensor"):
        kind = "on the meta device" if is_meta else "sharded"
        raise ValueError(f"{adapter.path}: {site.name} of the model is {kind}; load the adapter into whole weights")
    if not isinstance(layer, Mergeable):
        return
    if layer.merged:
        raise ValueError(f"{adapter.path}: {site.name} of the model is merged; unmerge it first")
    if layer.r != adapter.settings.rank_of(site.name):
        raise ValueError(
            f"{adapter.path}: {site.name} has rank {adapter.settings.rank_of(site.name)}, in the model {layer.r}"
        )


def _check_parts(adapter: Adapter, name: str, layer: Any) -> None:
    """Refuses tensors of a layer that is of another kind, or has other options, in the model."""
    given = set(adapter.layers[name])
    if isinstance(layer, Mergeable):
        wanted = set(layer.adapter_parameters)
    elif has_embedding(layer):
        wanted = {"lora_embedding_A", "lora_embedding_B"}
    else:
        wanted = (given - {"lora_embedding_A", "lora_embedding_B", "bias"}) | {"lora_A", "lora_B"}
        wanted |= {"bias"} if adapter.settings.train_bias and layer.bias is not None else set()
    for part in sorted(given ^ wanted):
        has, lacks = ("the file", "the layer in the model") if part in given else ("the layer in the model", "the file")
        raise ValueError(f"{adapter.path}: {name}: {has} has {part}, {lacks} has not")


def _values(site: Site, tensors: Mapping, dtype: torch.dtype, where: str) -> dict[str, Tensor]:
    """The tensors of a site by name, in the dtype and on the device where they go."""
    parts = tensors[site.name]
    for name in site.names[1:]:
        if not all(torch.equal(tensors[name][part], value) for part, value in parts.items()):
            raise ValueError(f"{where}: {name} differs from {site.name}, but in the model they are the same layer")
    values = {}
    for part, value in parts.items():
        goal = site.module.bias.dtype if part == "bias" else dtype
        values[part] = value.to(device=site.module.weight.device, dtype=goal)
        if not values[part].isfinite().all():
            raise ValueError(f"{where}: {part} of {site.name} is not finite in {goal}")
    return values


@torch.no_grad()
def _fill(layers: Iterable[Any], values: Iterable[Mapping[str, Tensor]]) -> None:
    for layer, parts in zip(layers, values, strict=True):
        for part, value in parts.items():
            getattr(layer, part).copy_(value)


def _take_over(sites: Iterable[Site], settings: LoraSettings) -> None:
    for site in sites:
        if isinstance(site.module, FusedLoRALinear):
            site.module.lora_dropout = float(settings.lora_dropout)
        site.module._set_scaling(settings.alpha_of(site.name), settings.use_rslora)


def _settings_of(layers: Mapping[str, Any], names: Sequence[str], where: str) -> LoraSettings:
    """The configuration that gives each layer its rank, scaling and options, the frequent numbers as defaults."""
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, FusedLoRALinear)}
    r = _most_common(layer.r for layer in layers.values())
    use_rslora = _most_common(layer.use_rslora for layer in layers.values())
    alphas = {name: _alpha(layer, use_rslora) for name, layer in layers.items()}
    lora_alpha = _most_common(alphas.values())
    return checked_settings(
        where,
        r=r,
        lora_alpha=lora_alpha,
        target_modules=_targets(set(layers), names),
        lora_dropout=_most_common(layer.lora_dropout for layer in linears.values()) if linears else 0.0,
        use_rslora=use_rslora,
        use_dora=_common(layers, "use_dora", lambda layer: "lora_magnitude_vector" in layer.adapter_parameters, where),
        lora_bias=_common(layers, "lora_bias", lambda layer: "lora_bias" in layer.adapter_parameters, where),
        train_bias=_common(
            {name: layer for name, layer in linears.items() if layer._unmerged("bias") is not None},
            "train_bias",
            lambda layer: layer.train_bias,
            where,
        ),
        fan_in_fan_out=bool(linears) and all(layer.fan_in_fan_out for layer in linears.values()),
        rank_pattern={_exactly(name): layer.r for name, layer in layers.items() if layer.r != r},
        alpha_pattern={_exactly(name): alpha for name, alpha in alphas.items() if alpha != lora_alpha},
    )


def _common(layers: Mapping[str, Any], option: str, has: Callable[[Any], bool], where: str) -> bool:
    """Whether the layers have an option that the file states once for all."""
    by_value = {has(layer): name for name, layer in layers.items()}
    if len(by_value) == 2:
        raise ValueError(
            f"{where}: {by_value[True]} has {option}, {by_value[False]} has not; the file has one value for all layers"
        )
    return next(iter(by_value), False)


def _alpha(layer: Any, use_rslora: bool) -> float:
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
