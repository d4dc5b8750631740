"""csrc/dora_linear.cpp: the specification at every vector width, and bits that depend on nothing but the inputs. The
grid of shapes that all implementations share is in tests/ops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from peft_kernels.kernels.cpu import dora_linear as cpu_kernel
from peft_kernels.kernels.cpu import lora_linear
from peft_kernels.kernels.reference import dora_linear as reference
from tests.helpers import relative_error

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("dx", "dW", "dbias", "dA", "dB", "dmagnitude")
SHAPES = ((1, 1, 1, 1), (5, 17, 15, 3), (16, 64, 64, 4), (17, 40, 97, 8), (130, 100, 129, 17), (700, 30, 33, 2))
ALL = (True, True, True, True, True, True)


def run(kernel, shape, needs=ALL, *, dtype=F32, dropout_p=0.25, bias=True, layout=lambda t: t) -> dict[str, Tensor]:
    (m, k, n, r), generator = shape, torch.Generator().manual_seed(1)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, grad_y, b = draw(m, k), draw(n, k), draw(m, n), draw(n)
    rest = (draw(r, k, dtype=F32), draw(n, r, dtype=F32), draw(n, dtype=F32), draw(n, dtype=F32).abs() + 0.5)
    options = (0.5, dropout_p, torch.tensor([7]))
    y, s, u = kernel.forward(x, weight, b if bias else None, *rest, *options)
    grads = kernel.backward(*map(layout, (grad_y, x, s, u)), weight, *rest, *options, needs)
    return {"y": y, "s": s, "u": u} | dict(zip(NAMES, grads, strict=True))


def compare(tolerance: float, *arguments, **options) -> None:
    expected = run(reference, *arguments, **options)
    for name, value in run(cpu_kernel, *arguments, **options).items():
        assert (value is None) == (expected[name] is None), name
        if value is not None:
            assert value.dtype == expected[name].dtype, name
            assert relative_error(value, expected[name]) < tolerance, name


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_specification(width, shape, dropout_p):
    compare(2e-6, shape, dropout_p=dropout_p, bias=shape[0] != 17)


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 0.015), (F16, 2e-3)], ids=str)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_the_specification_in_16_bits(width, shape, dtype, tolerance):
    compare(tolerance, shape, dtype=dtype)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=6)), ids=str)
def test_each_combination_of_wanted_gradients(cpu, needs):
    compare(2e-6, (40, 33, 50, 4), needs)


def test_strided_operands(cpu):
    compare(2e-6, (40, 33, 50, 4), layout=lambda t: t.t().contiguous().t())


def test_bits_do_not_depend_on_the_number_of_threads(cpu, monkeypatch):
    """The base matmuls, whose bits PyTorch does not promise, are replaced by copies of what came first."""
    monkeypatch.setattr(lora_linear._base.F, "linear", lambda x, weight, bias: x.new_ones(len(x), len(weight)))
    monkeypatch.setattr(lora_linear.torch, "mm", lambda grad, weight: grad.new_zeros(len(grad), weight.shape[1]))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(cpu_kernel, (700, 100, 200, 8), (True, False, True, True, True, True)))
    torch.set_num_threads(before)
    for result, name in itertools.product(results[1:], results[0]):
        assert result[name] is results[0][name] is None or torch.equal(result[name], results[0][name]), name


def test_sums_are_as_accurate_as_pytorch(cpu):
    """dbias and dmagnitude of many rows, whose terms have one sign: the error of a long chain would show."""
    m, n = 5000, 24
    grad_y, u = torch.rand(m, n) + 1, torch.rand(m, n) + 1
    ones = torch.ones(n)
    needs = (False, False, True, False, False, True)
    arguments = (None, None, u, torch.ones(n, 4), torch.ones(1, 4), torch.ones(n, 1), ones, ones, 1.0, 0.0, None, needs)
    _, _, dbias, _, _, dmagnitude = cpu_kernel.backward(grad_y, *arguments)
    for value, terms in ((dbias, grad_y), (dmagnitude, grad_y * u)):
        assert relative_error(value, terms.double().sum(0)) <= 1.2 * relative_error(terms.sum(0), terms.double().sum(0))
