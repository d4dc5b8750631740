"""Specification of packed masks: bit k % 32 of word [n, k // 32] is whether (n, k) is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from peft_kernels.formats.mask import WORD_BITS, words_of


def unsupported(problem) -> str | None:
    return None


def forward(values, threshold, magnitude):
    """Kept is what is not 0; with a threshold, what is above it (by absolute value if `magnitude`; NaN never is)."""
    if threshold is None:
        kept = values != 0
    else:
        wide = values.to(threshold.dtype)
        kept = (wide.abs() if magnitude else wide) > threshold
    n, k = values.shape
    words = words_of(k)
    bits = F.pad(kept, (0, words * WORD_BITS - k)).view(n, words, WORD_BITS)
    total = (bits.to(torch.int64) << torch.arange(WORD_BITS, device=values.device)).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
