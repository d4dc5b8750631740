"""`mask_pack` in one Triton launch: a mask, or scores and their threshold, read once and 1 bit a weight written.

Floor, 4096 x 4096, bf16, 4.3 TB/s: 34 + 2 MB, 8.3 us; from float32 16 us. PyTorch's operators take a dozen passes, some
of 8 bytes a weight. Compiled for sm_80, sm_90 and sm_100 and interpreted on the CPU; never run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.formats.mask import words_of
from peft_kernels.kernels.triton import _launch

_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = frozenset((*_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64))


def unsupported(problem) -> str | None:
    if problem.dtype not in _DTYPES:
        return f"reads no values of {problem.dtype}"
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype)


def unproven(problem) -> str | None:
    # On a GPU the only alternative is the reference, many times the bytes of this.
    return _launch.INTERPRETER_IS_FOR_TESTS if _launch.INTERPRETED else None


def forward(values: Tensor, threshold: Tensor | None, magnitude: bool) -> Tensor:
    from peft_kernels.kernels.triton import _mask_passes as passes

    (n, k), dtype = values.shape, values.dtype
    words = torch.empty((n, words_of(k)), dtype=torch.int32, device=values.device)
    if words.numel() == 0:
        return words
    if dtype == torch.bool:
        values = values.view(torch.uint8)
    stride = threshold.stride(0) if threshold is not None and threshold.ndim else 0
    passes.launch(
        passes.mask_pack, (n, k), values.dtype, values.device,
        values, threshold, words, *values.stride(), stride, words.shape[1], magnitude,
    )  # fmt: skip
    return words
