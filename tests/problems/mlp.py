"""Problems of `lora_swiglu_mlp`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.problems.base import Problem, batch_of, drawer
from tests.problems.gated import ACTIVATIONS, ceiling
from tests.problems.group import Ranks, absolutes, compose_layer, draw_layers, has_dropout, nested


@dataclass
class MlpProblem(Problem):
    """y = down(act(gate(x)) ⊙ up(x)); `ranks` holds those of the adapters of gate, up and down."""

    m: tuple[int, ...] | int = 33
    hidden: int = 48
    intermediate: int = 40
    ranks: Ranks = ((5,), (3,), (4,))
    out: int | None = None
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    scalings: Any = 1.5
    activation: str = "silu"
    dropout_p: Any = 0.0
    seed: int = 1234
    device: str = "cpu"
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "lora_swiglu_mlp"

    def __post_init__(self) -> None:
        batch, draw, out = batch_of(self.m), drawer(self.seed, self.device), self.out or self.hidden
        sizes = [(self.intermediate, self.hidden)] * 2 + [(out, self.intermediate)]
        layers = draw_layers(draw, sizes, self.ranks, self.bias, self.dtype, self.adapter_dtype or self.dtype)
        self.tensors = {"x": draw(*batch, self.hidden, dtype=self.dtype), **layers}
        self.grad_y = draw(*batch, out, dtype=self.dtype).detach()
        self.activate = ACTIVATIONS[self.activation]

    @property
    def length(self) -> int:
        rows = self.tensors["x"].numel() // max(1, self.hidden)
        return 2 * self.hidden + 3 * self.intermediate + sum(map(sum, self.ranks)) + rows

    def arguments(self, t):
        biases = [t[f"biases.{j}"] for j in range(3)] if self.bias else None
        options = {
            "scalings": self.scalings, "biases": biases, "dropout_p": self.dropout_p, "activation": self.activation,
            "seed": self.seed if has_dropout(self) else None,
        }  # fmt: skip
        weights = [t[f"weights.{j}"] for j in range(3)]
        return (t["x"], weights, nested(t, "lora_As", self.ranks), nested(t, "lora_Bs", self.ranks)), options

    def compose(self, t):
        gate, up = (compose_layer(self, t["x"], t, j) for j in range(2))
        return compose_layer(self, self.activate(gate) * up, t, 2)

    def absolute(self) -> MlpProblem:
        twin = super().absolute()
        twin.scalings, twin.activate = absolutes(self.scalings), ceiling
        return twin
