"""Specification of the row norms of W + s B A [N, K]: the matrix itself, and its norms."""

from __future__ import annotations

import torch

from peft_kernels.kernels.reference import nf4_dequantize


def unsupported(problem) -> str | None:
    return None


def forward(weight, lora_A, lora_B, scaling, weight_norm_squared):
    weight = nf4_dequantize.dense(weight)
    wide = torch.promote_types(torch.float32, weight.dtype)
    return torch.addmm(weight.to(wide), lora_B.to(wide), lora_A.to(wide), alpha=scaling).norm(dim=1)
