"""`mask_pack` on a CPU: csrc/mask.cpp, one pass over the values."""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.formats.mask import words_of
from peft_kernels.kernels.cpu.lora_linear import DTYPES, place
from peft_kernels.kernels.cpu.philox_dropout import row_major

_BYTES = (torch.bool, torch.uint8, torch.int8)
_BYTE = -1  # csrc/mask.h


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; values is on {problem.device}"
    if problem.dtype not in DTYPES and (problem.threshold or problem.dtype not in _BYTES):
        return f"no {problem.dtype}"
    return _native.why_not("_cpu")


def forward(values, threshold, magnitude):
    (n, k), values = values.shape, row_major(values)
    words = torch.empty(n, words_of(k), dtype=torch.int32)
    if threshold is not None and threshold.dtype != torch.float32:
        # A float64 threshold of narrower values: what is above it is above the next float32 towards -inf, or it.
        threshold = _rounded_down(threshold)
    _native.load("_cpu").mask_pack(
        n, k, _native.DTYPES.get(values.dtype, _BYTE), *place(values), *_threshold_place(threshold), magnitude,
        words.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return words


def _threshold_place(threshold) -> tuple[int, int]:
    """Address, and the step from row to row: 0 where all share one."""
    if threshold is None or threshold.ndim == 0:
        return (0 if threshold is None else threshold.data_ptr()), 0
    return threshold.data_ptr(), threshold.stride(0)


def _rounded_down(threshold):
    """The largest float32 that is not above: a float32 value is above both or neither."""
    near = threshold.float()
    return torch.where(near.double() > threshold, near.nextafter(torch.full_like(near, float("-inf"))), near)
