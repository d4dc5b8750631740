"""Problems of `sparse_delta_linear`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import Positions
from peft_kernels.formats.sparse_delta import prepare
from peft_kernels.problems import nf4_decoded
from tests.problems.base import Problem, batch_of, drawer
from tests.problems.masked import drawn_mask
from tests.problems.nf4 import part_of


@dataclass
class SparseDeltaProblem(Problem):
    """y = x (W + Δ)ᵀ + b. `deltas`: None for one, else how many rows choose from, of which the last has no row, and
    some rows have none; the first is empty where there are three. `adapter_dtype`: of the values, None for x's.
    `nf4`: a frozen weight of 4 bits."""

    m: tuple[int, ...] | int = 33
    k: int = 48
    n: int = 40
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    density: float = 0.1
    bias: bool = True
    deltas: int | None = None
    nf4: bool = False
    seed: int = 1234
    device: str = "cpu"
    weight: Tensor | NF4Weight | None = field(init=False, repr=False, default=None)
    places: list[Positions] = field(init=False, repr=False)
    ids: Tensor | None = field(init=False, repr=False, default=None)
    is_absolute: bool = field(init=False, repr=False, default=False)
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "sparse_delta_linear"

    def __post_init__(self) -> None:
        batch, draw = batch_of(self.m), drawer(self.seed, self.device)
        scale = max(1, self.k) ** -0.5
        self.tensors = {"x": draw(*batch, self.k, dtype=self.dtype)}
        if self.nf4:
            self.weight = part_of("whole", self.n, self.k, seed=self.seed, device=self.device)
        else:
            self.tensors["weight"] = draw(self.n, self.k, scale=scale, dtype=self.dtype)
        self.tensors["bias"] = draw(self.n, dtype=self.dtype) if self.bias else None
        self.places = []
        for i in range(1 if self.deltas is None else self.deltas):
            density = 0.0 if i == 0 and (self.deltas or 0) > 2 else self.density
            kept = drawn_mask(self.n, self.k, density, self.seed + i, self.device)
            self.places.append(prepare(kept.flatten().nonzero().squeeze(1), kept.shape)[0])
            name = "values" if self.deltas is None else f"values.{i}"
            self.tensors[name] = draw(self.places[i].flat.numel(), scale=scale, dtype=self.adapter_dtype or self.dtype)
        if self.deltas is not None:
            drawn = torch.rand(batch, generator=torch.Generator().manual_seed(self.seed))
            self.ids = (drawn * self.deltas).long().sub(1).to(self.device)  # -1 to deltas - 2
        self.grad_y = draw(*batch, self.n, dtype=self.dtype).detach()

    @property
    def length(self) -> int:
        return self.k + self.n + self.tensors["x"].numel() // max(1, self.k)

    def _values(self, t) -> list[Tensor]:
        return [tensor for name, tensor in t.items() if name.startswith("values")]

    def arguments(self, t):
        weight = t.get("weight", self.weight)
        if self.ids is None:
            return (t["x"], weight, self.places[0], t["values"]), {"bias": t["bias"]}
        return (t["x"], weight, self.places, self._values(t)), {"bias": t["bias"], "delta_ids": self.ids}

    def _weight(self, t) -> Tensor:
        if not isinstance(self.weight, NF4Weight):
            return t["weight"]
        decoded = nf4_decoded(self.weight, self.dtype).to(t["x"].dtype)
        return decoded.abs() if self.is_absolute else decoded

    def _sum(self, weight: Tensor, i: int, values: Tensor) -> Tensor:
        """W + Δ as PEFT's SHiRA adds it, rounded to x's dtype."""
        flat = self.places[i].flat.long()
        dense = torch.zeros(weight.shape, dtype=values.dtype, device=values.device)
        return (weight + dense.flatten().index_put((flat,), values).view(weight.shape)).to(weight.dtype)

    def compose(self, t):
        x, weight, values = t["x"], self._weight(t), self._values(t)
        if self.ids is None:
            return F.linear(x, self._sum(weight, 0, values[0]), t["bias"])
        y = F.linear(x, weight, t["bias"])
        for i, own in enumerate(values):
            mine = F.linear(x, self._sum(weight, i, own), t["bias"])
            y = torch.where((self.ids == i).unsqueeze(-1), mine, y)
        return y

    def absolute(self) -> SparseDeltaProblem:
        twin = super().absolute()
        twin.is_absolute = True
        return twin
