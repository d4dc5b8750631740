"""What only DoRA has: the norm from products of rank r, and that it counts as a constant."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import functional, use_backend
from tests.backends import everywhere
from tests.helpers import assert_within_rounding, relative_error
from tests.ops.cases import BF16, F16, F32, F64, dtype_id
from tests.problems import DoraProblem

NORM = pytest.mark.parametrize("backend", everywhere("dora_weight_norm"), indirect=True)
EVERYWHERE = pytest.mark.parametrize("backend", everywhere("dora_linear"), indirect=True)


NORM_DTYPES = ((F32, F32), (BF16, BF16), (BF16, F32), (F16, F32), (F64, F64))
NORM_SIZES = ((1, 1, 1), (40, 48, 5), (17, 129, 384), (101, 67, 12))


@pytest.mark.parametrize(
    ("scaling", "n", "k", "r", "dtypes"),
    [
        ((1.5, -0.3, 0.0)[(i + j) % 3], *size, dtypes)
        for i, size in enumerate(NORM_SIZES)
        for j, dtypes in enumerate(NORM_DTYPES)
    ],
    ids=lambda value: dtype_id(value) if isinstance(value, tuple) else None,
)
@NORM
def test_norm(backend, scaling, n, k, r, dtypes):
    """Of the matrix W + s B A itself, with and without ‖W‖² at hand; float32 results, whatever rounds less."""
    problem = DoraProblem(1, k, n, r, dtype=dtypes[0], adapter_dtype=dtypes[1], scaling=scaling, device=backend.device)
    t = problem.tensors
    truth = problem.norm({name: tensor.double() for name, tensor in t.items()})
    wide = torch.promote_types(F32, dtypes[0])
    squares = t["weight"].detach().to(wide).square().sum(1)
    terms = (t["weight"].double().abs() + abs(scaling) * t["lora_B"].double().abs() @ t["lora_A"].double().abs()).norm(
        dim=1
    )
    for known in (None, squares):
        norm = functional.dora_weight_norm(
            t["weight"], t["lora_A"], t["lora_B"], scaling=scaling, weight_norm_squared=known
        )
        assert (norm.dtype, norm.shape, norm.requires_grad) == (wide, (n,), False)
        # (norm + δ)² rounds in units of the squared terms.
        bound = 16 * torch.finfo(wide).eps * terms.square() / truth
        assert ((norm.double() - truth).abs() <= bound).all()


@NORM
def test_norm_where_the_update_cancels_the_weight(backend):
    """W = -s B A: rounding may make the square negative; the norm is small and never NaN."""
    a, b = torch.randn(3, 48, device=backend.device), torch.randn(20, 3, device=backend.device)
    weight = -2.0 * b @ a
    norm = functional.dora_weight_norm(weight, a, b, scaling=2.0)
    assert bool((norm >= 0).all())
    assert bool((norm <= 2e-3 * weight.norm(dim=1)).all())


@NORM
def test_the_norm_squared_is_what_is_given(backend):
    """A stale ‖W‖² is the caller's to notice; None always looks at W."""
    problem = DoraProblem(device=backend.device)
    t = problem.tensors
    given = torch.full((problem.n,), 1e4, device=backend.device)
    norm = functional.dora_weight_norm(t["weight"], t["lora_A"], t["lora_B"], scaling=0.0, weight_norm_squared=given)
    if backend.name != "reference":
        assert torch.equal(norm, torch.full_like(norm, 100.0))
    with torch.no_grad():
        t["weight"].mul_(3)
    again = functional.dora_weight_norm(t["weight"], t["lora_A"], t["lora_B"], scaling=1.5)
    torch.testing.assert_close(again, problem.norm(t), rtol=1e-5, atol=1e-5)


@EVERYWHERE
def test_the_norm_is_a_constant(backend):
    """Equation 11 of the paper, PEFT's detach: the gradients are those of the composition with the norm detached, and
    not those of the one without."""
    problem = DoraProblem(dtype=F32, device=backend.device)
    _, grads = problem.run()
    assert_within_rounding(problem, (problem.run()[0], grads))
    t = {name: tensor.detach().double().requires_grad_() for name, tensor in problem.tensors.items()}
    norm = (t["weight"] + problem.scaling * t["lora_B"] @ t["lora_A"]).norm(dim=1)
    y = t["magnitude"] / norm * (t["x"] @ t["weight"].t() + problem.low_rank(t)) + t["bias"]
    through = torch.autograd.grad(y, [t["lora_A"], t["lora_B"]], problem.grad_y.double())
    assert relative_error(grads["lora_A"], through[0]) > 0.01
    assert relative_error(grads["lora_B"], through[1]) > 0.01


@EVERYWHERE
def test_a_given_norm_is_used_as_it_is(backend):
    problem = DoraProblem(device=backend.device)
    problem.weight_norm = torch.linspace(0.5, 3, problem.n, device=backend.device)
    assert_within_rounding(problem, problem.run())


@EVERYWHERE
def test_magnitude_of_the_norm_is_lora(backend):
    """g = 1: what `lora_linear` computes, dropout included."""
    problem = DoraProblem(dropout_p=0.3, device=backend.device)
    t = {name: tensor.detach() for name, tensor in problem.tensors.items()}
    norm = functional.dora_weight_norm(t["weight"], t["lora_A"], t["lora_B"], scaling=1.5)
    y = functional.dora_linear(
        t["x"], t["weight"], t["lora_A"], t["lora_B"], norm, scaling=1.5, bias=t["bias"], dropout_p=0.3, seed=4
    )
    with use_backend("reference"):
        truth = functional.lora_linear(
            t["x"], t["weight"], t["lora_A"], t["lora_B"], scaling=1.5, bias=t["bias"], dropout_p=0.3, seed=4
        )
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
