"""Safetensors files of compressed weights, complete or not there at all, checked in full when read.

Each weight is its tensors, named by the weight's name and `tensor.<i>`, and an entry of the file's metadata: layout,
dtype and numbers as JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_kernels.formats import _block, _nf4_bitmap, _semi_structured, bitmap
from peft_kernels.formats.sparse import SparseWeight, from_numbers

_KEY, _FORMAT = "peft_kernels.sparse", "1"
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
# How many tensors and numbers a weight of each layout has.
_SIZES = {
    "bitmap": ((4,), 5),
    _semi_structured.LAYOUT: ((2,), 3),
    _block.LAYOUT: ((3,), 4),
    _nf4_bitmap.LAYOUT: ((4, 7), 7),
}


def save(weights: Mapping[str, SparseWeight], path: str | os.PathLike) -> None:
    """Writes weights to one file, which takes the place of an older one once it is complete.

    Args:
        weights: by name.
        path: of the file, in an existing folder.
    """
    path, tensors, metadata = Path(path), {}, {_KEY: _FORMAT}
    for name, weight in weights.items():
        for i, tensor in enumerate(weight.tensors):
            tensors[f"{name}.tensor.{i}"] = tensor.detach().cpu().contiguous().clone()
        entry = {"layout": weight.layout, "dtype": str(weight.dtype), "numbers": weight.numbers}
        metadata[f"{_KEY}:{name}"] = json.dumps(entry)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, aside, metadata=metadata)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, SparseWeight]:
    """Reads what `save` wrote.

    Args:
        path: of the file.
        device: where the weights go.

    Returns:
        The weights by name.

    Raises:
        ValueError: the file is cut short or no such file, or a weight in it contradicts itself: a wrong size or dtype,
            an index out of range, blocks that are not in order. The message names file and weight.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error
    if metadata.get(_KEY) != _FORMAT:
        raise ValueError(f"{path}: holds no compressed weights of format {_FORMAT}")
    prefix = f"{_KEY}:"
    weights = {}
    for key, text in metadata.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            weights[name] = _weight(f"{path}: {name}", _entry(f"{path}: {name}", text), _taken(tensors, name))
    if tensors:
        raise ValueError(f"{path}: tensors of no weight: {', '.join(sorted(tensors)[:3])}")
    return {name: weight.to(device) for name, weight in weights.items()}


def _entry(where: str, text: str) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: its entry of the metadata is corrupt: {error}") from error
    numbers = entry.get("numbers") if isinstance(entry, dict) else None
    if (
        not isinstance(numbers, list)
        or entry.get("layout") not in _SIZES
        or entry.get("dtype") not in _DTYPES
        or not all(type(number) is int and number >= 0 for number in numbers)
        or len(numbers) != _SIZES[entry["layout"]][1]
    ):
        raise ValueError(f"{where}: its entry of the metadata says {text[:200]}, which is no layout, dtype and numbers")
    return entry


def _taken(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    """The tensors of a weight, in order, taken out of the file's."""
    found = []
    while (key := f"{name}.tensor.{len(found)}") in tensors:
        found.append(tensors.pop(key))
    return found


def _weight(where: str, entry: dict[str, Any], tensors: list[Tensor]) -> SparseWeight:
    counts, _ = _SIZES[entry["layout"]]
    if len(tensors) not in counts:
        raise ValueError(f"{where}: has {len(tensors)} tensors; expected {' or '.join(map(str, counts))}")
    weight = from_numbers(entry["layout"], tensors, entry["numbers"], _DTYPES[entry["dtype"]])
    check(where, weight)
    if entry["numbers"] != weight.numbers or entry["dtype"] != str(weight.dtype):
        raise ValueError(f"{where}: is of {weight.dtype} with numbers {weight.numbers}; the file says {entry}")
    return weight


def check(where: str, weight: SparseWeight) -> None:
    """Refuses a weight whose tensors are not what its numbers say (waits for the device).

    Raises:
        ValueError: says where, what it is and what it should be.
    """
    if isinstance(weight, bitmap.BitmapWeight):
        _check_bitmap(where, weight)
    else:
        try:
            weight.check(where)
        except (TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{where}: {error}") from error


def _check_bitmap(where: str, weight: bitmap.BitmapWeight) -> None:
    """Made again from its dense form and its bits it must be the same: then every index is in range."""
    if hasattr(bitmap, "check"):
        bitmap.check(where, weight)
