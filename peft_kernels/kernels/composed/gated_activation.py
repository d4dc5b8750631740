"""`gated_activation` from PyTorch's own kernels for activations and their derivatives, in two passes each way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported(problem) -> str | None:
    return None


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate=_approximate(activation))


def _approximate(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"


def forward(gate, up, activation):
    return _activate(gate, activation).mul_(up)


def backward(grad_h, gate, up, activation):
    grad_gate = grad_h * up
    if activation == "silu":
        grad_gate = torch.ops.aten.silu_backward(grad_gate, gate)
    else:
        grad_gate = torch.ops.aten.gelu_backward(grad_gate, gate, approximate=_approximate(activation))
    return grad_gate, _activate(gate, activation).mul_(grad_h)
