"""Adapter folders to load: a good one, and each way to spoil it that a loader has to notice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
A, B = "base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight"


def base_model() -> nn.Module:
    """What the good adapter fits."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 5))
    model.add_module("act", nn.Tanh())
    model.add_module("second", nn.Linear(5, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def good_config(**changes: Any) -> dict:
    return {
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["first", "second"],
        "bias": "none", "use_dora": False, "task_type": None, **changes,
    }  # fmt: skip


def good_tensors(**changes: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    sizes = {"first": (6, 5), "second": (5, 4)}
    tensors = {}
    for name, (k, n) in sizes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, k, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n, 2, generator=generator)
    return {**tensors, **changes}


def write_folder(folder: Path, config: Any = None, tensors: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(good_config() if config is None else config))
    (folder / WEIGHTS).write_bytes(save(good_tensors() if tensors is None else tensors, metadata={"format": "pt"}))
    return folder


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file as its parts say, right or wrong. `header` may be bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def good_header() -> dict:
    header, position = {}, 0
    for name, tensor in good_tensors().items():
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    return header


def good_data() -> bytes:
    return bytes(sum(tensor.nbytes for tensor in good_tensors().values()))


class Spoiled(NamedTuple):
    """`spoil` turns a good folder into a bad one; the error is of type `error` and mentions each of `mentions`."""

    id: str
    spoil: Callable[[Path], None]
    mentions: tuple[str, ...]
    error: type[Exception] = ValueError


def config_with(*mentions: str, **changes: Any) -> Spoiled:
    text = ",".join(f"{key}={value!r}" for key, value in changes.items())
    return Spoiled(
        f"config {text}"[:60], lambda folder: _put_config(folder, good_config(**changes)), (CONFIG, *mentions)
    )


def config_text(id: str, text: bytes, *mentions: str) -> Spoiled:
    return Spoiled(f"config {id}", lambda folder: _put(folder, CONFIG, text), (CONFIG, *mentions))


def weights_bytes(id: str, data: bytes, *mentions: str) -> Spoiled:
    return Spoiled(f"weights {id}", lambda folder: _put(folder, WEIGHTS, data), (WEIGHTS, *mentions))


def entry_with(id: str, *mentions: str, **changes: Any) -> Spoiled:
    header = good_header()
    header[A] = {**header[A], **changes}
    return weights_bytes(id, container(header, good_data()), A, *mentions)


def tensors_with(id: str, *mentions: str, without: tuple[str, ...] = (), **changes: Tensor) -> Spoiled:
    def spoil(folder: Path) -> None:
        tensors = {key: tensor for key, tensor in good_tensors(**changes).items() if key not in without}
        _put(folder, WEIGHTS, save(tensors))

    return Spoiled(f"tensors {id}", spoil, (WEIGHTS, *mentions))


def _put(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def _put_config(folder: Path, config: Any) -> None:
    _put(folder, CONFIG, json.dumps(config).encode())


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _elsewhere(name: str) -> Callable[[Path], None]:
    """The file moves beside the folder, and a link stays."""

    def spoil(folder: Path) -> None:
        outside = folder.with_name(f"outside-{name}")
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return spoil


def _pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(good_tensors(), folder / "adapter_model.bin")


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _lacking(key: str) -> Spoiled:
    config = good_config()
    del config[key]
    return Spoiled(f"config without {key}", lambda folder: _put_config(folder, config), (CONFIG, key, "missing"))


def _filled(shape: tuple[int, ...], value: float) -> Tensor:
    tensor = torch.zeros(shape)
    tensor.view(-1)[-1] = value
    return tensor


_FILES = [
    Spoiled("no folder", _remove, ("no such adapter folder",), FileNotFoundError),
    Spoiled("no config", _without(CONFIG), (CONFIG,), FileNotFoundError),
    Spoiled("no weights", _without(WEIGHTS), (WEIGHTS,), FileNotFoundError),
    Spoiled("pickle only", _pickle_only, ("adapter_model.bin", "never loaded")),
    Spoiled("config links out", _elsewhere(CONFIG), (CONFIG, "out of its folder")),
    Spoiled("weights link out", _elsewhere(WEIGHTS), (WEIGHTS, "out of its folder")),
    Spoiled("weights are a pipe", _pipe, (WEIGHTS, "not a regular file")),
]

_CONFIGS = [
    config_text("empty", b"", "JSON"),
    config_text("cut short", json.dumps(good_config()).encode()[:-5], "JSON"),
    config_text("not UTF-8", b'{"r": "\xff"}', "JSON"),
    config_text("a list", b"[]", "expected an object"),
    config_text("a key twice", b'{"r": 2, "r": 3}', "'r'", "twice"),
    config_text("nested too deeply", b"[" * 100_000, "JSON"),
    config_text("too large", b" " * (16 * 2**20 + 1), "more than"),
    *map(_lacking, ("peft_type", "r", "lora_alpha", "target_modules")),
    config_with("peft_type", "IA3", peft_type="IA3"),
    config_with("lora_magic", "unknown", lora_magic=1),
    config_with("r is 0", r=0),
    config_with("r is -1", r=-1),
    config_with("r is 513", r=513),
    config_with("r is 2.0", r=2.0),
    config_with("r is '2'", r="2"),
    config_with("r is True", r=True),
    config_with("r = 3", r=3),
    config_with("lora_alpha is inf", lora_alpha=math.inf),
    config_with("lora_alpha is -inf", lora_alpha=-math.inf),
    config_with("lora_alpha is nan", lora_alpha=math.nan),
    config_with("lora_alpha", lora_alpha=1e30),
    config_with("lora_alpha", lora_alpha=10**400),
    config_with("lora_alpha", lora_alpha="16"),
    config_with("lora_alpha", lora_alpha=True),
    config_with("lora_dropout is 2", lora_dropout=2),
    config_with("lora_dropout is nan", lora_dropout=math.nan),
    config_with("target_modules", target_modules=[]),
    config_with("target_modules", target_modules=""),
    config_with("target_modules", target_modules=[1]),
    config_with("target_modules", target_modules={"first": 1}),
    config_with("target_modules", "regular expression", target_modules="(first"),
    config_with("exclude_modules", "regular expression", exclude_modules="("),
    config_with("rank_pattern", rank_pattern={"first": 0}),
    config_with("rank_pattern", rank_pattern={"(": 2}),
    config_with("rank_pattern", rank_pattern=[2]),
    config_with("alpha_pattern", alpha_pattern={"first": math.inf}),
    config_with("alpha_pattern", alpha_pattern={"first": "3"}),
    config_with("layers_to_transform", layers_to_transform=["0"]),
    config_with("layers_to_transform", layers_to_transform=[0], target_modules="first|second"),
    config_with("layers_pattern", layers_pattern=3),
    config_with("use_rslora", use_rslora="yes"),
    config_with("fan_in_fan_out", fan_in_fan_out=1),
    config_with("init_lora_weights", init_lora_weights="pissa"),
    config_with("init_lora_weights", init_lora_weights="olora"),
    config_with("bias", bias="all"),
    config_with("modules_to_save", modules_to_save=["classifier"]),
    config_with("alora_invocation_tokens", alora_invocation_tokens=[1, 2]),
    config_with("layer_replication", layer_replication=[[0, 2]]),
    config_with("target_parameters", target_parameters=["w"]),
    config_with("trainable_token_indices", trainable_token_indices=[3]),
    config_with("use_qalora", use_qalora=True),
    config_with("use_bdlora", use_bdlora={"nblocks": 2}),
    config_with("arrow_config", arrow_config={"top_k": 1}),
    config_with("kasa_config", kasa_config={}),
    config_with("monteclora_config", monteclora_config={}),
    config_with("velora_config", velora_config={}),
    config_with("megatron_config", megatron_config={}),
    config_with("ensure_weight_tying", ensure_weight_tying=True),
]

_HEADERS = [
    weights_bytes("empty", b"", "truncated"),
    weights_bytes("seven bytes", b"\0" * 7, "truncated"),
    weights_bytes("header beyond the file", container(good_header(), length=10**6), "truncated"),
    weights_bytes("header of 2**64 - 1", b"\xff" * 8 + b"{}", "truncated"),
    weights_bytes("header too large", container(b" " * (16 * 2**20 + 1)), "at most"),
    weights_bytes("header is no JSON", container(b"{"), "JSON"),
    weights_bytes("header is a list", container([]), "expected an object"),
    weights_bytes("key twice", container(b'{"a": {}, "a": {}}'), "'a'", "twice"),
    weights_bytes("pickle in disguise", b"\x80\x04\x95" + bytes(100), "truncated"),
    weights_bytes("cut short", container(good_header(), good_data()[:-1]), "truncated"),
    weights_bytes("trailing bytes", container(good_header(), good_data() + b"\0"), "left over"),
    weights_bytes("metadata of numbers", container({"__metadata__": {"format": 1}}), "__metadata__"),
    weights_bytes("no tensors", container({}), "no LoRA tensors"),
    weights_bytes("entry is a number", container({A: 3}), A),
    weights_bytes("entry without dtype", container({A: {"shape": [2, 6], "data_offsets": [0, 48]}}), A),
    entry_with("entry with more", "just", device="cuda"),
    entry_with("8-bit integers", "I8", dtype="I8"),
    entry_with("8-bit floats", "F8_E4M3", dtype="F8_E4M3"),
    entry_with("dtype unheard of", "F7", dtype="F7"),
    entry_with("dtype is a list", "dtype", dtype=[]),
    entry_with("negative size", "shape", shape=[-2, -6]),
    entry_with("size is true", "shape", shape=[True, 12]),
    entry_with("size is a float", "shape", shape=[2.0, 6]),
    entry_with("shape beyond its bytes", "takes", shape=[2**40, 2**40]),
    entry_with("negative offset", "data_offsets", data_offsets=[-48, 0]),
    entry_with("offsets backwards", "data_offsets", data_offsets=[48, 0]),
    entry_with("one offset", "data_offsets", data_offsets=[48]),
]


def _moved(id: str, shift: int, *mentions: str) -> Spoiled:
    header = good_header()
    header[B]["data_offsets"] = [offset + shift for offset in header[B]["data_offsets"]]
    return weights_bytes(id, container(header, good_data()), *mentions)


_TENSORS = [
    _moved("overlap", -4, "begins at"),
    _moved("gap", 4, "begins at"),
    tensors_with("NaN", A, "non-finite", **{A: _filled((2, 6), math.nan)}),
    tensors_with("infinity", B, "non-finite", **{B: _filled((5, 2), -math.inf)}),
    tensors_with("integers", A, "I64", **{A: torch.ones(2, 6, dtype=torch.int64)}),
    tensors_with("bytes", A, "I8", **{A: torch.ones(2, 6, dtype=torch.int8)}),
    tensors_with("no lora_B", "first", "no lora_B", without=(B,)),
    tensors_with("no lora_A", "first", "no lora_A", without=(A,)),
    tensors_with("rank that lies", A, "rank 3", "r = 2", **{A: torch.ones(3, 6), B: torch.ones(5, 3)}),
    tensors_with("ranks that differ", B, "rank 3", **{B: torch.ones(5, 3)}),
    tensors_with("three dimensions", A, "(2, 6, 1)", **{A: torch.ones(2, 6, 1)}),
    tensors_with("no dimensions", A, "()", **{A: torch.ones(())}),
    tensors_with("two dtypes", "first", "torch.bfloat16", **{B: torch.ones(5, 2).bfloat16()}),
    tensors_with("a stranger", "'stranger'", "unexpected", stranger=torch.ones(1)),
    tensors_with("base weight", "unexpected", **{"base_model.model.first.weight": torch.ones(5, 6)}),
    tensors_with("DoRA", "DoRA", **{"base_model.model.first.lora_magnitude_vector": torch.ones(5)}),
    tensors_with("embedding", "embedding", **{"base_model.model.e.lora_embedding_A": torch.ones(2, 6)}),
    tensors_with("bias", "bias", **{"base_model.model.first.lora_B.bias": torch.ones(5)}),
    tensors_with("layer norm's bias", "a bias of another layer", **{"base_model.model.norm.bias": torch.ones(5)}),
    tensors_with("trained bias", "trained bias", **{"base_model.model.first.base_layer.bias": torch.ones(5)}),
    tensors_with("modules_to_save", "modules_to_save", **{"base_model.model.modules_to_save.weight": torch.ones(5)}),
    tensors_with(
        "half an embedding", "'e' has no lora_embedding_B", **{"base_model.model.e.lora_embedding_A": torch.ones(2, 6)}
    ),
    tensors_with(
        "embedding and linear", "belongs to no embedding",
        **{"base_model.model.first.lora_embedding_A": torch.ones(2, 6),
           "base_model.model.first.lora_embedding_B": torch.ones(5, 2)},
    ),
    tensors_with("adapter name in the key", "unexpected", **{"first.lora_A.other.weight": torch.ones(2, 6)}),
    tensors_with("one tensor twice", "same tensor", **{"_orig_mod.first.lora_A.weight": torch.ones(2, 6)}),
    tensors_with(
        "layer not targeted", "act", "does not target",
        **{"act.lora_A.weight": torch.ones(2, 6), "act.lora_B.weight": torch.ones(6, 2)},
    ),
]  # fmt: skip

MAGNITUDES = {
    f"base_model.model.{name}.lora_magnitude_vector": torch.ones(n) for name, n in (("first", 5), ("second", 4))
}
LORA_BIASES = {f"base_model.model.{name}.lora_B.bias": torch.ones(n) for name, n in (("first", 5), ("second", 4))}


def _first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict([*tensors.items()][:1])


def _both(id: str, config: dict, tensors: dict[str, Tensor], *mentions: str) -> Spoiled:
    def spoil(folder: Path) -> None:
        write_folder(folder, good_config(**config), good_tensors(**tensors))

    return Spoiled(id, spoil, mentions)


_OPTIONS = [
    config_with("first", "lora_magnitude_vector", "use_dora", use_dora=True),
    config_with("first", "lora_bias", lora_bias=True),
    config_with("lora_bias is set together with use_dora", lora_bias=True, use_dora=True),
    config_with("use_dora is 'yes'", use_dora="yes"),
    config_with("lora_bias is 1", lora_bias=1),
    config_with("bias", '"none" or "lora_only"', bias=True),
    _both("one magnitude", {"use_dora": True}, _first(MAGNITUDES), "'second' has no lora_magnitude_vector"),
    _both("one lora_bias", {"lora_bias": True}, _first(LORA_BIASES), "'second' has no lora_bias"),
    _both(
        "magnitude is a matrix", {"use_dora": True},
        {**MAGNITUDES, "base_model.model.first.lora_magnitude_vector": torch.ones(5, 1)}, "(5, 1)", "one dimension",
    ),
    _both(
        "magnitude is NaN", {"use_dora": True},
        {**MAGNITUDES, "base_model.model.first.lora_magnitude_vector": torch.full((5,), math.nan)},
        "lora_magnitude_vector",
    ),
    _both(
        "embedding with DoRA", {"use_dora": True, "target_modules": ["first", "second", "e"]},
        {**MAGNITUDES, "base_model.model.e.lora_embedding_A": torch.ones(2, 6),
         "base_model.model.e.lora_embedding_B": torch.ones(5, 2)},
        "'e' is an embedding", "use_dora",
    ),
    _both(
        "embedding's rank", {"target_modules": ["first", "second", "e"]},
        {"base_model.model.e.lora_embedding_A": torch.ones(2, 6),
         "base_model.model.e.lora_embedding_B": torch.ones(5, 3)},
        "e.lora_embedding_B", "rank 3", "r = 2",
    ),
]  # fmt: skip

OF_TENSORS = [*_TENSORS, *_OPTIONS]
SPOILED = [*_FILES, *_CONFIGS, *_HEADERS, *_TENSORS, *_OPTIONS]
