"""Safetensors files of named values, each of which is several tensors: `<name><ending>` for each ending of its kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from peft_kernels.checks import shape_text
from peft_kernels.formats.safetensors_file import FLOATS, INTEGERS, TensorInfo, read_header, read_tensors
from peft_kernels.formats.strict_json import short
from peft_kernels.formats.whole_files import write_whole

Value = TypeVar("Value")


class Part(NamedTuple):
    """What the header has to say of one tensor of a value."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int | None, ...]  # None: any size
    text: str  # the two for messages

    def fits(self, info: TensorInfo) -> bool:
        if info.dtype not in self.dtypes or len(info.shape) != len(self.shape):
            return False
        return all(wanted in (None, size) for size, wanted in zip(info.shape, self.shape, strict=True))


Parts = Mapping[str, Part]  # by the endings of their names


def save_parts(
    where: str,
    path: str | os.PathLike,
    values: Mapping[Any, Any],
    parts: Parts,
    split: Callable[[str, Any], Iterable[Tensor]],
) -> Path:
    """Writes values so that a file that was there before stays whole until the new one is.

    Args:
        where: the public function, for messages.
        path: of the file; its folder is made where there is none.
        values: by name.
        parts: of each value, in the order of what `split` gives.
        split: (name, value) -> its tensors, on any device; or raises what is wrong with it.

    Returns:
        The path.

    Raises:
        TypeError: a name is no text.
        OSError: the disk refused; the file that was there is intact.
    """
    path, tensors = Path(path), {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise TypeError(f"{where}: the name {name!r} is {type(name).__name__}; expected a string")
        for ending, tensor in zip(parts, split(name, value), strict=True):
            # A copy each: values may share memory, which the format refuses.
            tensors[name + ending] = tensor.detach().to("cpu", copy=True).contiguous()
    write_whole(path, save(tensors, metadata={"format": "pt"}))
    return path


def load_parts(
    path: str | os.PathLike, parts: Parts, join: Callable[[str, list[Tensor], Path], Value]
) -> dict[str, Value]:
    """Reads what `save_parts` wrote.

    Args:
        path: of the file. Nothing is ever unpickled.
        parts: of each value.
        join: (name, tensors in the order of `parts`, path for messages) -> the value; or raises what is wrong with it.

    Returns:
        The values by name, in alphabetical order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was cut short, is corrupt or holds something else; the message names it and the tensor.
    """
    path = Path(path)
    wanted = {dtype for part in parts.values() for dtype in part.dtypes}
    dtypes = {key: dtype for key, dtype in {**FLOATS, **INTEGERS}.items() if dtype in wanted or key in INTEGERS}
    with open(path, "rb") as file:
        infos = read_header(file, path, dtypes)
        names = _names(infos, parts, path)
        tensors = read_tensors(file, infos, path)
    return {name: join(name, [tensors[name + ending] for ending in parts], path) for name in names}


def _names(infos: Mapping[str, TensorInfo], parts: Parts, path: Path) -> list[str]:
    """The values' names, from a header in which each has all of its tensors."""
    names = set()
    for key, info in infos.items():
        ending = next((ending for ending in parts if key.endswith(ending)), None)
        if ending is None:
            raise ValueError(f"{path}: unexpected tensor {short(key)}; expected names that end in {', '.join(parts)}")
        if not parts[ending].fits(info):
            raise ValueError(
                f"{path}: {short(key)} is {info.dtype} {shape_text(info.shape)}; expected {parts[ending].text}"
            )
        names.add(key.removesuffix(ending))
    for name in sorted(names):
        for ending in parts:
            if name + ending not in infos:
                raise ValueError(f"{path}: has a part of {short(name)}, but no {short(name + ending)}")
    return sorted(names)
