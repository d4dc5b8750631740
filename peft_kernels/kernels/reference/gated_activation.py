"""Specification of h = act(gate) ⊙ up and of its gradients, in plain PyTorch.

silu(x) = x σ(x); gelu(x) = x Φ(x); gelu_tanh(x) = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))).
Computed in at least float32 and rounded once.
Source: Shazeer, "GLU Variants Improve Transformer", 2020; Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_ROOT = math.sqrt(2 / math.pi)
_CUBE = 0.044715


def unsupported(problem) -> str | None:
    return None


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _slope(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return sigmoid * (1 + x * (1 - sigmoid))
    if activation == "gelu":
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return torch.special.ndtr(x) + x * density
    t = torch.tanh(_ROOT * (x + _CUBE * x**3))
    return (1 + t) / 2 + x / 2 * (1 - t * t) * _ROOT * (1 + 3 * _CUBE * x * x)


def forward(gate, up, activation):
    wide = torch.promote_types(torch.float32, gate.dtype)
    return (_activate(gate.to(wide), activation) * up.to(wide)).to(gate.dtype)


def backward(grad_h, gate, up, activation):
    """Gradients (dgate, dup)."""
    dtype, wide = gate.dtype, torch.promote_types(torch.float32, gate.dtype)
    grad_h, gate, up = grad_h.to(wide), gate.to(wide), up.to(wide)
    return (grad_h * up * _slope(gate, activation)).to(dtype), (grad_h * _activate(gate, activation)).to(dtype)
