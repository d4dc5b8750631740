"""The hard-concrete gate: a number in [0, 1] for each place, exactly 0 or 1 with some probability, that trains.

Louizos, Welling and Kingma 2018, https://arxiv.org/abs/1712.01312, as diff pruning uses it:
z = clamp(σ((log u - log(1 - u) + log α) / β) (ζ - γ) + γ, 0, 1) with u uniform, β = 2/3, γ = -0.1, ζ = 1.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sampled(log_alpha: Tensor) -> Tensor:
    """A draw of z, from torch's generator of the device; differentiable in log α."""
    eps = torch.finfo(log_alpha.dtype).eps
    u = torch.rand_like(log_alpha).clamp_(eps, 1 - eps)
    return _stretched(torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / BETA))


def settled(log_alpha: Tensor) -> Tensor:
    """z without chance, as in evaluation: clamp(σ(log α) (ζ - γ) + γ, 0, 1)."""
    return _stretched(torch.sigmoid(log_alpha))


def probability(log_alpha: Tensor) -> Tensor:
    """How likely z is not 0: σ(log α - β log(-γ / ζ)), what the L0 penalty sums."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def _stretched(s: Tensor) -> Tensor:
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
