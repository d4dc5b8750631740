"""Named masks in one safetensors file, a bit a weight: 32 times smaller than the weights in float32.

Mask `layer` is two tensors: `layer.words`, int32 [out_features, ceil(in_features / 32)], as `PackedMask` has them, and
`layer.shape`, int64 [2], without which the number of columns would be lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from peft_kernels.checks import check_mask, shape_text
from peft_kernels.formats.mask import PackedMask, tail_bits, words_of
from peft_kernels.formats.safetensors_file import INTEGERS, TensorInfo, read_header, read_tensors
from peft_kernels.formats.strict_json import short
from peft_kernels.formats.whole_files import write_whole

_WORDS, _SHAPE = ".words", ".shape"


def save_masks(path: str | os.PathLike, masks: Mapping[str, PackedMask]) -> Path:
    """Writes masks so that a file that was there before stays whole until the new one is.

    Args:
        path: of the file; its folder is made where there is none.
        masks: by name, such as a layer's, on any device.

    Returns:
        The path.

    Raises:
        TypeError: something is no mask, or a name no text.
        ValueError: a mask's words do not fit its shape. Nothing is written.
        OSError: the disk refused; the file that was there is intact.
    """
    path, tensors = Path(path), {}
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise TypeError(f"save_masks: the name {name!r} is {type(name).__name__}; expected a string")
        check_mask("save_masks", name, mask)
        # A copy each: masks may share memory, which the format refuses.
        tensors[name + _WORDS] = mask.words.detach().to("cpu", copy=True).contiguous()
        tensors[name + _SHAPE] = torch.tensor(tuple(mask.shape), dtype=torch.int64)
    write_whole(path, save(tensors, metadata={"format": "pt"}))
    return path


def load_masks(path: str | os.PathLike) -> dict[str, PackedMask]:
    """Reads what `save_masks` wrote.

    Args:
        path: of the file. Nothing is ever unpickled.

    Returns:
        The masks by name, in alphabetical order, on the CPU: `.to(device)` moves one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was cut short, is corrupt or holds something else; the message names it and the tensor.
    """
    path = Path(path)
    with open(path, "rb") as file:
        infos = read_header(file, path, INTEGERS)
        names = _names(infos, path)
        tensors = read_tensors(file, infos, path)
    return {name: _mask(name, tensors[name + _WORDS], tensors[name + _SHAPE].tolist(), path) for name in names}


def _names(infos: Mapping[str, TensorInfo], path: Path) -> list[str]:
    """The masks' names, from a header in which each has its two tensors."""
    for key, info in infos.items():
        name, ending = key[: -len(_WORDS)], key[-len(_WORDS) :]
        if ending not in (_WORDS, _SHAPE):
            raise ValueError(f"{path}: unexpected tensor {short(key)}; expected names that end in {_WORDS} or {_SHAPE}")
        other = name + (_SHAPE if ending == _WORDS else _WORDS)
        if other not in infos:
            raise ValueError(f"{path}: has {short(key)}, but no {short(other)}")
        dtype, ndim = (torch.int32, 2) if ending == _WORDS else (torch.int64, 1)
        if info.dtype != dtype or len(info.shape) != ndim or (ending == _SHAPE and info.shape != (2,)):
            expected = "int32 of two dimensions" if ending == _WORDS else "int64 of shape (2,)"
            raise ValueError(f"{path}: {short(key)} is {info.dtype} {shape_text(info.shape)}; expected {expected}")
    return sorted(key.removesuffix(_WORDS) for key in infos if key.endswith(_WORDS))


def _mask(name: str, words: Tensor, shape: list[int], path: Path) -> PackedMask:
    n, k = shape
    if min(n, k) < 0 or tuple(words.shape) != (n, words_of(k)):
        raise ValueError(
            f"{path}: {short(name + _WORDS)} has shape {shape_text(words.shape)}, but {short(name + _SHAPE)} says "
            f"{n} x {k}; expected {shape_text((n, words_of(k)))}"
        )
    mask = PackedMask(words, torch.Size((n, k)))
    if bool(tail_bits(mask).any()):
        raise ValueError(f"{path}: {short(name + _WORDS)} has bits beyond column {k}")
    return mask
