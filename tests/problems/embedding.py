"""Problems of `lora_embedding`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.problems.base import Problem, batch_of, drawer


@dataclass
class EmbeddingProblem(Problem):
    """y = W[ids] + s A[:, ids]ᵀ Bᵀ. Half of the ids are drawn from the first three rows, so that they repeat."""

    m: tuple[int, ...] | int = 33
    v: int = 29
    d: int = 40
    r: int = 5
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    scaling: float = 1.5
    padding_idx: int | None = None
    ids_dtype: torch.dtype = torch.int64
    seed: int = 1234
    device: str = "cpu"
    ids: Tensor = field(init=False, repr=False)
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "lora_embedding"

    def __post_init__(self) -> None:
        batch, draw = batch_of(self.m), drawer(self.seed, self.device)
        generator = torch.Generator().manual_seed(self.seed)
        wide = torch.randint(0, self.v, batch, generator=generator)
        often = torch.rand(batch, generator=generator) < 0.5
        self.ids = torch.where(often, wide % min(3, self.v), wide).to(self.ids_dtype).to(self.device)
        adapter_dtype = self.adapter_dtype or self.dtype
        self.tensors = {
            "weight": draw(self.v, self.d, dtype=self.dtype),
            "lora_A": draw(self.r, self.v, dtype=adapter_dtype),
            "lora_B": draw(self.d, self.r, scale=self.r**-0.5, dtype=adapter_dtype),
        }
        self.grad_y = draw(*batch, self.d, dtype=self.dtype).detach()

    @property
    def length(self) -> int:
        return self.d + self.r + self.ids.numel()

    def arguments(self, t):
        options = {"scaling": self.scaling}
        if self.padding_idx is not None:
            options["padding_idx"] = self.padding_idx
        return (self.ids, t["weight"], t["lora_A"], t["lora_B"]), options

    def compose(self, t):
        dtype = t["weight"].dtype
        after_a = F.embedding(self.ids, t["lora_A"].to(dtype).t(), self.padding_idx)
        update = after_a @ t["lora_B"].to(dtype).t()
        return F.embedding(self.ids, t["weight"], self.padding_idx) + self.scaling * update

    def absolute(self) -> EmbeddingProblem:
        twin = super().absolute()
        twin.scaling = abs(self.scaling)
        return twin
