"""csrc/lora_linear_group.cpp with several adapters: the specification at every vector width, and bits that depend on
nothing but the inputs. The grid of shapes that all implementations share is in tests/ops."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from peft_kernels.kernels.cpu import lora_linear_group as cpu_kernel
from peft_kernels.kernels.reference import lora_linear_group as reference
from peft_kernels.ops.lora_linear_group import GroupNeeds
from tests.helpers import relative_error

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    m: int
    k: int
    ns: tuple[int, ...]
    outputs: tuple[int, ...]
    rs: tuple[int, ...]
    dropout_ps: tuple[float, ...]
    mask: bool = False


CASES = {
    "qkv": Case(130, 100, (96, 40, 97), (0, 1, 2), (16, 16, 16), (0.0, 0.0, 0.0)),
    "dropout": Case(49, 400, (96, 40, 97), (0, 1, 2), (4, 9, 16), (0.3, 0.3, 0.5)),
    "some dropped": Case(97, 385, (33, 20), (0, 0, 1, 1), (3, 8, 17, 5), (0.0, 0.3, 0.0, 0.0), True),
    "frozen between": Case(70, 60, (20, 31, 50), (0, 2, 2, 2), (1, 2, 33, 4), (0.0, 0.0, 0.0, 0.0)),
    "token mask": Case(60, 50, (40,), (0, 0), (8, 12), (0.0, 0.2), True),
}


def arguments(case: Case, dtype: torch.dtype = F32, adapter_dtype: torch.dtype = F32):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x = draw(case.m, case.k)
    weights = [draw(n, case.k) for n in case.ns]
    lora_As = [draw(r, case.k, dtype=adapter_dtype) for r in case.rs]
    lora_Bs = [draw(case.ns[j], r, dtype=adapter_dtype) for j, r in zip(case.outputs, case.rs, strict=True)]
    seeds = torch.arange(10, 10 + len(case.rs)) if any(case.dropout_ps) else None
    mask = torch.rand(case.m, generator=generator) < 0.5 if case.mask else None
    scalings = [0.5 + i for i in range(len(case.rs))]
    grad_ys = [draw(case.m, n) for n in case.ns]
    return x, weights, lora_As, lora_Bs, (scalings, case.outputs, case.dropout_ps, seeds, mask), grad_ys


def needs(case: Case, x: bool = True, a: bool = True, b: bool = True) -> GroupNeeds:
    outputs, adapters = len(case.ns), len(case.rs)
    return GroupNeeds(x, (False,) * outputs, (False,) * outputs, (a,) * adapters, (b,) * adapters)


def run(kernel, case: Case, wanted: GroupNeeds, unused: int | None = None, **dtypes) -> dict[str, Tensor | None]:
    x, weights, lora_As, lora_Bs, rest, grad_ys = arguments(case, **dtypes)
    ys, s = kernel.forward(x, weights, [None] * len(weights), lora_As, lora_Bs, *rest)
    grad_ys = [None if j == unused else grad for j, grad in enumerate(grad_ys)]
    grad_x, _, _, grad_As, grad_Bs = kernel.backward(grad_ys, x, s, weights, lora_As, lora_Bs, *rest, wanted)
    named = {f"y{j}": y for j, y in enumerate(ys)} | {"s": s, "dx": grad_x}
    return named | {f"d{n}{i}": g for n, grads in (("A", grad_As), ("B", grad_Bs)) for i, g in enumerate(grads)}


def compare(case: Case, tolerance: float, wanted: GroupNeeds, unused: int | None = None, **dtypes) -> None:
    expected = run(reference, case, wanted, unused, **dtypes)
    for name, value in run(cpu_kernel, case, wanted, unused, **dtypes).items():
        assert (value is None) == (expected[name] is None), name
        if value is not None:
            assert relative_error(value, expected[name]) < tolerance, name


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_specification(width, case):
    compare(case, 2e-6, needs(case))


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_specification_in_16_bits(width, case, dtypes):
    tolerance = 0.02 if dtypes[0] == BF16 else 3e-3
    compare(case, tolerance, needs(case), dtype=dtypes[0], adapter_dtype=dtypes[1])


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_an_output_that_nobody_used(cpu, unused):
    compare(CASES["frozen between"], 2e-6, needs(CASES["frozen between"]), unused)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("name", ["some dropped", "qkv"])
def test_each_combination_of_wanted_gradients(cpu, name, wanted):
    compare(CASES[name], 2e-6, needs(CASES[name], *wanted))


@pytest.mark.parametrize("name", ["some dropped", "qkv"])
def test_bits_do_not_depend_on_the_number_of_threads(cpu, monkeypatch, name):
    """Only the low-rank half is ours: the base matmuls are replaced by zeros, for PyTorch promises no such thing."""
    monkeypatch.setattr(cpu_kernel._base.F, "linear", lambda x, weight, bias: x.new_zeros(len(x), len(weight)))
    monkeypatch.setattr(
        cpu_kernel.composed.torch, "mm", lambda grad, weight: grad.new_zeros(len(grad), weight.shape[1])
    )
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda total, grad, weight: total)
    case = CASES[name]._replace(m=700)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(cpu_kernel, case, needs(case)))
    torch.set_num_threads(before)
    assert float(results[0]["dA0"].norm()) > 0
    for result, key in itertools.product(results[1:], results[0]):
        assert torch.equal(result[key], results[0][key]), key


def test_strided_operands(cpu):
    def other_layout(tensors):
        return [tensor.t().contiguous().t() for tensor in tensors]

    case = CASES["some dropped"]
    x, weights, lora_As, lora_Bs, rest, grad_ys = arguments(case)
    strided_mask = torch.stack([rest[-1], ~rest[-1]], 1)[:, 0]
    results = []
    for layout, mask in ((list, rest[-1]), (other_layout, strided_mask)):
        (x,), ws, As, Bs, gs = map(layout, ((x,), weights, lora_As, lora_Bs, grad_ys))
        ys, s = cpu_kernel.forward(x, ws, [None, None], As, Bs, *rest[:-1], mask)
        grads = cpu_kernel.backward(gs, x, s, ws, As, Bs, *rest[:-1], mask, needs(case))
        results.append([*ys, s, grads[0], *grads[3], *grads[4]])
    for have, want in zip(*results, strict=True):
        assert relative_error(have, want) < 1e-6
