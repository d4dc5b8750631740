"""Problems of `lora_linear_group`, and layers with several adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.problems.base import Problem, batch_of, drawer, mask_of

Ranks = tuple[tuple[int, ...], ...]


def draw_layers(draw, sizes: Sequence[tuple[int, int]], ranks: Ranks, biases, dtype, adapter_dtype) -> dict[str, Any]:
    """Tensors of layers of (out_features, in_features), by names such as "lora_As.1.0": adapter 0 of layer 1."""
    tensors: dict[str, Any] = {}
    for j, (n, k) in enumerate(sizes):
        tensors[f"weights.{j}"] = draw(n, k, scale=max(1, k) ** -0.5, dtype=dtype)
        if biases:
            tensors[f"biases.{j}"] = draw(n, dtype=dtype)
        for i, r in enumerate(ranks[j]):
            tensors[f"lora_As.{j}.{i}"] = draw(r, k, scale=max(1, k) ** -0.5, dtype=adapter_dtype)
            tensors[f"lora_Bs.{j}.{i}"] = draw(n, r, scale=r**-0.5, dtype=adapter_dtype)
    return tensors


def nested(t: dict[str, Any], name: str, ranks: Ranks) -> tuple:
    """The tensors `name`.j.i as the functions take them: None for no adapter, one tensor, or a list of several."""
    entries = [[t[f"{name}.{j}.{i}"] for i in range(len(ranks[j]))] for j in range(len(ranks))]
    return tuple(None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries)


def per_adapter(value: Any, ranks: Ranks, j: int, i: int) -> float:
    """Entry of a number for all, a sequence over layers, or a nested sequence over layers and adapters."""
    if isinstance(value, Sequence):
        value = value[j]
        if isinstance(value, Sequence):
            value = value[i]
    return value


def compose_layer(problem, x: Tensor, t: dict[str, Any], j: int, token_mask: Tensor | None = None) -> Tensor:
    """Layer j as PEFT computes it: the base, then one adapter after the other; adapter i of all has seed + i."""
    y = F.linear(x, t[f"weights.{j}"], t.get(f"biases.{j}"))
    first = sum(len(ranks) for ranks in problem.ranks[:j])
    for i in range(len(problem.ranks[j])):
        p = per_adapter(problem.dropout_p, problem.ranks, j, i)
        dropped = x * mask_of(x, p, problem.seed + first + i) if p else x
        a, b = (t[f"lora_{m}s.{j}.{i}"].to(x.dtype) for m in "AB")
        update = per_adapter(problem.scalings, problem.ranks, j, i) * F.linear(F.linear(dropped, a), b)
        y = y + (update if token_mask is None else torch.where(token_mask.unsqueeze(-1), update, 0.0))
    return y


def absolutes(value: Any) -> Any:
    """Every number of a nesting replaced by its absolute value."""
    if isinstance(value, Sequence):
        return [absolutes(entry) for entry in value]
    return value if value is None else abs(value)


def has_dropout(problem) -> bool:
    ranks = problem.ranks
    return any(per_adapter(problem.dropout_p, ranks, j, i) for j in range(len(ranks)) for i in range(len(ranks[j])))


@dataclass
class GroupProblem(Problem):
    """y_j = x W_jᵀ + b_j + Σ_i s_i (drop_i(x) A_iᵀ) B_iᵀ. `ranks` holds those of each projection's adapters."""

    m: tuple[int, ...] | int = 33
    k: int = 48
    ns: tuple[int, ...] = (40, 24, 17)
    ranks: Ranks = ((5,), (), (3, 8))
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    scalings: Any = 1.5
    dropout_p: Any = 0.0
    seed: int = 1234
    device: str = "cpu"
    token_mask: Tensor | None = None
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: tuple[Tensor | None, ...] = field(init=False, repr=False)

    op = "lora_linear_group"

    def __post_init__(self) -> None:
        batch, draw = batch_of(self.m), drawer(self.seed, self.device)
        sizes = [(n, self.k) for n in self.ns]
        layers = draw_layers(draw, sizes, self.ranks, self.bias, self.dtype, self.adapter_dtype or self.dtype)
        self.tensors = {"x": draw(*batch, self.k, dtype=self.dtype), **layers}
        self.grad_y = tuple(draw(*batch, n, dtype=self.dtype).detach() for n in self.ns)

    @property
    def length(self) -> int:
        return self.k + sum(self.ns) + sum(map(sum, self.ranks)) + self.tensors["x"].numel() // max(1, self.k)

    def arguments(self, t):
        layers = range(len(self.ns))
        biases = [t[f"biases.{j}"] for j in layers] if self.bias else None
        options = {
            "scalings": self.scalings, "biases": biases, "dropout_p": self.dropout_p,
            "seed": self.seed if has_dropout(self) else None,
        }  # fmt: skip
        if self.token_mask is not None:
            options["token_mask"] = self.token_mask
        weights = [t[f"weights.{j}"] for j in layers]
        return (t["x"], weights, nested(t, "lora_As", self.ranks), nested(t, "lora_Bs", self.ranks)), options

    def compose(self, t):
        return tuple(compose_layer(self, t["x"], t, j, self.token_mask) for j in range(len(self.ns)))

    def absolute(self) -> GroupProblem:
        twin = super().absolute()
        twin.scalings = absolutes(self.scalings)
        return twin
