"""Problems of `lora_linear`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.problems.base import Problem, batch_of, drawer, mask_of


@dataclass
class LoraProblem(Problem):
    """y = x Wᵀ + b + s (drop(x) Aᵀ Bᵀ + lora_bias), the update only where token_mask holds."""

    m: tuple[int, ...] | int = 33
    k: int = 48
    n: int = 40
    r: int = 5
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    scaling: float = 1.5
    dropout_p: float = 0.0
    seed: int = 1234
    device: str = "cpu"
    lora_bias: bool = False
    token_mask: Tensor | None = None
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "lora_linear"

    def __post_init__(self) -> None:
        batch, draw = batch_of(self.m), drawer(self.seed, self.device)
        adapter_dtype = self.adapter_dtype or self.dtype
        self.tensors = {
            "x": draw(*batch, self.k, dtype=self.dtype),
            "weight": draw(self.n, self.k, scale=max(1, self.k) ** -0.5, dtype=self.dtype),
            "bias": draw(self.n, dtype=self.dtype) if self.bias else None,
            "lora_A": draw(self.r, self.k, scale=max(1, self.k) ** -0.5, dtype=adapter_dtype),
            "lora_B": draw(self.n, self.r, scale=self.r**-0.5, dtype=adapter_dtype),
        }
        self.grad_y = draw(*batch, self.n, dtype=self.dtype).detach()
        if self.lora_bias:
            self.tensors["lora_bias"] = draw(self.n, dtype=adapter_dtype)

    @property
    def length(self) -> int:
        return self.k + self.n + self.r + self.tensors["x"].numel() // max(1, self.k)

    def arguments(self, t):
        options = {
            "bias": t["bias"], "scaling": self.scaling, "dropout_p": self.dropout_p,
            "seed": self.seed if self.dropout_p else None,
        }  # fmt: skip
        if self.lora_bias:
            options["lora_bias"] = t["lora_bias"]
        if self.token_mask is not None:
            options["token_mask"] = self.token_mask
        return (t["x"], t["weight"], t["lora_A"], t["lora_B"]), options

    def mask(self) -> Tensor:
        """drop(1): 0 or 1 / (1 - p) for each element of x."""
        return mask_of(self.tensors["x"].double(), self.dropout_p, self.seed)

    def low_rank(self, t) -> Tensor:
        """s (drop(x) Aᵀ Bᵀ + lora_bias), 0 in rows that token_mask leaves out."""
        x, dropped = t["x"], t["x"]
        if self.dropout_p:
            dropped = x * self.mask().to(x.dtype)
        shift = t["lora_bias"].to(x.dtype) if self.lora_bias else None
        update = self.scaling * F.linear(F.linear(dropped, t["lora_A"].to(x.dtype)), t["lora_B"].to(x.dtype), shift)
        return update if self.token_mask is None else torch.where(self.token_mask.unsqueeze(-1), update, 0.0)

    def compose(self, t):
        return F.linear(t["x"], t["weight"], t["bias"]) + self.low_rank(t)

    def absolute(self) -> LoraProblem:
        twin = super().absolute()
        twin.scaling = abs(self.scaling)
        return twin
