"""LoRA adapters on disk as Hugging Face PEFT stores them: adapter_config.json beside adapter_model.safetensors.

Tensors are `base_model.model.<layer>.lora_A.weight`, [r, in_features], and `...lora_B.weight`, [out_features, r], and
what `SUFFIXES` lists besides. Reading refuses whatever is not plainly one such adapter, before it allocates; nothing is
ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from safetensors.torch import save
from torch import Tensor

from peft_kernels.checks import shape_text
from peft_kernels.formats.peft_config import LoraSettings, parse_config
from peft_kernels.formats.safetensors_file import TensorInfo, read_header, read_tensors
from peft_kernels.formats.strict_json import parse_object, short
from peft_kernels.formats.whole_files import flush_folder, write_aside

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_CONFIG_BYTES = 16 * 2**20
PREFIX = "base_model.model."

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# How PEFT ends the key of each tensor that `adapter_parameters` of a module names.
SUFFIXES = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
    "bias": "base_layer.bias",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
}
_NAMES = {suffix: name for name, suffix in SUFFIXES.items()}
_KEY = re.compile(rf"(?P<layer>.+)\.(?P<suffix>{'|'.join(map(re.escape, _NAMES))})", re.DOTALL)
# What a tensor besides A and B means, for messages, and the setting that it goes with.
_EXTRAS = {
    "lora_magnitude_vector": ("DoRA", "use_dora"),
    "lora_bias": ("a bias of the update", "lora_bias"),
    "bias": ("a trained bias", "train_bias"),
}
_COMPILED = re.compile(r"(?:(?<=\.)|^)_orig_mod\.")
_UNSUPPORTED_TENSORS = {
    ".bias": "a bias of another layer",
    "modules_to_save": "modules_to_save",
    ".base_layer.": "a base weight, as PEFT saves without save_embedding_layers=False,",
}


@dataclass(frozen=True)
class Adapter:
    """An adapter whose files were checked; the data are not read yet.

    Attributes:
        path: the weights' file, for messages.
        settings: the meaning of its configuration.
        layers: for each layer its keys by the names of `SUFFIXES`.
        infos: dtype and shape by key.
    """

    path: Path
    settings: LoraSettings
    layers: Mapping[str, Mapping[str, str]]
    infos: Mapping[str, TensorInfo]
    _file: BinaryIO

    def info(self, layer: str, matrix: str) -> TensorInfo:
        return self.infos[self.layers[layer][matrix]]

    def read(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each layer by the names of `SUFFIXES`, on the CPU, all finite.

        Raises:
            ValueError: a value is infinite or NaN.
        """
        tensors = read_tensors(self._file, dict(self.infos), self.path)
        return {layer: {m: tensors[key] for m, key in keys.items()} for layer, keys in self.layers.items()}


@contextlib.contextmanager
def open_adapter(folder: str | os.PathLike, adapter_name: str = "default") -> Iterator[Adapter]:
    """Opens an adapter and checks all of it but the values.

    Args:
        folder: where `save_pretrained` or `save_adapter` wrote it.
        adapter_name: an adapter not called "default" lies in the sub-folder of that name.

    Yields:
        The `Adapter`; it can be read inside the `with` block.

    Raises:
        FileNotFoundError: the folder or one of the two files is missing.
        ValueError: anything in the files is wrong or not supported; the message names file and key.
    """
    folder = adapter_folder(folder, adapter_name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such adapter folder")
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        raise ValueError(
            f"{folder / PICKLE}: pickled weights can run code and are never loaded; save the adapter again with PEFT, "
            f"which writes {WEIGHTS}"
        )
    settings = _read_config(_file_inside(folder, CONFIG))
    path = _file_inside(folder, WEIGHTS)
    with open(path, "rb") as file:
        infos = read_header(file, path)
        layers = _layers(infos, path)
        for layer, keys in layers.items():
            _check_layer(layer, keys, infos, settings, path)
        yield Adapter(path, settings, layers, infos, file)


def write_adapter(
    folder: str | os.PathLike,
    config: Mapping,
    layers: Mapping[str, Mapping[str, Tensor]],
    adapter_name: str = "default",
) -> Path:
    """Writes an adapter so that what was there before stays whole until the new one is.

    Both files are written under temporary names in the same folder, flushed to the disk and then renamed, the
    configuration first; it is put back if the second rename fails. Only a power cut between the two renames can leave
    the new configuration beside the old weights.

    Args:
        folder: created where it does not exist.
        config: the contents of `adapter_config.json`.
        layers: {layer: {name: tensor}} with the names of `SUFFIXES`, on any device.
        adapter_name: one not called "default" goes to the sub-folder of that name.

    Returns:
        The folder that holds the files.

    Raises:
        ValueError: an adapter name that is none, or a value that is not finite; nothing is written.
        OSError: the disk refused; the adapter that was there before is intact.
    """
    folder = adapter_folder(folder, adapter_name)
    tensors = {}
    for layer, matrices in layers.items():
        for matrix, tensor in matrices.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{folder}: {matrix} of {layer} holds non-finite values; nothing was written")
            tensors[f"{PREFIX}{layer}.{SUFFIXES[matrix]}"] = tensor.detach().to("cpu", copy=True).contiguous()
    text = json.dumps(config, indent=2, allow_nan=False).encode()
    folder.mkdir(parents=True, exist_ok=True)
    _replace_both(folder, text, save(tensors, metadata={"format": "pt"}))
    return folder


def adapter_folder(folder: str | os.PathLike, adapter_name: str) -> Path:
    """Where PEFT keeps the adapter of that name: "default" in `folder` itself, others in a sub-folder.

    Raises:
        ValueError: the name has other characters than A-Z, a-z, 0-9, _ and -, or the sub-folder is a link that leaves
            `folder`.
    """
    folder = Path(folder)
    if not isinstance(adapter_name, str) or not _ADAPTER_NAME.fullmatch(adapter_name):
        raise ValueError(f"adapter_name is {short(adapter_name)}; expected 1 to 64 of A-Z, a-z, 0-9, _ and -")
    if adapter_name == "default":
        return folder
    _check_inside(folder, folder / adapter_name)
    return folder / adapter_name


def _check_inside(folder: Path, path: Path) -> None:
    root, real = folder.resolve(), path.resolve()
    # Snapshots in the Hugging Face hub's cache consist of links into a folder of blobs beside them.
    blobs = [parent.with_name("blobs") for parent in root.parents if parent.name == "snapshots"]
    if not real.is_relative_to(root) and real.parent not in blobs:
        raise ValueError(f"{path}: leads out of its folder, to {real}")


def _file_inside(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    _check_inside(folder, path)
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    return path


def _read_config(path: Path) -> LoraSettings:
    with open(path, "rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: more than {MAX_CONFIG_BYTES} bytes")
    return parse_config(parse_object(data, path, "the configuration"), path)


def _layers(infos: Mapping[str, TensorInfo], path: Path) -> dict[str, dict[str, str]]:
    layers: dict[str, dict[str, str]] = {}
    for key in infos:
        match = _KEY.fullmatch(_COMPILED.sub("", key).removeprefix(PREFIX))
        if match is None:
            unsupported = [what for text, what in _UNSUPPORTED_TENSORS.items() if text in key]
            hint = f" ({unsupported[0]} is not supported)" if unsupported else ""
            raise ValueError(f"{path}: unexpected tensor {short(key)}{hint}; expected only those of LoRA layers")
        tensors, name = layers.setdefault(match["layer"], {}), _NAMES[match["suffix"]]
        if name in tensors:
            raise ValueError(f"{path}: {short(key)} and {short(tensors[name])} mean the same tensor")
        tensors[name] = key
    if not layers:
        raise ValueError(f"{path}: holds no LoRA tensors")
    return layers


def _check_layer(
    layer: str, keys: Mapping[str, str], infos: Mapping[str, TensorInfo], settings: LoraSettings, path: Path
) -> None:
    names = matrix_names(keys)
    for name in names:
        if name not in keys:
            raise ValueError(f"{path}: {short(layer)} has no {name}")
    _check_extras(layer, keys, settings, path)
    a, b, r = infos[keys[names[0]]], infos[keys[names[1]]], settings.rank_of(layer)
    for name, key in keys.items():
        shape, dimensions = infos[key].shape, 2 if name in names else 1
        if len(shape) != dimensions:
            expected = "two dimensions" if dimensions == 2 else "one dimension"
            raise ValueError(f"{path}: {short(key)} has shape {shape_text(shape)}; expected {expected}")
    for name, rank in zip(names, (a.shape[0], b.shape[1]), strict=True):
        if rank != r:
            raise ValueError(f"{path}: {short(keys[name])} has rank {rank}, but {CONFIG} says r = {r} for this layer")
    if a.dtype != b.dtype:
        what = f"{names[0]} in {a.dtype} and {names[1]} in {b.dtype}"
        raise ValueError(f"{path}: {short(layer)} has {what}; expected one dtype")
    if not settings.targets(layer):
        raise ValueError(f"{path}: has tensors for {short(layer)}, which {CONFIG} does not target")


def matrix_names(names: Iterable[str]) -> tuple[str, str]:
    """The names of A and B of a layer that has tensors of these names."""
    if any(name.startswith("lora_embedding_") for name in names):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A", "lora_B"


def _check_extras(layer: str, keys: Mapping[str, str], settings: LoraSettings, path: Path) -> None:
    """Each tensor besides A and B is there if, and only if, the configuration says so."""
    embedding = "lora_embedding_A" in keys
    for setting in ("use_dora", "lora_bias"):
        if embedding and getattr(settings, setting):
            raise ValueError(
                f"{path}: {short(layer)} is an embedding, but {CONFIG} has {setting}, which embeddings do not support"
            )
    for name, key in keys.items():
        if embedding and not name.startswith("lora_embedding_"):
            raise ValueError(f"{path}: {short(key)} belongs to no embedding, but {short(layer)} has lora_embedding_A")
        what, setting = _EXTRAS.get(name, ("", ""))
        if setting and not getattr(settings, setting):
            raise ValueError(f"{path}: {short(key)} is {what}, which {CONFIG} says that the adapter has not")
    for name, (what, setting) in _EXTRAS.items():
        # A layer without bias has none to train, which only the model shows.
        if getattr(settings, setting) and name not in keys and name != "bias" and not embedding:
            raise ValueError(f"{path}: {short(layer)} has no {name} ({what}), but {CONFIG} says {setting}")


def _replace_both(folder: Path, config: bytes, weights: bytes) -> None:
    old_config = (folder / CONFIG).read_bytes() if (folder / CONFIG).is_file() else None
    with contextlib.ExitStack() as cleanup:
        aside = {}
        for name, data in ((CONFIG, config), (WEIGHTS, weights)):
            aside[name] = write_aside(folder, name, data)
            cleanup.callback(aside[name].unlink, missing_ok=True)
        os.replace(aside[CONFIG], folder / CONFIG)
        try:
            os.replace(aside[WEIGHTS], folder / WEIGHTS)
        except BaseException:
            _put_back(folder, old_config)
            raise
    flush_folder(folder)


def _put_back(folder: Path, config: bytes | None) -> None:
    if config is None:
        (folder / CONFIG).unlink()
    else:
        os.replace(write_aside(folder, CONFIG, config), folder / CONFIG)
