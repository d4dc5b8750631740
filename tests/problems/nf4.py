"""Problems of `nf4_linear` and `nf4_lora_linear`: 4-bit weights of drawn bytes, decoded for the formulas."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight, dynamic_map
from peft_kernels.problems import Draw, nf4_decoded, nf4_weight
from tests.problems.base import Problem, batch_of, drawer
from tests.problems.lora import LoraProblem

PARTS = ("whole", "rows", "columns", "expert", "corner")


def part_of(
    part: str, n: int, k: int, *, blocksize: int = 64, nested: bool = True, dtype=torch.float32, seed=1, device="cpu"
) -> NF4Weight:
    """A weight [n, k] that is the whole of what its tensors hold, or some rows, columns or an expert of it. The parts
    but "whole" begin inside a block; "columns" and "corner" in the low half of a byte."""

    def draw(*shape: int) -> NF4Weight:
        return nf4_weight(Draw("cpu", seed), *shape, blocksize=blocksize, nested=nested, dtype=dtype).to(device)

    if part == "whole":
        return draw(n, k)
    if part == "rows":
        return draw(n + 5, k).rows(3, 3 + n)
    if part == "columns":
        return draw(n, k + 8).columns(3, 3 + k)
    if part == "expert":
        return draw(3, n, k).expert(1)
    stack = draw(2, n + 4, k + 5)
    return stack.expert(1).rows(1, n + 1).columns(1 + stack.shape[-1] % 2, 1 + stack.shape[-1] % 2 + k)


@dataclass
class Nf4Problem(Problem):
    """y = x Wᵀ + b. The float64 oracle takes the weights that the format says, rounded once to `dtype`."""

    m: tuple[int, ...] | int = 33
    k: int = 48
    n: int = 40
    dtype: torch.dtype = torch.float32
    bias: bool = True
    bias_dtype: torch.dtype | None = None
    blocksize: int = 64
    nested: bool = True
    part: str = "whole"
    seed: int = 1234
    device: str = "cpu"
    q: NF4Weight = field(init=False, repr=False)
    weight: Tensor = field(init=False, repr=False)
    tensors: dict[str, Tensor | None] = field(init=False, repr=False)
    grad_y: Tensor = field(init=False, repr=False)

    op = "nf4_linear"

    def __post_init__(self) -> None:
        batch, draw = batch_of(self.m), drawer(self.seed, self.device)
        _draw_weight(self)
        self.tensors = {
            "x": draw(*batch, self.k, dtype=self.dtype),
            "bias": draw(self.n, dtype=self.bias_dtype or self.dtype) if self.bias else None,
        }
        self.grad_y = draw(*batch, self.n, dtype=self.dtype).detach()

    @property
    def length(self) -> int:
        return self.k + self.n + self.tensors["x"].numel() // max(1, self.k)

    def arguments(self, t):
        return (t["x"], self.q), {"bias": t["bias"]}

    def compose(self, t):
        x, bias = t["x"], t["bias"]
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def absolute(self) -> Nf4Problem:
        twin = super().absolute()
        twin.weight = self.weight.abs()
        return twin


@dataclass
class Nf4LoraProblem(LoraProblem):
    """y = x Wᵀ + b + s drop(x) Aᵀ Bᵀ, without the options of `lora_linear` that this op lacks."""

    blocksize: int = 64
    nested: bool = True
    part: str = "whole"
    q: NF4Weight = field(init=False, repr=False)
    weight: Tensor = field(init=False, repr=False)

    op = "nf4_lora_linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        del self.tensors["weight"]
        _draw_weight(self)

    def arguments(self, t):
        (x, _, lora_A, lora_B), options = super().arguments({**t, "weight": None})
        return (x, self.q, lora_A, lora_B), options

    def compose(self, t):
        return F.linear(t["x"], self.weight.to(t["x"].dtype), t["bias"]) + self.low_rank(t)

    def absolute(self) -> Nf4LoraProblem:
        twin = super().absolute()
        twin.weight = self.weight.abs()
        return twin


def zeros_without_memory(count: int, device: str) -> Tensor:
    """Bytes that no memory backs until they are written to; on a GPU they are allocated."""
    if device == "cpu":
        return torch.from_numpy(np.zeros(count, dtype=np.uint8))  # torch.zeros writes them
    return torch.zeros(count, dtype=torch.uint8, device=device)


def huge_weight(n: int, k: int, row_stride: int, device: str) -> tuple[NF4Weight, Tensor]:
    """Rows so far apart that numbers of elements, bytes and blocks need more than 32 bits, and the weight they are in
    float32. Nested, blocks of 64."""
    draw, numel = Draw("cpu"), (n - 1) * row_stride + k
    blocks = -(-numel // 64)
    packed, absmax = zeros_without_memory(-(-numel // 2), device), zeros_without_memory(blocks, device)
    groups, rows = draw(torch.float32, -(-blocks // 256), scale=0.1, offset=0.3), []
    q = NF4Weight(
        packed, absmax, groups.to(device), dynamic_map(device), torch.tensor(1.0, device=device), torch.Size((n, k)),
        torch.float32, 64, row_stride=row_stride,
    )  # fmt: skip
    for start in range(0, n * row_stride, row_stride):
        some = slice(start // 2, (start + k + 1) // 2)
        packed[some] = draw.integers(256, some.stop - some.start).to(packed)
        some = slice(start // 64, (start + k - 1) // 64 + 1)
        absmax[some] = draw.integers(256, some.stop - some.start).to(absmax)
        rows.append(_copied_row(q, start, k))
    return q, torch.cat(rows)


def _copied_row(q: NF4Weight, start: int, k: int) -> Tensor:
    """Elements [start, start + k) of the whole, decoded from copies of their own few bytes and blocks."""
    block, last = start // 64 // 256 * 256, start + k  # a multiple of 256 keeps the groups of absmax values
    begin = block * 64
    part = q._replace(
        packed=q.packed[begin // 2 : (last + 1) // 2].clone(), absmax=q.absmax[block : (last - 1) // 64 + 1].clone(),
        nested_absmax=q.nested_absmax[block // 256 :][:2].clone(), shape=torch.Size((1, k)), first=start - begin,
        row_stride=None,
    )  # fmt: skip
    return nf4_decoded(part, torch.float32)


def _draw_weight(problem: Nf4Problem | Nf4LoraProblem) -> None:
    problem.q = part_of(
        problem.part, problem.n, problem.k, blocksize=problem.blocksize, nested=problem.nested, seed=problem.seed,
        device=problem.device,
    )  # fmt: skip
    problem.weight = nf4_decoded(problem.q, problem.dtype)
