"""Named masks in one safetensors file, a bit a weight: 32 times smaller than the weights in float32.

Mask `layer` is two tensors: `layer.words`, int32 [out_features, ceil(in_features / 32)], as `PackedMask` has them, and
`layer.shape`, int64 [2], without which the number of columns would be lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peft_kernels.checks import check_mask, shape_text
from peft_kernels.formats._parts_file import Part, load_parts, save_parts
from peft_kernels.formats.mask import PackedMask, tail_bits, words_of
from peft_kernels.formats.strict_json import short

_WORDS, _SHAPE = ".words", ".shape"
_PARTS = {
    _WORDS: Part((torch.int32,), (None, None), "int32 of two dimensions"),
    _SHAPE: Part((torch.int64,), (2,), "int64 of shape (2,)"),
}


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
    return save_parts("save_masks", path, masks, _PARTS, _split)


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
    return load_parts(path, _PARTS, _mask)


def _split(name: str, mask: PackedMask) -> tuple[Tensor, Tensor]:
    check_mask("save_masks", name, mask)
    return mask.words, torch.tensor(tuple(mask.shape), dtype=torch.int64)


def _mask(name: str, parts: list[Tensor], path: Path) -> PackedMask:
    words, (n, k) = parts[0], parts[1].tolist()
    if min(n, k) < 0 or tuple(words.shape) != (n, words_of(k)):
        raise ValueError(
            f"{path}: {short(name + _WORDS)} has shape {shape_text(words.shape)}, but {short(name + _SHAPE)} says "
            f"{n} x {k}; expected {shape_text((n, words_of(k)))}"
        )
    mask = PackedMask(words, torch.Size((n, k)))
    if bool(tail_bits(mask).any()):
        raise ValueError(f"{path}: {short(name + _WORDS)} has bits beyond column {k}")
    return mask
