"""Named deltas in one safetensors file: 1 % of a weight of 4096 x 4096 is 1.3 MB in float32, 1.0 MB in 16 bits.

Delta `layer` is three tensors: `layer.indices`, int32 (int64 from 2³¹ weights on) [nnz], ascending places
row · in_features + column; `layer.values` [nnz]; and `layer.shape`, int64 [2].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peft_kernels.formats._parts_file import Part, load_parts, save_parts
from peft_kernels.formats.positions import positions
from peft_kernels.formats.safetensors_file import FLOATS
from peft_kernels.formats.sparse_delta import SparseDelta
from peft_kernels.formats.strict_json import short

_PARTS = {
    ".indices": Part((torch.int32, torch.int64), (None,), "a vector of int32 or int64"),
    ".values": Part(tuple(FLOATS.values()), (None,), "a vector of a floating-point dtype"),
    ".shape": Part((torch.int64,), (2,), "a vector of 2 int64"),
}


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
    return save_parts("save_deltas", path, deltas, _PARTS, _split)


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
    return load_parts(path, _PARTS, _delta)


def _split(name: str, delta: SparseDelta) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(delta, SparseDelta):
        raise TypeError(f"save_deltas: {name} is {type(delta).__name__}; expected a SparseDelta")
    if not bool(delta.values.isfinite().all()):
        raise ValueError(f"save_deltas: {name} has values that are not finite")
    return delta.positions.flat, delta.values, torch.tensor(tuple(delta.shape), dtype=torch.int64)


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
