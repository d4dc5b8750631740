"""The op `mask_pack`: a mask of one bit a weight, from a mask or from scores and a threshold. No gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.mask import words_of

SCHEMAS = {
    # threshold: [] or [N, 1], in float32 (float64 for float64 values); None keeps what is not 0.
    "mask_pack": "(Tensor values, Tensor? threshold, bool magnitude) -> Tensor",
}


class Problem(NamedTuple):
    """What dispatch chooses by."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    n: int
    k: int
    threshold: bool


def _problem(values: Tensor, threshold: Tensor | None) -> Problem:
    device, (n, k) = values.device, values.shape
    return Problem(device.type, device.index, values.dtype, n, k, threshold is not None)


def problem(values: Tensor, threshold: Tensor | None = None, **_) -> Problem:
    return _problem(values, threshold)


def kernel(values, threshold, magnitude):
    return dispatch.select("mask_pack", _problem(values, threshold)).forward(values, threshold, magnitude)


def fake(values, threshold, magnitude):
    return values.new_empty(values.shape[0], words_of(values.shape[1]), dtype=torch.int32)


KERNELS = {"mask_pack": (kernel, fake)}


def mask_pack(values: Tensor, threshold: Tensor | None, magnitude: bool) -> Tensor:
    """Words int32 [N, ceil(K / 32)], for arguments that `functional.mask_pack` has checked."""
    return torch.ops.peft_kernels.mask_pack(values.detach(), threshold, magnitude)
