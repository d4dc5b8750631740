"""Problems of `gated_activation`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.problems.base import Problem, drawer

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def ceiling(x: Tensor) -> Tensor:
    """For x >= 0, more than each |act(x)|, with a derivative larger than what slope and curvature make of the terms
    that x is summed of (|act'| <= 1.13, |act''| <= 0.8)."""
    return 1.13 * x + 0.4 * x * x


@dataclass
class GatedProblem(Problem):
    """h = act(gate) ⊙ up."""

    shape: tuple[int, ...] = (33, 40)
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    seed: int = 1234
    device: str = "cpu"
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "gated_activation"

    def __post_init__(self) -> None:
        draw = drawer(self.seed, self.device)
        self.tensors = {name: draw(*self.shape, scale=2.0, dtype=self.dtype) for name in ("gate", "up")}
        self.grad_y = draw(*self.shape, dtype=self.dtype).detach()
        self.activate = ACTIVATIONS[self.activation]

    @property
    def length(self) -> int:
        return 4

    def arguments(self, t):
        return (t["gate"], t["up"]), {"activation": self.activation}

    def compose(self, t):
        return self.activate(t["gate"]) * t["up"]

    def absolute(self) -> GatedProblem:
        twin = super().absolute()
        twin.activate = ceiling
        return twin
