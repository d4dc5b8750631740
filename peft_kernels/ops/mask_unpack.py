"""The op `mask_unpack`: a packed mask as booleans."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.mask import PackedMask

SCHEMAS = {
    "mask_unpack": "(Tensor words, int columns) -> Tensor",
}


class Problem(NamedTuple):
    """What dispatch chooses by."""

    device: str
    device_index: int | None
    n: int
    k: int


def _problem(words: Tensor, columns: int) -> Problem:
    return Problem(words.device.type, words.device.index, words.shape[0], columns)


def problem(mask: PackedMask) -> Problem:
    return _problem(mask.words, mask.shape[1])


def kernel(words, columns):
    return dispatch.select("mask_unpack", _problem(words, columns)).forward(words, columns)


def fake(words, columns):
    return words.new_empty(words.shape[0], columns, dtype=torch.bool)


KERNELS = {"mask_unpack": (kernel, fake)}


def mask_unpack(words: Tensor, columns: int) -> Tensor:
    return torch.ops.peft_kernels.mask_unpack(words, columns)
