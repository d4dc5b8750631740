"""Problems of `lora_expert_linear`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.problems.base import Problem, drawer, mask_of


@dataclass
class ExpertProblem(Problem):
    """Expert e has counts[e] rows of x; the last `orphans` rows belong to nobody."""

    counts: tuple[int, ...] = (9, 0, 17, 7)
    k: int = 48
    n: int = 40
    r: int = 5
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    scaling: float = 1.5
    dropout_p: float = 0.0
    orphans: int = 0
    seed: int = 1234
    device: str = "cpu"
    offsets: Tensor = field(init=False, repr=False)
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "lora_expert_linear"

    def __post_init__(self) -> None:
        draw, e, m = drawer(self.seed, self.device), len(self.counts), sum(self.counts) + self.orphans
        self.offsets = torch.tensor(self.counts, device=self.device).cumsum(0).to(torch.int32)
        adapter_dtype = self.adapter_dtype or self.dtype
        self.tensors = {
            "x": draw(m, self.k, dtype=self.dtype),
            "weight": draw(e, self.n, self.k, scale=max(1, self.k) ** -0.5, dtype=self.dtype),
            "bias": draw(e, self.n, dtype=self.dtype) if self.bias else None,
            "lora_A": draw(e, self.r, self.k, scale=max(1, self.k) ** -0.5, dtype=adapter_dtype),
            "lora_B": draw(e, self.n, self.r, scale=self.r**-0.5, dtype=adapter_dtype),
        }
        self.grad_y = draw(m, self.n, dtype=self.dtype).detach()

    @property
    def length(self) -> int:
        return self.k + self.n + self.r + max(self.counts, default=0)

    def arguments(self, t):
        options = {
            "bias": t["bias"], "scaling": self.scaling, "dropout_p": self.dropout_p,
            "seed": self.seed if self.dropout_p else None,
        }  # fmt: skip
        return (t["x"], t["weight"], t["lora_A"], t["lora_B"], self.offsets), options

    def compose(self, t):
        x, start, ys = t["x"], 0, []
        dropped = x * mask_of(x, self.dropout_p, self.seed) if self.dropout_p else x
        for e, count in enumerate(self.counts):
            rows = slice(start, start + count)
            a, b = t["lora_A"][e].to(x.dtype), t["lora_B"][e].to(x.dtype)
            bias = None if t["bias"] is None else t["bias"][e]
            update = self.scaling * F.linear(F.linear(dropped[rows], a), b)
            ys.append(F.linear(x[rows], t["weight"][e], bias) + update)
            start += count
        return torch.cat([*ys, x.new_zeros(self.orphans, self.n)])

    def absolute(self) -> ExpertProblem:
        twin = super().absolute()
        twin.scaling = abs(self.scaling)
        return twin
