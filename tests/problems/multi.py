"""Problems of `multi_lora_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.problems.base import Problem, batch_of, drawer, mask_of


def drawn_ids(rows: int, count: int, *, per_row: int = 1, seed: int = 5) -> Tensor:
    """[rows, per_row] ids in [-1, count), of which the last adapter gets none (unless it is the only one)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, max(1, count - 1), (rows, per_row), generator=generator)


@dataclass
class MultiLoraProblem(Problem):
    """y[m] = x[m] Wᵀ + b + Σ_i w[m, i] s_a (drop(x)[m] A_aᵀ) B_aᵀ with a = ids[m, i]. `ranks`: of each adapter, None
    for one that has nothing here. `ids`: [M] or [M, k]; None draws some. `mixed`: with adapter weights."""

    m: tuple[int, ...] | int = 33
    k: int = 48
    n: int = 40
    ranks: tuple[int | None, ...] = (5, 1, None, 8, 3)
    ids: Sequence | Tensor | None = None
    per_row: int = 1
    mixed: bool = False
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    scalings: Sequence[float] | None = None
    dropout_p: float | Sequence[float] = 0.0
    seed: int = 1234
    device: str = "cpu"
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "multi_lora_linear"

    def __post_init__(self) -> None:
        batch, draw, count = batch_of(self.m), drawer(self.seed, self.device), len(self.ranks)
        rows, several = int(torch.Size(batch).numel()), self.mixed or self.per_row > 1
        ids = drawn_ids(rows, count, per_row=self.per_row) if self.ids is None else torch.as_tensor(self.ids)
        self.choices = ids.reshape(rows, ids.shape[-1] if ids.ndim > 1 else 1).to(self.device)
        self.mixed = several or self.choices.shape[1] > 1
        self.ids = self.choices.reshape(*batch, -1) if self.mixed else self.choices.reshape(batch)
        self.scalings = self.scalings or [1.5 - 0.7 * a for a in range(count)]
        adapter_dtype = self.adapter_dtype or self.dtype
        self.tensors = {
            "x": draw(*batch, self.k, dtype=self.dtype),
            "weight": draw(self.n, self.k, scale=max(1, self.k) ** -0.5, dtype=self.dtype),
            "bias": draw(self.n, dtype=self.dtype) if self.bias else None,
        }
        if self.mixed:
            self.tensors["adapter_weights"] = draw(*self.ids.shape)
        for a, r in enumerate(self.ranks):
            if r is not None:
                self.tensors[f"lora_As.{a}"] = draw(r, self.k, scale=max(1, self.k) ** -0.5, dtype=adapter_dtype)
                self.tensors[f"lora_Bs.{a}"] = draw(self.n, r, scale=r**-0.5, dtype=adapter_dtype)
        self.grad_y = draw(*batch, self.n, dtype=self.dtype).detach()

    @property
    def length(self) -> int:
        return self.k + self.n + (max(r or 0 for r in self.ranks) + 2) * self.choices.shape[1] + len(self.choices)

    def probability(self, adapter: int) -> float:
        return self.dropout_p[adapter] if isinstance(self.dropout_p, Sequence) else self.dropout_p

    def factors(self, t, name: str) -> list[Tensor | None]:
        return [t.get(f"{name}.{a}") for a in range(len(self.ranks))]

    def arguments(self, t):
        dropout = any(self.probability(a) for a in range(len(self.ranks)))
        options = {
            "bias": t["bias"], "scalings": self.scalings, "adapter_weights": t.get("adapter_weights"),
            "dropout_p": self.dropout_p, "seed": self.seed if dropout else None,
        }  # fmt: skip
        return (t["x"], t["weight"], self.factors(t, "lora_As"), self.factors(t, "lora_Bs"), self.ids), options

    def compose(self, t):
        """PEFT's loop: base, then for each adapter its rows by index."""
        flat = t["x"].reshape(-1, self.k)
        y = F.linear(flat, t["weight"], t["bias"])
        masks = {p: mask_of(flat, p, self.seed) for p in {self.probability(a) for a in range(len(self.ranks))} if p}
        mix = t["adapter_weights"].reshape(self.choices.shape) if self.mixed else None
        for a, r in enumerate(self.ranks):
            if r is None:
                continue
            p = self.probability(a)
            dropped = flat * masks[p] if p else flat
            lora_A, lora_B = t[f"lora_As.{a}"].to(flat.dtype), t[f"lora_Bs.{a}"].to(flat.dtype)
            for i in range(self.choices.shape[1]):
                rows = (self.choices[:, i] == a).nonzero().squeeze(1)
                update = self.scalings[a] * F.linear(F.linear(dropped[rows], lora_A), lora_B)
                if mix is not None:
                    update = update * mix[rows, i].unsqueeze(1).to(flat.dtype)
                y = y.index_add(0, rows, update)
        return y.reshape(*t["x"].shape[:-1], self.n)

    def absolute(self) -> MultiLoraProblem:
        twin = super().absolute()
        twin.scalings = [abs(scaling) for scaling in self.scalings]
        return twin
