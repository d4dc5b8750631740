"""csrc/gated_activation.cpp: each element within a few roundings of float64, over the whole range, at every width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels import functional, use_backend
from peft_kernels.kernels.cpu import gated_activation as cpu_kernel
from peft_kernels.kernels.reference import gated_activation as reference
from peft_kernels.ops.gated_activation import Problem

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def operands(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """grad_h, gate, up, all of gate's shape; up and grad_h are powers of two, which round nothing."""
    sign = torch.where(torch.arange(gate.numel()) % 3 == 0, -1.0, 1.0).view(gate.shape)
    return (2 * sign).to(gate.dtype), gate, (sign / 2).to(gate.dtype)


def results(kernel, grad_h: Tensor, gate: Tensor, up: Tensor, activation: str) -> dict[str, Tensor]:
    grad_gate, grad_up = kernel.backward(grad_h, gate, up, activation)
    return {"h": kernel.forward(gate, up, activation), "dgate": grad_gate, "dup": grad_up}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_each_element(width, dtype, activation):
    """Within 4 eps of the value plus a fifth of min(|x|, 1): slopes cross zero, tails have rounded exponents."""
    gate = torch.cat([torch.linspace(-14, 14, 20011), torch.randn(5000), 10.0 ** torch.linspace(-30, 0, 301)]).to(dtype)
    arguments = operands(gate.view(1, -1))
    truth = results(reference, *(t.double() for t in arguments), activation)
    for name, value in results(cpu_kernel, *arguments, activation).items():
        scale = truth[name].abs() + 0.2 * gate.double().abs().clamp(max=1)
        bound = 4 * torch.finfo(dtype).eps * scale + 4 * torch.finfo(dtype).tiny
        assert value.dtype == dtype
        assert bool(((value.double() - truth[name]).abs() <= bound).all()), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_accurate_as_pytorch(width, activation):
    gate, up, grad_h = torch.randn(3, 400, 513)
    truth = results(reference, grad_h.double(), gate.double(), up.double(), activation)
    eager = results(reference, grad_h, gate, up, activation)
    for name, value in results(cpu_kernel, grad_h, gate, up, activation).items():
        error, allowed = (float((t.double() - truth[name]).norm()) for t in (value, eager[name]))
        assert error <= 1.2 * allowed, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(width, activation):
    """Where e^x overflows or vanishes: the identity on one side, zero on the other; NaN stays NaN."""
    gate = torch.tensor(
        [[50.0, 88.7, 89.0, 104.0, 1e4, 1e18, -50.0, -88.7, -104.0, -1e4, -1e18, 0.0, -0.0, float("nan")]]
    )
    ones = torch.ones_like(gate)
    h, slope, same = results(cpu_kernel, ones, gate, ones, activation).values()
    assert torch.equal(h, same) or bool(((h == same) | h.isnan()).all())
    assert torch.equal(h[0, :6], gate[0, :6])
    assert bool((h[0, 6:13].abs() <= 1e-19).all())
    torch.testing.assert_close(slope[0, :6], torch.ones(6), rtol=0, atol=0)
    assert bool((slope[0, 6:11].abs() <= 1e-19).all())
    assert slope[0, 11] == slope[0, 12] == 0.5
    assert bool(h[0, 13].isnan())
    assert bool(slope[0, 13].isnan())


SHAPES = ((1, 1), (3, 7), (5, 8), (2, 1023), (3, 1024), (2, 1025), (1, 2500), (0, 5), (4, 0))


# In 16 bits the blocks and vectors are the same: one below, at and above each.
@pytest.mark.parametrize(("dtype", "shape"), [*((F32, s) for s in SHAPES), *((BF16, s) for s in SHAPES[1:6])], ids=str)
def test_shapes(width, shape, dtype):
    gate, up, grad_h = torch.randn(3, *shape).to(dtype)
    expected = results(reference, grad_h, gate, up, "silu")
    for name, value in results(cpu_kernel, grad_h, gate, up, "silu").items():
        torch.testing.assert_close(value, expected[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-6, msg=name)


def test_strided_operands(cpu):
    gate, up, grad_h = torch.randn(20, 3, 30).unbind(1)
    expected = results(cpu_kernel, grad_h.contiguous(), gate.contiguous(), up.contiguous(), "gelu")
    for layout in (lambda t: t, lambda t: t.t().contiguous().t()):
        for name, value in results(cpu_kernel, layout(grad_h), layout(gate), layout(up), "gelu").items():
            assert torch.equal(value, expected[name])


def test_it_is_what_the_op_runs(cpu):
    gate, up = torch.randn(2, 3, 4, 50).requires_grad_().unbind(0)
    with use_backend("cpu"):
        h = functional.gated_activation(gate, up, activation="gelu_tanh")
    assert torch.equal(h.view(12, 50), cpu_kernel.forward(gate.view(12, 50), up.view(12, 50), "gelu_tanh"))


def test_what_it_leaves_to_others(cpu):
    problem = problem_of(512, 1024)
    assert cpu_kernel.unsupported(problem) is None
    assert cpu_kernel.unproven(problem) is None
    assert "gate is on cuda" in cpu_kernel.unsupported(problem._replace(device="cuda"))
    assert "float64" in cpu_kernel.unsupported(problem._replace(dtype=torch.float64))
    assert "few elements" in cpu_kernel.unproven(problem_of(4, 64))


def problem_of(m: int, n: int) -> Problem:
    return Problem("cpu", None, F32, m, n, "silu")
