"""Safetensors files of compressed weights, complete or not there at all, checked in full when read.

Each weight is its tensors, named by the weight's name and `tensor.<i>`, and an entry of the file's metadata: layout,
dtype and numbers as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_kernels.formats import _block, _nf4_bitmap, _semi_structured, bitmap, csr
from peft_kernels.formats.bitmap import BitmapWeight
from peft_kernels.formats.sparse import SparseWeight, from_numbers
from peft_kernels.formats.whole_files import taking_the_place_of

_KEY, _FORMAT = "peft_kernels.sparse", "1"
_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
# How many tensors and numbers a weight of each layout has.
_SIZES = {
    "bitmap": ((4,), 5),
    csr.LAYOUT: ((3,), 4),
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
    with taking_the_place_of(path) as aside:
        save_file(tensors, aside, metadata=metadata)


def load(path: str | os.PathLike, device: torch.device | str = "cpu") -> dict[str, SparseWeight]:
    """Reads what `save` wrote.

    Args:
        path: of the file.
        device: where the weights go.

    Returns:
        The weights by name.

    Raises:
        ValueError: the file is cut short or no such file, or a weight in it contradicts itself: a wrong size or dtype,
            an index out of range, blocks or columns that are not in order. The message names file and weight.
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
            weights[name] = check(f"{path}: {name}", entry_of(f"{path}: {name}", text), _taken(tensors, name))
    if tensors:
        raise ValueError(f"{path}: tensors of no weight: {', '.join(sorted(tensors)[:3])}")
    return {name: weight.to(device) for name, weight in weights.items()}


def entry_of(where: str, text: str) -> dict[str, Any]:
    """What the text says of a weight: layout, dtype and numbers.

    Raises:
        ValueError: it says something else.
    """
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
    found: list[Tensor] = []
    while (key := f"{name}.tensor.{len(found)}") in tensors:
        found.append(tensors.pop(key))
    return found


def check(where: str, entry: dict[str, Any], tensors: list[Tensor]) -> SparseWeight:
    """The weight of these tensors, checked in full (waits for the device).

    Raises:
        ValueError: says where, what it is and what it should be.
    """
    counts, _ = _SIZES[entry["layout"]]
    if len(tensors) not in counts:
        raise ValueError(f"{where}: has {len(tensors)} tensors; expected {' or '.join(map(str, counts))}")
    try:
        weight = from_numbers(entry["layout"], tensors, entry["numbers"], _DTYPES[entry["dtype"]])
        _check_bitmap(where, weight) if isinstance(weight, BitmapWeight) else weight.check(where)
        numbers = weight.numbers
    except (TypeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{where}: {error}") from error
    if entry["numbers"] != numbers:
        raise ValueError(f"{where}: has numbers {numbers}; the file says {entry['numbers']}")
    return weight


def _check_bitmap(where: str, weight: BitmapWeight) -> None:
    """Everything that a kernel takes for granted follows from the bits.

    Raises:
        ValueError: a tensor contradicts them.
    """
    n, k, panels, most_slots, kept = weight.numbers
    strips, chunks = -(-n // bitmap.STRIP), -(-k // bitmap.CHUNK)
    slots = weight.values.shape[0]
    expected = {
        "values": (weight.values, (slots, bitmap.LANES, bitmap.STREAMS), weight.values.dtype),
        "bits": (weight.bits, (strips, chunks, bitmap.LANES, bitmap.TILES), torch.uint8),
        "starts": (weight.starts, (strips * panels + 1,), torch.int32),
        "order": (weight.order, (strips * bitmap.STRIP,), torch.int32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{where}: {name} have dtype {tensor.dtype} and shape {tuple(tensor.shape)}; expected {dtype}, {shape}"
            )
    if panels != bitmap.panels_of(n, k):
        raise ValueError(f"{where}: has {panels} panels; expected {bitmap.panels_of(n, k)}")
    everyone = torch.arange(n, device=weight.device)
    if not torch.equal(weight.order.sort().values[:n].long(), everyone) or bool((weight.order[n:] != n).any()):
        raise ValueError(f"{where}: order does not name each of {n} rows once")
    counted, taken = 0, []
    for first, last in bitmap._spans(strips, k):
        bits = bitmap._expand(weight.bits[first:last])
        counted += int(bits.sum())
        taken.append(bitmap._stream_places(bits, panels)[1])
    sizes = torch.cat(taken).flatten() if taken else weight.starts[:0].long()
    if not torch.equal(weight.starts.long().diff(), sizes) or int(weight.starts[0]) or int(weight.starts[-1]) != slots:
        raise ValueError(f"{where}: starts are not what the bits say")
    if (counted, int(sizes.max()) if sizes.numel() else 0) != (kept, most_slots):
        raise ValueError(f"{where}: {kept} kept weights and {most_slots} slots contradict the bits")
