"""`gated_activation` in the Triton kernels: as accurate as PyTorch's own composition, at any shape and layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import explain, functional, use_backend
from peft_kernels.kernels.triton import _launch, gated_activation
from tests.helpers import RATIO, relative_error

F16, F32 = torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
BY_NAME = pytest.mark.parametrize("activation", ACTIVATIONS)


def _draw(*shape: int, dtype: torch.dtype, scale: float = 2.0) -> torch.Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def _eager(gate, up, grad_h, activation):
    leaves = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    h = ACTIVATIONS[activation](leaves[0]) * leaves[1]
    return h.detach(), *torch.autograd.grad(h, leaves, grad_h)


def _ours(gate, up, grad_h, activation):
    return gated_activation.forward(gate, up, activation), *gated_activation.backward(grad_h, gate, up, activation)


def _assert_as_accurate_as_eager(results, gate, up, grad_h, activation):
    truths = _eager(gate.double(), up.double(), grad_h.double(), activation)
    eagers = _eager(gate, up, grad_h, activation)
    for name, value, truth, eager in zip(("h", "gate", "up"), results, truths, eagers, strict=True):
        assert value.dtype == eager.dtype
        assert value.shape == eager.shape
        error, allowed = relative_error(value, truth), relative_error(eager, truth)
        floor = torch.finfo(value.dtype).eps / 4
        assert error <= max(RATIO * allowed, floor), f"{name}: error {error:.3e}, eager has {allowed:.3e}"


@DTYPES
@BY_NAME
@pytest.mark.parametrize(("m", "n"), [(1, 4099), (7, 131), (33, 136), (257, 3)])
def test_accuracy(m, n, activation, dtype):
    tensors = [_draw(m, n, dtype=dtype) for _ in range(3)]
    _assert_as_accurate_as_eager(_ours(*tensors, activation), *tensors, activation)


@BY_NAME
def test_each_element_far_from_zero(activation):
    """Where the activation runs out into 0 or x, each value on its own: a norm would not see the small ones."""
    gate = torch.linspace(-30, 30, 4001)[None, :]
    up = grad_h = torch.ones_like(gate)
    truths = _eager(gate.double(), up.double(), grad_h.double(), activation)
    for value, truth in zip(_ours(gate, up, grad_h, activation), truths, strict=True):
        assert ((value.double() - truth).abs() <= 4 * torch.finfo(F32).eps * truth.abs().clamp(min=1)).all()


@BY_NAME
def test_a_single_element(activation):
    """The error of one number is luck, a ratio to eager's says nothing: a few units of the last place."""
    tensors = [_draw(1, 1, dtype=F32) for _ in range(3)]
    truths = _eager(*(tensor.double() for tensor in tensors), activation)
    for value, truth in zip(_ours(*tensors, activation), truths, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)


@DTYPES
def test_strides(dtype):
    wide = _draw(21, 3 * 40, dtype=dtype)
    gate, up = wide[:, :40], wide[:, 40:80]
    grad_h = _draw(40, 21, dtype=dtype).t()
    expected = _ours(gate.contiguous(), up.contiguous(), grad_h.contiguous(), "silu")
    for value, reference in zip(_ours(gate, up, grad_h, "silu"), expected, strict=True):
        assert torch.equal(value, reference)
    gate, up = gate.t().contiguous().t(), torch.cat([up, up], 1)[:, ::2]
    expected = _ours(gate.contiguous(), up.contiguous(), grad_h.contiguous(), "silu")
    for value, reference in zip(_ours(gate, up, grad_h, "silu"), expected, strict=True):
        assert torch.equal(value, reference)
    expanded = _draw(1, 1, dtype=dtype).expand(21, 40)
    expected = _ours(gate, up, expanded.contiguous(), "silu")
    for value, reference in zip(_ours(gate, up, expanded, "silu"), expected, strict=True):
        assert torch.equal(value, reference)


def test_nothing_beyond_the_tails():
    """Inputs in the middle of NaN, outputs followed by a guard."""
    buffer = torch.full((23, 3, 60), float("nan"))
    gate, up, grad_h = (buffer[1:-1, i, 9:46] for i in range(3))
    for tensor in (gate, up, grad_h):
        tensor.copy_(_draw(21, 37, dtype=F32))
    assert all(value.isfinite().all() for value in _ours(gate, up, grad_h, "gelu"))


def test_nothing_beyond_the_results_is_written(monkeypatch):
    guards = []

    def empty(shape, dtype, device):
        buffer = torch.full((shape.numel() + 4096,), float("nan"), dtype=dtype, device=device)
        guards.append(buffer[shape.numel() :])
        return buffer[: shape.numel()].view(shape)

    tensors = [_draw(21, 37, dtype=F32) for _ in range(3)]
    monkeypatch.setattr(torch, "empty", empty)
    results = _ours(*tensors, "silu")
    assert len(guards) == 3
    assert all(guard.isnan().all() for guard in guards)
    assert not any(result.isnan().any() for result in results)


@BY_NAME
def test_the_op(activation):
    gate, up = (_draw(2, 3, 20, dtype=F16).requires_grad_() for _ in range(2))
    h = functional.gated_activation(gate, up, activation=activation)
    grad_h = _draw(2, 3, 20, dtype=F16)
    grads = torch.autograd.grad(h, (gate, up), grad_h)
    _assert_as_accurate_as_eager((h.detach(), *grads), gate, up, grad_h, activation)


def test_no_rows():
    empty = torch.empty(0, 8)
    assert [value.shape for value in _ours(empty, empty, empty, "silu")] == [(0, 8)] * 3


def test_the_interpreter_is_never_chosen_by_itself():
    gate = torch.ones(2, 4)
    with use_backend(None):
        assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in explain("gated_activation", gate, gate).rejected
