"""Problems of `sparse_linear`, in every layout."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats import sparse
from peft_kernels.formats.mask import pack
from peft_kernels.formats.sparse import BlockWeight, SparseWeight
from peft_kernels.problems import nf4_decoded
from tests.problems.base import Problem, batch_of, drawer
from tests.problems.masked import drawn_mask
from tests.problems.nf4 import part_of


def drawn_blocks(n: int, k: int, block: int, density: float, seed: int) -> Tensor:
    """bool [n, k], whole blocks of it True; with densities between 0 and 1 the second block row is empty."""
    rows, columns = -(-n // block), -(-k // block)
    tiles = drawn_mask(rows, columns, density, seed)
    return tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]


def two_of_four(n: int, k: int, seed: int) -> Tensor:
    """bool [n, k], at most two of every four neighbours in a row."""
    scores = torch.rand(n, -(-k // 4), 4, generator=torch.Generator().manual_seed(seed))
    return (scores.argsort(2).argsort(2) < 2).flatten(1)[:, :k]


@dataclass
class SparseProblem(Problem):
    """y = x Wᵀ + b with a compressed W. Of layout "block" the values train; others are frozen."""

    m: tuple[int, ...] | int = 33
    k: int = 48
    n: int = 40
    dtype: torch.dtype = torch.float32
    layout: str = "block"
    density: float = 0.5
    block: int = 32
    bias: bool = True
    nf4: bool = False
    seed: int = 1234
    device: str = "cpu"
    weight: SparseWeight = field(init=False, repr=False)
    decoded: Tensor = field(init=False, repr=False)
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "sparse_linear"

    def __post_init__(self) -> None:
        batch, draw = batch_of(self.m), drawer(self.seed, self.device)
        kept = self.drawn().to(self.device)
        dense = draw(self.n, self.k, scale=max(1, self.k) ** -0.5, dtype=self.dtype).detach()
        self.tensors = {"x": draw(*batch, self.k, dtype=self.dtype)}
        if self.nf4:
            q = part_of("whole", self.n, self.k, seed=self.seed, device=self.device)
            self.weight = sparse.compress(q, "bitmap", mask=pack(kept))
            dense = nf4_decoded(q, self.dtype)
        else:
            self.weight = sparse.compress(dense, self.layout, block=self.block, mask=pack(kept))
        self.decoded = torch.where(kept, dense, 0)
        if isinstance(self.weight, BlockWeight):
            self.tensors["values"] = self.weight.values.clone().requires_grad_()
        self.tensors["bias"] = draw(self.n, dtype=self.dtype) if self.bias else None
        self.grad_y = draw(*batch, self.n, dtype=self.dtype).detach()

    def drawn(self) -> Tensor:
        if self.layout == "block" and not self.nf4:
            return drawn_blocks(self.n, self.k, self.block, self.density, self.seed)
        if self.layout == "2:4":
            return two_of_four(self.n, self.k, self.seed)
        return drawn_mask(self.n, self.k, self.density, self.seed)

    @property
    def length(self) -> int:
        return self.k + self.n + self.tensors["x"].numel() // max(1, self.k)

    def arguments(self, t):
        weight = self.weight
        if "values" in t:
            weight = weight.with_tensors([t["values"], *weight.tensors[1:]])
        return (t["x"], weight), {"bias": t["bias"]}

    def dense(self, t) -> Tensor:
        """W by PyTorch's own functions; of blocks put together one by one."""
        if "values" not in t:
            return self.decoded.to(t["x"].dtype)
        block, rows = self.block, []
        for i in range(0, self.n, block):
            places = [self.place_of(i // block, j // block) for j in range(0, self.k, block)]
            zeros = t["values"].new_zeros(block, block)
            rows.append(torch.cat([zeros if p is None else t["values"][p] for p in places], 1))
        return torch.cat(rows)[: self.n, : self.k] + 0 * t["values"].sum()

    def place_of(self, row: int, column: int) -> int | None:
        """Where a block is among the values."""
        s = self.weight.structure
        hits = ((s.block_rows == row) & (s.columns == column)).nonzero()
        return int(hits[0]) if len(hits) else None

    def compose(self, t):
        return F.linear(t["x"], self.dense(t), t["bias"])

    def absolute(self) -> SparseProblem:
        twin = super().absolute()
        twin.decoded = self.decoded.abs()
        return twin
