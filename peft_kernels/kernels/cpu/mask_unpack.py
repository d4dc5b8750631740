"""`mask_unpack` on a CPU: csrc/mask.cpp, 8 bits to 8 bytes by one multiplication."""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.kernels.cpu.lora_linear import place
from peft_kernels.kernels.cpu.philox_dropout import row_major


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; the mask is on {problem.device}"
    return _native.why_not("_cpu")


def forward(words, columns):
    words = row_major(words)
    out = torch.empty(words.shape[0], columns, dtype=torch.bool)
    _native.load("_cpu").mask_unpack(words.shape[0], columns, *place(words), out.data_ptr(), torch.get_num_threads())
    return out
