"""Problems of the ops over pruned weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.mask import PackedMask, pack
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import Positions
from peft_kernels.problems import nf4_decoded
from peft_kernels.problems.pruned import by_rows
from tests.problems.base import Problem, batch_of, drawer
from tests.problems.lora import LoraProblem
from tests.problems.nf4 import part_of


def drawn_mask(n: int, k: int, density: float, seed: int = 7, device: str = "cpu") -> Tensor:
    """bool [n, k], about `density` of it True; of densities between 0 and 1 the second row is empty."""
    kept = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < density
    if 0 < density < 1 and n > 1:
        kept[1] = False
    return kept.to(device)


@dataclass
class MaskedProblem(Problem):
    """y = x (W ⊙ M)ᵀ + b, with a weight that is not 0 outside the mask unless it is `clean`; dense or NF4, which is
    frozen. `compact`: the weight's gradient is that of `values`."""

    m: tuple[int, ...] | int = 33
    k: int = 48
    n: int = 40
    dtype: torch.dtype = torch.float32
    density: float = 0.5
    bias: bool = True
    clean: bool = False
    compact: bool = False
    nf4: bool = False
    seed: int = 1234
    device: str = "cpu"
    kept: Tensor = field(init=False, repr=False)
    mask: PackedMask = field(init=False, repr=False)
    weight: Tensor | NF4Weight | None = field(init=False, repr=False, default=None)
    places: Positions | None = field(init=False, repr=False, default=None)
    is_absolute: bool = field(init=False, repr=False, default=False)
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "masked_linear"

    def __post_init__(self) -> None:
        batch, draw = batch_of(self.m), drawer(self.seed, self.device)
        self.kept = drawn_mask(self.n, self.k, self.density, self.seed, self.device)
        self.mask = pack(self.kept)
        weight = draw(self.n, self.k, scale=max(1, self.k) ** -0.5, dtype=self.dtype)
        if self.clean or self.compact:
            weight = torch.where(self.kept, weight.detach(), 0.0).requires_grad_()
        self.tensors = {"x": draw(*batch, self.k, dtype=self.dtype)}
        if self.nf4:
            self.weight = part_of("whole", self.n, self.k, seed=self.seed, device=self.device)
        elif self.compact:
            self.weight, self.places = weight.detach(), self.mask.positions()
            self.tensors["values"] = self.weight[self.kept].requires_grad_()
        else:
            self.tensors["weight"] = weight
        self.tensors["bias"] = draw(self.n, dtype=self.dtype) if self.bias else None
        self.grad_y = draw(*batch, self.n, dtype=self.dtype).detach()

    @property
    def length(self) -> int:
        return self.k + self.n + self.tensors["x"].numel() // max(1, self.k)

    def arguments(self, t):
        options = {"weight_is_masked": self.clean}
        if self.compact:
            options |= {"grad_layout": "compact", "values": t["values"], "places": self.places}
        return (t["x"], t.get("weight", self.weight), self.mask), {"bias": t["bias"], **options}

    def dense(self, t) -> Tensor:
        """W ⊙ M by PyTorch's own product."""
        dtype = t["x"].dtype
        if self.compact:
            return torch.zeros_like(self.kept, dtype=dtype).masked_scatter(self.kept, t["values"])
        if isinstance(self.weight, NF4Weight):
            decoded = nf4_decoded(self.weight, self.dtype).to(dtype)
            return (decoded.abs() if self.is_absolute else decoded) * self.kept
        return t["weight"] * self.kept

    def compose(self, t):
        return F.linear(t["x"], self.dense(t), t["bias"])

    def absolute(self) -> MaskedProblem:
        twin = super().absolute()
        twin.is_absolute = True
        return twin


@dataclass
class MaskedLoraProblem(LoraProblem):
    """y = x (W ⊙ M)ᵀ + b + s drop(x) Δᵀ with Δ = B A, or (B A) ⊙ M. W is frozen, dense or NF4."""

    density: float = 0.5
    update_masked: bool = False
    clean: bool = False
    nf4: bool = False
    kept: Tensor = field(init=False, repr=False)
    packed: PackedMask = field(init=False, repr=False)
    weight: Tensor | NF4Weight = field(init=False, repr=False)

    op = "masked_lora_linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.kept = drawn_mask(self.n, self.k, self.density, self.seed, self.device)
        self.packed = pack(self.kept)
        del self.tensors["weight"]  # frozen, and the same whatever the number of rows
        draw = drawer(self.seed + 1, self.device)
        weight = draw(self.n, self.k, scale=max(1, self.k) ** -0.5, dtype=self.dtype).detach()
        self.weight = torch.where(self.kept, weight, 0.0) if self.clean else weight
        self.is_absolute = False
        if self.nf4:
            self.weight = part_of("whole", self.n, self.k, seed=self.seed, device=self.device)

    def arguments(self, t):
        (x, _, lora_A, lora_B), options = super().arguments({**t, "weight": None})
        options |= {"update_masked": self.update_masked, "weight_is_masked": self.clean}
        return (x, self.weight, self.packed, lora_A, lora_B), options

    def compose(self, t):
        x = t["x"]
        dense = nf4_decoded(self.weight, self.dtype) if isinstance(self.weight, NF4Weight) else self.weight
        dense = (dense.abs() if self.is_absolute else dense).to(x.dtype)
        y = F.linear(x, dense * self.kept, t["bias"])
        if not self.update_masked:
            return y + self.low_rank(t)
        dropped = x * self.mask().to(x.dtype) if self.dropout_p else x
        update = (t["lora_B"].to(x.dtype) @ t["lora_A"].to(x.dtype)) * self.kept
        return y + self.scaling * F.linear(dropped, update)

    def absolute(self) -> MaskedLoraProblem:
        twin = super().absolute()
        twin.is_absolute = True
        return twin


@dataclass
class MultiMaskProblem(Problem):
    """y[m] = x[m] (W ⊙ M_i)ᵀ + b, some rows without a mask, one mask without rows, one that keeps nothing."""

    m: tuple[int, ...] | int = 33
    k: int = 48
    n: int = 40
    dtype: torch.dtype = torch.float32
    densities: tuple[float, ...] = (0.5, 0.1, 0.0, 0.9)
    bias: bool = True
    seed: int = 1234
    device: str = "cpu"
    kept: list[Tensor] = field(init=False, repr=False)
    ids: Tensor = field(init=False, repr=False)
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "multi_mask_linear"

    def __post_init__(self) -> None:
        batch, draw = batch_of(self.m), drawer(self.seed, self.device)
        self.kept = [drawn_mask(self.n, self.k, d, self.seed + i, self.device) for i, d in enumerate(self.densities)]
        numbers = torch.randint(-1, len(self.kept), batch, generator=torch.Generator().manual_seed(self.seed))
        self.ids = torch.where(numbers == 1, -1, numbers).to(self.device)
        self.tensors = {
            "x": draw(*batch, self.k, dtype=self.dtype),
            "weight": draw(self.n, self.k, scale=max(1, self.k) ** -0.5, dtype=self.dtype),
            "bias": draw(self.n, dtype=self.dtype) if self.bias else None,
        }
        self.grad_y = draw(*batch, self.n, dtype=self.dtype).detach()

    @property
    def length(self) -> int:
        return self.k + self.n + self.tensors["x"].numel() // max(1, self.k)

    def arguments(self, t):
        return (t["x"], t["weight"], [pack(kept) for kept in self.kept], self.ids), {"bias": t["bias"]}

    def compose(self, t):
        return by_rows(t["x"], t["weight"], self.kept, self.ids, t["bias"])
