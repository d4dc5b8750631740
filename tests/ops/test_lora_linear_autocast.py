"""`lora_linear` under torch.autocast: dtypes and values as the same composition of F.linear."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import functional
from tests.backends import everywhere
from tests.helpers import RATIO, LoraProblem, relative_error

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("lora_linear"), indirect=True)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# All dtypes of x, of the base and of the adapter, under either autocast dtype by turns: nine of each dtype, so that it
# meets both.
TRIPLES = itertools.product((F32, BF16, F16), repeat=3)
GRID = [(*triple, (BF16, F16)[i % 2]) for i, triple in enumerate(TRIPLES)]
NAMES = ("x", "weight", "bias", "lora_A", "lora_B")


def problem_of(x_dtype, base_dtype, adapter_dtype, device) -> LoraProblem:
    problem = LoraProblem(200, 96, 80, 8, device=device)
    dtypes = dict(zip(NAMES, (x_dtype, base_dtype, base_dtype, adapter_dtype, adapter_dtype), strict=True))
    problem.tensors = {n: t.detach().to(dtypes[n]).requires_grad_() for n, t in problem.tensors.items()}
    return problem


def ours(t, scaling):
    return functional.lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"], scaling=scaling)


def composition(t, scaling):
    return F.linear(t["x"], t["weight"], t["bias"]) + scaling * F.linear(F.linear(t["x"], t["lora_A"]), t["lora_B"])


def results(function, problem, autocast, dtype=None):
    """Output and gradients, computed from the problem's tensors (converted to `dtype`)."""
    t = {n: v.detach().to(dtype or v.dtype).requires_grad_() for n, v in problem.tensors.items()}
    with autocast:
        y = function(t, problem.scaling)
    grads = torch.autograd.grad(y, list(t.values()), problem.grad_y.to(y.dtype))
    return {"y": y.detach(), **dict(zip(t, grads, strict=True))}


def dtype_id(value) -> str:
    return "+".join(str(dtype).removeprefix("torch.") for dtype in value)


@pytest.mark.parametrize("dtypes", GRID, ids=dtype_id)
@EVERYWHERE
def test_dtype_and_value_as_f_linear(backend, dtypes):
    *tensors, autocast_dtype = dtypes
    problem = problem_of(*tensors, backend.device)
    autocast = torch.autocast(backend.device, autocast_dtype)
    truth = results(composition, problem, torch.autocast(backend.device, enabled=False), torch.float64)
    eager = results(composition, problem, autocast)
    fused = results(ours, problem, autocast)
    for name, value in fused.items():
        assert value.dtype == eager[name].dtype, name
        assert relative_error(value, truth[name]) <= RATIO * relative_error(eager[name], truth[name]), name


@pytest.mark.parametrize("dtypes", list(itertools.product((F32, BF16, F16), repeat=2)), ids=dtype_id)
@EVERYWHERE
def test_without_autocast_x_and_weight_must_match(backend, dtypes):
    """F.linear refuses mixed dtypes, so the op does too, in words; equal ones give the dtype that F.linear gives."""
    problem = problem_of(dtypes[0], dtypes[1], F32, backend.device)
    t = problem.tensors
    if dtypes[0] == dtypes[1]:
        assert ours(t, 1.5).dtype == F.linear(t["x"], t["weight"], t["bias"]).dtype == dtypes[0]
        return
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(t["x"], t["weight"], t["bias"])
    with pytest.raises(TypeError, match=rf"lora_linear: weight has dtype {dtypes[1]}, but x has {dtypes[0]}"):
        ours(t, 1.5)


def test_float64_is_left_alone():
    """Autocast does not narrow float64, neither for F.linear nor here."""
    problem = LoraProblem(5, 31, 17, 3, dtype=torch.float64)
    with torch.autocast("cpu", BF16):
        y = ours(problem.tensors, problem.scaling)
        expected = F.linear(problem.tensors["x"], problem.tensors["weight"], problem.tensors["bias"])
    assert y.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(y, composition(problem.tensors, problem.scaling))


def test_used_twice_in_one_region():
    """Autocast caches casts of leaves inside a region; two uses of one layer must both reach the gradient."""
    problem = problem_of(F32, F32, F32, "cpu")
    t = problem.tensors
    with torch.autocast("cpu", BF16):
        both = ours(t, 1.5).float() + ours(t, 1.5).float()
    both.backward(problem.grad_y)
    once = results(ours, problem, torch.autocast("cpu", BF16))
    for name, tensor in t.items():
        assert tensor.grad.dtype == F32
        torch.testing.assert_close(tensor.grad, 2 * once[name], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("inside", [True, False])
@EVERYWHERE
def test_backward_inside_the_region(backend, inside):
    """Calling backward under autocast, whether forward was there or not, does not narrow the gradients' matmuls."""
    problem = problem_of(F32, F32, F32, backend.device)
    wanted = list(problem.tensors.values())
    region = torch.autocast(backend.device, BF16)
    grads = []
    for backward_inside in (False, True):
        with torch.autocast(backend.device, BF16, enabled=inside):
            y = ours(problem.tensors, 1.5)
        grad_y = problem.grad_y.to(y.dtype)
        if backward_inside:
            with region:
                grads.append(torch.autograd.grad(y, wanted, grad_y))
        else:
            grads.append(torch.autograd.grad(y, wanted, grad_y))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_disabled_region_inside_autocast():
    problem = problem_of(F32, F32, F32, "cpu")
    with torch.autocast("cpu", BF16):
        with torch.autocast("cpu", enabled=False):
            inner = ours(problem.tensors, 1.5)
        outer = ours(problem.tensors, 1.5)
    assert inner.dtype == F32
    assert outer.dtype == BF16
    torch.testing.assert_close(inner, ours(problem.tensors, 1.5))


def test_state_is_restored_after_an_error():
    problem = problem_of(F32, F32, F32, "cpu")
    with torch.autocast("cpu", BF16):
        with pytest.raises(ValueError, match="lora_A"):
            ours({**problem.tensors, "lora_A": problem.tensors["lora_A"][:, 1:]}, 1.5)
        assert torch.is_autocast_enabled("cpu")
        assert F.linear(problem.tensors["x"], problem.tensors["weight"]).dtype == BF16


@EVERYWHERE
def test_backward_inside_the_region_keeps_float32_sums(backend):
    """Backward under autocast must not round the sums of dA and dB, which stay in the parameters' float32."""
    problem = problem_of(F32, F32, F32, backend.device)
    t, gradients = problem.tensors, []
    for inside in (False, True):
        with torch.autocast(backend.device, BF16):
            y = ours(t, problem.scaling)
            with torch.autocast(backend.device, BF16, enabled=inside):
                gradients.append(torch.autograd.grad(y, (t["lora_A"], t["lora_B"]), torch.ones_like(y)))
    for outer, inner in zip(*gradients, strict=True):
        assert outer.abs().max() > 0
        assert torch.equal(outer, inner)
