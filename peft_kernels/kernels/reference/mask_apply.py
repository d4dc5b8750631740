"""Specification of W ⊙ M: a choice and no product, so that infinities and NaN outside the mask vanish and no -0 is
left."""

from __future__ import annotations

import torch

from peft_kernels.kernels.reference import mask_unpack


def unsupported(problem) -> str | None:
    return None


def forward(weight, words, dtype):
    kept = mask_unpack.forward(words, weight.shape[1])
    return torch.where(kept, weight, 0.0).to(dtype).contiguous()


def forward_(weight, words):
    weight.masked_fill_(~mask_unpack.forward(words, weight.shape[1]), 0.0)
