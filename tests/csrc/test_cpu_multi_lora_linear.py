"""csrc/multi_lora_linear.cpp: the specification in float64 at every vector width, and bits that depend on nothing but a
row and its adapters. The grid of shapes that all implementations share is in tests/ops."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from peft_kernels.formats.adapter_table import AdapterLists
from peft_kernels.kernels.cpu import multi_lora_linear as cpu_kernel
from peft_kernels.kernels.reference import multi_lora_linear as reference
from peft_kernels.ops.multi_lora_linear import MultiNeeds
from tests.helpers import relative_error
from tests.problems.multi import drawn_ids

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


class Case(NamedTuple):
    """`ranks`: of each adapter in each projection, 0 where it has nothing there."""

    m: int
    k: int
    ns: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    per_row: int = 1
    mixed: bool = False
    ps: tuple[float, ...] = ()


CASES = {
    "ranks": Case(61, 100, (97,), ((1,), (8,), (64,), (96,), (0,), (3,))),
    "rank 512": Case(13, 33, (50,), ((512,), (2,))),
    "one row each": Case(7, 1000, (130,), tuple((r,) for r in (16, 5, 1, 8, 16, 3, 2, 4))),
    "long runs": Case(290, 60, (40,), ((9,), (16,))),
    "choices": Case(50, 61, (35, 98), ((4, 4), (0, 9), (17, 1), (8, 8)), 3, True),
    "dropout": Case(70, 401, (30, 20), ((4, 8), (16, 0), (7, 7), (2, 2)), 1, False, (0.0, 0.3, 0.5, 1.0)),
    "choices and dropout": Case(40, 390, (33,), ((4,), (16,), (5,)), 2, True, (0.3, 0.0, 0.3)),
}


class Problem:
    def __init__(self, case: Case, dtype: torch.dtype = F32, adapter_dtype: torch.dtype = F32) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        self.case, k = case, case.k
        self.x = draw(case.m, k)
        self.weights = [draw(n, k, scale=k**-0.5) for n in case.ns]
        self.biases = [draw(n) for n in case.ns]
        self.grad_ys: list[Tensor | None] = [draw(case.m, n) for n in case.ns]
        self.ids = drawn_ids(case.m, len(case.ranks), per_row=case.per_row)
        self.mix = draw(case.m, case.per_row, dtype=F32) if case.mixed else None
        widths = [max(1, *(ranks[j] for ranks in case.ranks)) for j in range(len(case.ns))]
        self.adapters = AdapterLists([], [], [], [], [], widths, len(case.ranks))
        for a, ranks in enumerate(case.ranks):
            for j, r in enumerate(ranks):
                if r:
                    self.adapters.lora_As.append(draw(r, k, dtype=adapter_dtype, scale=k**-0.5))
                    self.adapters.lora_Bs.append(draw(case.ns[j], r, dtype=adapter_dtype, scale=r**-0.5))
                    self.adapters.outputs.append(j)
                    self.adapters.adapters.append(a)
                    self.adapters.scalings.append(1.5 - a)
        self.seeds = torch.arange(10, 10 + len(case.ns)) if case.ps else None

    def wanted(self, x: bool = True, mix: bool = True, a: bool = True, b: bool = True) -> MultiNeeds:
        no, factors = (False,) * len(self.weights), len(self.adapters.lora_As)
        return MultiNeeds(x, mix and self.mix is not None, no, no, (a,) * factors, (b,) * factors)

    def run(self, kernel, wanted: MultiNeeds | None = None) -> dict[str, Tensor]:
        rest = (self.adapters, self.ids, self.mix, list(self.case.ps), self.seeds)
        wanted = wanted or self.wanted()
        ys, ss = kernel.forward(self.x, self.weights, self.biases, *rest, True)
        grads = kernel.backward(self.grad_ys, self.x, ss, self.weights, *rest, wanted)
        named = {"dx": grads[0], "dmix": grads[1]}
        lists = (("y", ys), ("s", ss), ("dA", grads[4]), ("dB", grads[5]))
        named |= {f"{name}{i}": value for name, values in lists for i, value in enumerate(values)}
        return {name: value for name, value in named.items() if value is not None}

    def exact(self, wanted: MultiNeeds | None = None) -> dict[str, Tensor]:
        """What the specification gives in float64."""
        twin = Problem.__new__(Problem)
        twin.__dict__ |= self.__dict__
        lists = self.adapters
        As, Bs = ([t.to(F64) for t in side] for side in (lists.lora_As, lists.lora_Bs))
        twin.adapters = AdapterLists(
            As, Bs, lists.outputs, lists.adapters, lists.scalings, lists.widths, lists.count
        )  # fmt: skip
        twin.x, twin.mix = self.x.to(F64), None if self.mix is None else self.mix.to(F64)
        twin.weights, twin.biases = ([t.to(F64) for t in side] for side in (self.weights, self.biases))
        twin.grad_ys = [None if t is None else t.to(F64) for t in self.grad_ys]
        return twin.run(reference, wanted)


def compare(problem: Problem, tolerance: float, wanted: MultiNeeds | None = None) -> None:
    found, exact = problem.run(cpu_kernel, wanted), problem.exact(wanted)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        if float(exact[name].norm()) == 0:
            assert float(value.norm()) == 0, name
        else:
            assert relative_error(value, exact[name]) < tolerance, name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_specification(width, case):
    compare(Problem(case), 2e-6)


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, F16), (F32, BF16)], ids=str)
@pytest.mark.parametrize("name", ["ranks", "choices", "dropout"])
def test_the_specification_in_16_bits(width, name, dtypes):
    tolerance = {BF16: 0.01, F16: 2e-3, F32: 5e-3}[dtypes[0]]
    compare(Problem(CASES[name], *dtypes), tolerance)


@pytest.mark.parametrize("wanted", ["x", "mix", "a", "b"])
def test_each_gradient_alone(cpu, wanted):
    problem = Problem(CASES["choices"])
    compare(problem, 2e-6, problem.wanted(**{name: name == wanted for name in ("x", "mix", "a", "b")}))


@pytest.mark.parametrize("unused", [0, 1])
def test_a_projection_that_nobody_used(cpu, unused):
    problem = Problem(CASES["dropout"])
    problem.grad_ys[unused] = None
    compare(problem, 2e-6)


def test_a_result_of_16_bits_is_rounded_once(cpu):
    """Of eight choices, each below half a unit in the last place of y, the sum arrives."""
    y = torch.full((1, 4), 256.0, dtype=BF16)  # bits of 2
    one = torch.ones(1, 1)
    lists = AdapterLists([one], [one.expand(4, 1).contiguous()], [0], [0], [1.0], [1], 1)
    arguments = (
        torch.ones(1, 1, dtype=BF16),
        [y.t().contiguous()],
        [None],
        lists,
        torch.zeros(1, 8, dtype=torch.int64),
    )
    ys, _ = cpu_kernel.forward(*arguments, torch.full((1, 8), 0.5), [], None, False)
    assert torch.equal(ys[0], y + 4)


@pytest.fixture
def no_base(monkeypatch):
    """The base products are PyTorch's and promise nothing about bits: zeros in their place."""
    linear = lambda x, weight, bias: x.new_zeros(len(x), len(weight))  # noqa: E731
    monkeypatch.setattr(cpu_kernel._base, "linear", linear)
    monkeypatch.setattr(cpu_kernel._base, "grad_input", lambda grad, weight: grad.new_zeros(len(grad), weight.shape[1]))
    monkeypatch.setattr(cpu_kernel._base, "add_grad_input", lambda *_: None)


@pytest.mark.parametrize("name", ["choices", "dropout", "ranks"])
def test_bits_do_not_depend_on_the_number_of_threads(cpu, no_base, name):
    problem = Problem(CASES[name]._replace(m=700))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(problem.run(cpu_kernel))
    torch.set_num_threads(before)
    assert float(results[0]["dA0"].norm()) > 0
    for result in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(result[key], value), key


@pytest.mark.parametrize("name", ["choices", "choices and dropout", "ranks", "one row each"])
def test_a_row_has_the_same_bits_whatever_its_neighbours_are(width, no_base, name):
    """Rows alone, and in a batch in which all others are moved and choose others. Row 0 keeps its dropout mask."""
    problem = Problem(CASES[name])
    alone, few = Problem(CASES[name]), Problem(CASES[name])
    everything, (y, s) = problem.run(cpu_kernel), ("y0", "s0")
    generator = torch.Generator().manual_seed(7)
    for row in (0,) if problem.seeds is not None else range(min(problem.case.m, 12)):
        alone.x, alone.ids = problem.x[row : row + 1], problem.ids[row : row + 1]
        count = int(torch.randint(2, 60, (), generator=generator))
        few.x = torch.randn(count, problem.case.k, generator=generator)
        few.ids = torch.randint(-1, len(problem.case.ranks), (count, problem.case.per_row), generator=generator)
        few.ids[::2] = problem.ids[row]
        few.x[0], few.ids[0] = problem.x[row], problem.ids[row]
        if problem.mix is not None:
            alone.mix = problem.mix[row : row + 1]
            few.mix = torch.cat([problem.mix[row : row + 1], torch.ones(count - 1, problem.case.per_row)])
        for other in (alone, few):
            other.grad_ys = [torch.zeros(len(other.x), n) for n in problem.case.ns]
            found = other.run(cpu_kernel)
            assert torch.equal(found[y][0], everything[y][row]), row
            assert torch.equal(found[s][0], everything[s][row]), row


def test_strided_operands(cpu):
    problem, strided = Problem(CASES["choices"]), Problem(CASES["choices"])
    lists = strided.adapters
    for tensors in (lists.lora_As, lists.lora_Bs, strided.grad_ys):
        tensors[:] = [tensor.t().contiguous().t() for tensor in tensors]
    strided.x = torch.cat([problem.x, problem.x], 1)[:, : problem.case.k]
    found = strided.run(cpu_kernel)
    for name, value in problem.run(cpu_kernel).items():
        assert relative_error(found[name], value) < 1e-6, name


def test_ids_out_of_range_add_nothing(cpu):
    problem = Problem(CASES["ranks"])
    problem.ids = torch.tensor([-5, -1, 6, 1 << 40]).repeat(16)[:61, None]
    base = problem.x @ problem.weights[0].t() + problem.biases[0]
    found = problem.run(cpu_kernel)
    assert relative_error(found["y0"], base) < 1e-6
    assert all(float(found[f"d{side}{i}"].norm()) == 0 for side in "AB" for i in range(5))
