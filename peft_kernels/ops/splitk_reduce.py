"""The op `splitk_reduce`: the deterministic second stage of a reduction that was split over thread blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch

SCHEMAS = {"splitk_reduce": "(Tensor partials, float scale, ScalarType dtype) -> Tensor"}


class Problem(NamedTuple):
    """`dtype` is that of the result, `source` that of the partials."""

    device: str
    dtype: torch.dtype
    parts: int
    numel: int
    source: torch.dtype


def problem(partials: Tensor, *, scale: float = 1.0, dtype: torch.dtype | None = None) -> Problem:
    parts, source = partials.shape[0], partials.dtype
    return Problem(partials.device.type, dtype or source, parts, partials.numel() // parts if parts else 0, source)


def kernel(partials: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return dispatch.select("splitk_reduce", problem(partials, dtype=dtype)).forward(partials, scale, dtype)


def fake(partials: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return partials.new_empty(partials.shape[1:], dtype=dtype)


KERNELS = {"splitk_reduce": (kernel, fake)}


def splitk_reduce(partials: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    return torch.ops.peft_kernels.splitk_reduce(partials, scale, dtype)
