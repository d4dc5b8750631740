"""Safetensors files, checked in full before a byte of data is read.

Layout (https://github.com/huggingface/safetensors#format): the header's length N as 8 little-endian bytes, N bytes of
JSON that map each name to dtype, shape and [begin, end) in the data, then the data, without gaps or overlaps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from peft_kernels.formats.strict_json import parse_object, short

MAX_HEADER_BYTES = 16 * 2**20  # about 100,000 tensors
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8}


class TensorInfo(NamedTuple):
    """What the header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(
    file: BinaryIO, path: Path, dtypes: Mapping[str, torch.dtype] = MappingProxyType(FLOATS)
) -> dict[str, TensorInfo]:
    """Reads and checks the header against the file's size; allocates no more than the header itself.

    Args:
        file: the open file; its position is moved.
        path: its path, for messages.
        dtypes: those that the file may have, by their names in the header.

    Returns:
        The tensors by name, in the order of the header.

    Raises:
        ValueError: the file is truncated or has bytes left over, a length is out of range, the JSON is corrupt, an
            entry is malformed or overlaps another, or a dtype is none of `dtypes`.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"{path}: the header claims {length} bytes of a file of {size}: truncated or corrupt")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: the header has {length} bytes; expected at most {MAX_HEADER_BYTES}")
    header = parse_object(file.read(length), path, "the safetensors header")
    _check_metadata(header.pop("__metadata__", None), path)
    infos, spans = {}, []
    for key, entry in header.items():
        infos[key], span = _parse_entry(key, entry, path, dtypes)
        spans.append((*span, key))
    _check_spans(spans, size - 8 - length, path)
    return infos


def read_tensors(file: BinaryIO, infos: dict[str, TensorInfo], path: Path) -> dict[str, Tensor]:
    """Reads the data that `read_header` described, from the same open file, and checks that all of it is finite.

    Args:
        file: the file that `infos` was read from.
        infos: the result of `read_header`.
        path: its path, for messages.

    Returns:
        CPU tensors by name, which own their memory.

    Raises:
        ValueError: the file has changed since, or a tensor holds an infinity or a NaN.
    """
    file.seek(0)
    try:
        tensors = load(file.read())
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    if {key: TensorInfo(t.dtype, tuple(t.shape)) for key, t in tensors.items()} != infos:
        raise ValueError(f"{path}: the file changed while it was read")
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {short(key)} holds non-finite values")
    return tensors


def _check_metadata(metadata: object, path: Path) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ is not an object of strings")


def _parse_entry(
    key: str, entry: object, path: Path, dtypes: Mapping[str, torch.dtype]
) -> tuple[TensorInfo, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: the header's entry for {short(key)} has not just dtype, shape and data_offsets")
    name, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in dtypes:
        raise ValueError(f"{path}: {short(key)} has dtype {short(name)}; expected one of {', '.join(dtypes)}")
    if not _is_sizes(shape):
        raise ValueError(f"{path}: {short(key)} has shape {short(shape)}; expected a list of sizes")
    if not _is_sizes(span) or len(span) != 2:
        raise ValueError(f"{path}: {short(key)} has data_offsets {short(span)}; expected [begin, end]")
    dtype = dtypes[name]
    expected = math.prod(shape) * dtype.itemsize
    if span[1] - span[0] != expected:
        raise ValueError(f"{path}: {short(key)} has data_offsets {span}, but {name} {shape} takes {expected} bytes")
    return TensorInfo(dtype, tuple(shape)), (span[0], span[1])


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_spans(spans: list[tuple[int, int, str]], data_bytes: int, path: Path) -> None:
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            raise ValueError(f"{path}: {short(key)} begins at byte {begin} of the data; expected {position}")
        position = end
    if position != data_bytes:
        problem = "truncated" if position > data_bytes else "bytes left over"
        raise ValueError(f"{path}: the tensors take {position} bytes, but the file has {data_bytes} of data: {problem}")
