"""The op `mask_apply`: W ⊙ M, what is not kept exactly 0, whatever it was; into a new tensor or in place. No gradient:
`masked_linear` has one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.mask import PackedMask

SCHEMAS = {
    "mask_apply": "(Tensor weight, Tensor words, ScalarType dtype) -> Tensor",
    "mask_apply_": "(Tensor(a!) weight, Tensor words) -> ()",
}


class Problem(NamedTuple):
    """What dispatch chooses by: `dtype` is the weight's, `out_dtype` what it is rounded to."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    out_dtype: torch.dtype
    n: int
    k: int


def _problem(weight: Tensor, dtype: torch.dtype) -> Problem:
    device, (n, k) = weight.device, weight.shape
    return Problem(device.type, device.index, weight.dtype, dtype, n, k)


def problem(weight: Tensor, mask: PackedMask, dtype: torch.dtype | None = None) -> Problem:
    return _problem(weight, dtype or weight.dtype)


def _select(weight, dtype):
    key = (weight.shape, weight.device, weight.dtype, dtype)
    return dispatch.select_memoised("mask_apply", key, _problem, weight, dtype)


def kernel(weight, words, dtype):
    return _select(weight, dtype).forward(weight, words, dtype)


def fake(weight, words, dtype):
    return weight.new_empty(weight.shape, dtype=dtype)


def in_place_kernel(weight, words):
    _select(weight, weight.dtype).forward_(weight, words)
    torch.autograd.graph.increment_version(weight)  # what writes through an address leaves none


def in_place_fake(weight, words):
    return None


KERNELS = {"mask_apply": (kernel, fake), "mask_apply_": (in_place_kernel, in_place_fake)}


def mask_apply(weight: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """W ⊙ M in `dtype`, contiguous."""
    return torch.ops.peft_kernels.mask_apply(weight, words, dtype)


def mask_apply_(weight: Tensor, words: Tensor) -> None:
    """W ⊙ M into W itself."""
    torch.ops.peft_kernels.mask_apply_(weight, words)
