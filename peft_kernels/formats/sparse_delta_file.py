"""Named deltas in one safetensors file: 1 % of a weight of 4096 x 4096 is 1.3 MB in float32, 1.0 MB in 16 bits.

Delta `layer` is three tensors: `layer.indices`, int32 (int64 from 2³¹ weights on) [nnz], ascending places
row · in_features + column; `layer.values` [nnz]; and `layer.shape`, int64 [2].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from peft_kernels.checks import shape_text
from peft_kernels.formats.positions import positions
from peft_kernels.formats.safetensors_file import FLOATS, INTEGERS, TensorInfo, read_header, read_tensors
from peft_kernels.formats.sparse_delta import SparseDelta
from peft_kernels.formats.strict_json import short
from peft_kernels.formats.whole_files import write_whole

_PARTS = (".indices", ".values", ".shape")


def save_deltas(path: str | os.PathLike, deltas: Mapping[str, SparseDelta]) -> Path:
    """Writes deltas so that a file that was there before stays whole until the new one is.

    Args:
        path: of the file; its folder is made where there is none.
        deltas: by name, such as a layer's, on any device.

    Returns:
        The path.

    Raises:
        TypeError: something is no delta, or a name no text.
        ValueError: a delta has values that are not finite. Nothing is written.
        OSError: the disk refused; the file that was there is intact.
    """
    path, tensors = Path(path), {}
    for name, delta in deltas.items():
        if not isinstance(name, str):
            raise TypeError(f"save_deltas: the name {name!r} is {type(name).__name__}; expected a string")
        if not isinstance(delta, SparseDelta):
            raise TypeError(f"save_deltas: {name} is {type(delta).__name__}; expected a SparseDelta")
        values = delta.values.detach()
        if not bool(values.isfinite().all()):
            raise ValueError(f"save_deltas: {name} has values that are not finite")
        # A copy each: deltas may share memory, which the format refuses.
        kept = (delta.positions.flat, values, torch.tensor(tuple(delta.shape), dtype=torch.int64))
        for part, tensor in zip(_PARTS, kept, strict=True):
            tensors[name + part] = tensor.to("cpu", copy=True).contiguous()
    write_whole(path, save(tensors, metadata={"format": "pt"}))
    return path


def load_deltas(path: str | os.PathLike) -> dict[str, SparseDelta]:
    """Reads what `save_deltas` wrote.

    Args:
        path: of the file. Nothing is ever unpickled.

    Returns:
        The deltas by name, in alphabetical order, on the CPU: `.to(device)` moves one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was cut short, is corrupt or holds something else, values that are not finite, or places
            that are outside the matrix, occur twice or are not in order; the message names the file and the tensor.
    """
    path = Path(path)
    with open(path, "rb") as file:
        infos = read_header(file, path, {**FLOATS, **INTEGERS})
        names = _names(infos, path)
        tensors = read_tensors(file, infos, path)
    return {name: _delta(name, [tensors[name + part] for part in _PARTS], path) for name in names}


def _names(infos: Mapping[str, TensorInfo], path: Path) -> list[str]:
    """The deltas' names, from a header in which each has its three tensors."""
    names = set()
    for key, info in infos.items():
        part = next((part for part in _PARTS if key.endswith(part)), None)
        if part is None:
            raise ValueError(f"{path}: unexpected tensor {short(key)}; expected names that end in {', '.join(_PARTS)}")
        fits = info.dtype in {
            ".indices": (torch.int32, torch.int64), ".shape": (torch.int64,), ".values": tuple(FLOATS.values())
        }[part]  # fmt: skip
        if not fits or len(info.shape) != 1 or (part == ".shape" and info.shape != (2,)):
            raise ValueError(
                f"{path}: {short(key)} is {info.dtype} {shape_text(info.shape)}; expected a vector of "
                + {".indices": "int32 or int64", ".shape": "2 int64", ".values": "a floating-point dtype"}[part]
            )
        names.add(key.removesuffix(part))
    for name in sorted(names):
        for part in _PARTS:
            if name + part not in infos:
                raise ValueError(f"{path}: has a part of {short(name)}, but no {short(name + part)}")
    return sorted(names)


def _delta(name: str, parts: list[Tensor], path: Path) -> SparseDelta:
    flat, values, shape = parts
    n, k = shape.tolist()
    if min(n, k) < 0:
        raise ValueError(f"{path}: {short(name + '.shape')} says {n} x {k}; expected no negative number")
    if values.shape != flat.shape:
        raise ValueError(f"{path}: {short(name)} has {flat.numel()} indices and {values.numel()} values")
    try:
        places = positions(flat, (n, k)).with_columns()
    except ValueError as error:
        raise ValueError(f"{path}: {short(name + '.indices')}: {error}") from None
    return SparseDelta(places, values)
