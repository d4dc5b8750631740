"""Dropout of the low-rank branch: reproducible, different from call to call, and statistically right."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import FusedLoRALinear, functional
from tests.backends import everywhere
from tests.helpers import LoraProblem

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("lora_linear"), indirect=True)


def branch(x, p, **options):
    """drop(x) itself, read off through identity matrices: W = 0, A = B = 1."""
    k = x.shape[-1]
    eye = torch.eye(k, dtype=x.dtype, device=x.device)
    return functional.lora_linear(x, torch.zeros_like(eye), eye, eye, dropout_p=p, **options)


@EVERYWHERE
def test_seed_of_torch_reproduces(backend):
    x = torch.ones(40, 64, device=backend.device)
    torch.manual_seed(11)
    first, second = branch(x, 0.5), branch(x, 0.5)
    torch.manual_seed(11)
    assert torch.equal(branch(x, 0.5), first)
    assert torch.equal(branch(x, 0.5), second)
    assert not torch.equal(first, second), "two calls, two masks"
    torch.manual_seed(12)
    assert not torch.equal(branch(x, 0.5), first)


@EVERYWHERE
def test_explicit_seed_leaves_the_generator_alone(backend):
    x = torch.ones(8, 64, device=backend.device)
    state = torch.get_rng_state()
    by_int = branch(x, 0.5, seed=-5)
    by_tensor = branch(x, 0.5, seed=torch.tensor([-5], device=backend.device))
    by_scalar = branch(x, 0.5, seed=torch.tensor(-5, device=backend.device))
    assert torch.equal(by_int, by_tensor)
    assert torch.equal(by_int, by_scalar)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(by_int, branch(x, 0.5, seed=-6))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@EVERYWHERE
def test_keep_rate_and_scale(backend, p):
    """The number of kept elements is binomial: within 5 standard deviations. Kept ones are scaled by 1 / (1 - p)."""
    x = torch.ones(512, 256, device=backend.device)
    y = branch(x, p, seed=2024)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    total = x.numel()
    deviation = math.sqrt(total * p * (1 - p))
    assert abs(int(kept.sum()) - total * (1 - p)) < 5 * deviation
    # Nothing favours a column or a row either.
    for dim, size in ((0, 512), (1, 256)):
        rates = kept.double().mean(dim)
        assert float((rates - (1 - p)).abs().max()) < 5.5 * math.sqrt(p * (1 - p) / size)


@EVERYWHERE
def test_neighbouring_lanes_and_rows_are_independent(backend):
    """Correlations between shifted masks stay within 5 / sqrt(n): eight lanes share one call of the generator."""
    kept = (branch(torch.ones(512, 256, device=backend.device), 0.5, seed=9) != 0).double() - 0.5
    for rows, columns in [(0, shift) for shift in range(1, 10)] + [(1, 0), (1, 1), (2, 0)]:
        a, b = kept[: 512 - rows, : 256 - columns], kept[rows:, columns:]
        assert abs(float((a * b).mean()) / 0.25) < 5 / math.sqrt(a.numel()), (rows, columns)


@EVERYWHERE
def test_true_zeros_keep_their_gradient(backend):
    """A mask recomputed as `drop(x) != 0` would kill the gradient where x itself is zero (after a ReLU)."""
    x = torch.ones(64, 32, device=backend.device)
    kept = branch(x, 0.5, seed=3) != 0
    zeros = torch.zeros_like(x).requires_grad_()
    branch(zeros, 0.5, seed=3).sum().backward()
    torch.testing.assert_close(zeros.grad, kept * 2.0)


@EVERYWHERE
def test_input_gradient_uses_the_mask_of_the_forward_pass(backend):
    x = torch.randn(33, 40, device=backend.device).requires_grad_()
    y = branch(x, 0.3, seed=4)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 1])
@EVERYWHERE
def test_everything_dropped_is_the_frozen_layer(backend, p):
    """p = 1: the base output exactly, no NaN from 0 * inf, zero gradients for A and B."""
    problem = LoraProblem(9, 31, 17, 3, dropout_p=p, device=backend.device)
    y, grads = problem.run()
    t = {name: tensor.detach() for name, tensor in problem.tensors.items()}
    torch.testing.assert_close(y, F.linear(t["x"], t["weight"], t["bias"]))
    torch.testing.assert_close(grads["x"], problem.grad_y @ t["weight"])
    assert not grads["lora_A"].any()
    assert not grads["lora_B"].any()


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.0}, {"dropout_p": 0}, {"dropout_p": 0.9, "training": False}], ids=str
)
@EVERYWHERE
def test_no_dropout_draws_nothing(backend, options):
    """Without dropout the result is the plain one and torch's generator does not move."""
    problem = LoraProblem(9, 31, 17, 3, device=backend.device)
    t = problem.tensors
    state = torch.get_rng_state()
    y = functional.lora_linear(
        t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"], scaling=problem.scaling, **options
    )
    assert torch.equal(y.detach(), problem.run()[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_module_drops_in_training_mode_only():
    layer = FusedLoRALinear(64, 32, r=4, lora_dropout=0.5)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(16, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_two_projections_of_one_input_get_their_own_masks():
    """As PEFT: q, k and v each drop their own elements of the same x."""
    x = torch.ones(64, 64)
    assert not torch.equal(branch(x, 0.5) != 0, branch(x, 0.5) != 0)


@EVERYWHERE
def test_mask_does_not_depend_on_the_dtype_or_the_batch_shape(backend):
    """Element (m, k) of the flattened rows decides: bfloat16 or float32, [6, 40, 64] or [240, 64]."""
    flat = branch(torch.ones(240, 64, device=backend.device), 0.5, seed=8) != 0
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.ones(6, 40, 64, device=backend.device, dtype=dtype)
        assert torch.equal((branch(x, 0.5, seed=8) != 0).flatten(0, 1), flat)
