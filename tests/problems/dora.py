"""Problems of `dora_linear`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.problems.base import drawer
from tests.problems.lora import LoraProblem


@dataclass
class DoraProblem(LoraProblem):
    """y = g (x Wᵀ + s drop(x) Aᵀ Bᵀ) + b, g = magnitude / ‖W + s B A‖, the norm a constant."""

    weight_norm: Tensor | None = None  # given to the call; None lets the library compute it

    op = "dora_linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        draw = drawer(self.seed + 1, self.device)
        adapter_dtype = self.adapter_dtype or self.dtype
        magnitude = draw(self.n, dtype=torch.float64).detach() * 0.3 + 1.5
        self.tensors["magnitude"] = magnitude.to(adapter_dtype).requires_grad_()

    def norm(self, t) -> Tensor:
        """Row norms of the matrix itself, in at least float32, without a gradient."""
        wide = torch.promote_types(torch.float32, t["weight"].dtype)
        weight, a, b = (t[name].detach().to(wide) for name in ("weight", "lora_A", "lora_B"))
        return (weight + self.scaling * (b @ a)).norm(dim=1)

    def arguments(self, t):
        args, options = super().arguments(t)
        if self.weight_norm is not None:
            options["weight_norm"] = self.weight_norm
        return (*args, t["magnitude"]), options

    def compose(self, t):
        norm = self.norm(t) if self.weight_norm is None else self.weight_norm
        g = (t["magnitude"] / norm).to(t["x"].dtype)
        y = g * (F.linear(t["x"], t["weight"]) + self.low_rank(t))
        return y if t["bias"] is None else y + t["bias"]

    def absolute(self) -> DoraProblem:
        twin = super().absolute()
        exact = {name: tensor if tensor is None else tensor.double() for name, tensor in self.tensors.items()}
        twin.weight_norm = self.norm(exact) if self.weight_norm is None else self.weight_norm
        return twin
