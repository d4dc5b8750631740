"""Problems of `multi_lora_expert_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.problems.base import Problem, drawer, mask_of
from tests.problems.multi import drawn_ids


@dataclass
class MultiExpertProblem(Problem):
    """Expert e has counts[e] rows of x; the last `orphans` rows belong to nobody. `ranks`, `ids`, `per_row`: as in
    `MultiLoraProblem`."""

    counts: tuple[int, ...] = (9, 0, 17, 7)
    k: int = 48
    n: int = 40
    ranks: tuple[int | None, ...] = (5, 1, None, 8, 3)
    ids: Sequence | Tensor | None = None
    per_row: int = 1
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    scalings: Sequence[float] | None = None
    dropout_p: float | Sequence[float] = 0.0
    orphans: int = 0
    seed: int = 1234
    device: str = "cpu"
    offsets: Tensor = field(init=False, repr=False)
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "multi_lora_expert_linear"

    def __post_init__(self) -> None:
        draw, e, m, count = drawer(self.seed, self.device), len(self.counts), self.rows, len(self.ranks)
        ids = drawn_ids(m, count, per_row=self.per_row) if self.ids is None else torch.as_tensor(self.ids)
        self.ids = (ids if self.per_row > 1 else ids.reshape(m)).to(self.device)
        self.offsets = torch.tensor(self.counts, device=self.device).cumsum(0).to(torch.int32)
        self.scalings = self.scalings or [1.5 - 0.7 * a for a in range(count)]
        adapter_dtype = self.adapter_dtype or self.dtype
        self.tensors = {
            "x": draw(m, self.k, dtype=self.dtype),
            "weight": draw(e, self.n, self.k, scale=max(1, self.k) ** -0.5, dtype=self.dtype),
            "bias": draw(e, self.n, dtype=self.dtype) if self.bias else None,
        }
        if self.per_row > 1:
            self.tensors["adapter_weights"] = draw(*self.ids.shape)
        for a, r in enumerate(self.ranks):
            if r is not None:
                self.tensors[f"lora_As.{a}"] = draw(e, r, self.k, scale=max(1, self.k) ** -0.5, dtype=adapter_dtype)
                self.tensors[f"lora_Bs.{a}"] = draw(e, self.n, r, scale=r**-0.5, dtype=adapter_dtype)
        self.grad_y = draw(m, self.n, dtype=self.dtype).detach()

    @property
    def rows(self) -> int:
        return sum(self.counts) + self.orphans

    @property
    def length(self) -> int:
        return self.k + self.n + (max(r or 0 for r in self.ranks) + 2) * self.per_row + max(self.counts, default=0)

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
        factors = self.factors(t, "lora_As"), self.factors(t, "lora_Bs")
        return (t["x"], t["weight"], *factors, self.offsets, self.ids), options

    def compose(self, t):
        """Each expert on its rows, and for each adapter those of them that chose it."""
        x, ids = t["x"], self.ids.reshape(self.rows, self.per_row)
        masks = {p: mask_of(x, p, self.seed) for p in {self.probability(a) for a in range(len(self.ranks))} if p}
        y = x.new_zeros(self.rows, self.n)
        expert = torch.arange(self.rows, device=x.device).unsqueeze(1) >= self.offsets
        expert = expert.sum(1)  # how many have ended before the row
        for e in range(len(self.counts)):
            own = (expert == e).nonzero().squeeze(1)
            bias = None if t["bias"] is None else t["bias"][e]
            y = y.index_add(0, own, F.linear(x[own], t["weight"][e], bias))
            for a, r in enumerate(self.ranks):
                if r is None:
                    continue
                dropped = x * masks[self.probability(a)] if self.probability(a) else x
                lora_A, lora_B = (t[f"lora_{side}s.{a}"][e].to(x.dtype) for side in "AB")
                for i in range(self.per_row):
                    rows = own[ids[own, i] == a]
                    update = self.scalings[a] * F.linear(F.linear(dropped[rows], lora_A), lora_B)
                    if self.per_row > 1:
                        update = update * t["adapter_weights"][rows, i].unsqueeze(1).to(x.dtype)
                    y = y.index_add(0, rows, update)
        return y

    def absolute(self) -> MultiExpertProblem:
        twin = super().absolute()
        twin.scalings = [abs(scaling) for scaling in self.scalings]
        return twin
