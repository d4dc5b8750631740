"""Specification of unpacking: the bits of `mask_pack`, as booleans."""

from __future__ import annotations

import torch

from peft_kernels.formats.mask import WORD_BITS


def unsupported(problem) -> str | None:
    return None


def forward(words, columns):
    bits = words.unsqueeze(-1) >> torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(1)[:, :columns].contiguous()
