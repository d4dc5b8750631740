"""Dropout of each new op: the specification's mask, one for each adapter, the same in forward, backward and everywhere.

The masks are read off by making each layer transparent: W = 0, A and B identity matrices.
"""

from __future__ import annotations

import math

import pytest
import torch

from peft_kernels import functional, use_backend
from peft_kernels.formats.mask import full
from tests.backends import across
from tests.helpers import named
from tests.ops.cases import F64, LINEAR, problem_of
from tests.problems.base import mask_of

OF_AN_X = pytest.mark.parametrize("backend", across(*LINEAR), indirect=True)
GROUP = pytest.mark.parametrize("backend", across("lora_linear_group"), indirect=True)
P, SEED, K = 0.3, 77, 64


def transparent(op: str, x: torch.Tensor, p=P, seed=SEED, **options) -> list[torch.Tensor]:
    """drop(x) of each adapter of the op (the group has three, of which two add to one output, as x and 100 x)."""
    k = x.shape[-1]
    eye, zero = torch.eye(k, dtype=x.dtype, device=x.device), torch.zeros(k, k, dtype=x.dtype, device=x.device)
    options = {"dropout_p": p, "seed": seed, **options}
    if op == "lora_linear_group":
        one, two = functional.lora_linear_group(
            x, (zero, zero), (eye, [eye, eye]), (eye, [eye, eye]), scalings=(1.0, [1.0, 100.0]), **options
        )
        return [one, two]
    if op == "dora_linear":
        ones = torch.ones(k, dtype=x.dtype, device=x.device)
        return [functional.dora_linear(x, zero, eye, eye, ones, weight_norm=ones.float(), **options)]
    if op == "lora_expert_linear":
        offsets = torch.tensor([x.shape[0] // 3, x.shape[0]], dtype=torch.int32, device=x.device)
        args = (t.expand(2, k, k) for t in (zero, eye, eye))
        return [functional.lora_expert_linear(x, *args, offsets, **options)]
    if op == "multi_lora_linear":
        ids = torch.arange(x.shape[0], device=x.device) % 3
        return [functional.multi_lora_linear(x, zero, [eye] * 3, [eye] * 3, ids, scalings=1.0, **options)]
    if op == "multi_lora_expert_linear":
        ids = torch.arange(x.shape[0], device=x.device) % 3
        offsets = torch.tensor([x.shape[0] // 3, x.shape[0]], dtype=torch.int32, device=x.device)
        base, a, b = (t.expand(2, k, k) for t in (zero, eye, eye))
        return [functional.multi_lora_expert_linear(x, base, [a] * 3, [b] * 3, offsets, ids, scalings=1.0, **options)]
    if op == "masked_lora_linear":
        mask = full(k, k, device=x.device)
        return [functional.masked_lora_linear(x, zero, mask, eye, eye, update_masked=True, **options)]
    if op == "nf4_lora_linear":
        return [functional.nf4_lora_linear(x, functional.nf4_quantize(zero, 64, False), eye, eye, **options)]
    raise KeyError(op)


TRANSPARENT = pytest.mark.parametrize("backend", across(*(op for op in LINEAR if "mlp" not in op)), indirect=True)


@pytest.mark.parametrize("shape", [(30, K), (9, 37)], ids=str)
@TRANSPARENT
def test_the_mask_is_that_of_the_specification(backend, shape):
    """Adapter i takes seed + i; what is kept is scaled by 1 / (1 - p)."""
    x = torch.rand(shape, device=backend.device) + 0.5
    masks = [mask_of(x, P, SEED + i) for i in range(3)]
    ys = transparent(backend.op, x)
    torch.testing.assert_close(ys[0], x * masks[0])
    if len(ys) > 1:
        torch.testing.assert_close(ys[1], x * masks[1] + 100 * x * masks[2])
        assert not torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("seed", [SEED, None])
@TRANSPARENT
def test_gradient_of_x_has_the_mask_of_the_forward_pass_and_true_zeros_keep_theirs(backend, seed):
    """Where x is zero, as after a ReLU, a mask recomputed as drop(x) != 0 would be zero as well."""
    x = torch.randn(33, K, device=backend.device).relu().requires_grad_()
    torch.manual_seed(5)
    ys = transparent(backend.op, x, seed=seed)
    (grad,) = torch.autograd.grad(sum(y.sum() for y in ys), x)
    torch.manual_seed(5)
    ones = torch.ones_like(x)
    expected = sum(transparent(backend.op, ones, seed=seed))
    torch.testing.assert_close(grad, expected)
    assert (grad[x == 0] != 0).double().mean() > 0.5


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@TRANSPARENT
def test_keep_rate(backend, p):
    """Binomial: within 5 standard deviations."""
    kept = transparent(backend.op, torch.ones(256, 128, device=backend.device), p=p)[0] != 0
    deviation = math.sqrt(kept.numel() * p * (1 - p))
    assert abs(int(kept.sum()) - kept.numel() * (1 - p)) < 5 * deviation


@pytest.mark.parametrize("dropout_p", [1.0, 1])
@OF_AN_X
def test_everything_dropped_is_the_frozen_layer(backend, dropout_p):
    """p = 1: exactly what zero adapters give, no NaN from 0 · inf, zero gradients for A and B."""
    problem = problem_of(backend.op, dropout_p=dropout_p, device=backend.device)
    if backend.op == "dora_linear":
        problem.weight_norm = torch.full((problem.n,), 2.0, device=backend.device)
    y, grads = problem.run()
    factors = {name: t * 0 for name, t in problem.tensors.items() if name.startswith("lora_B")}
    frozen, truths = problem_without_dropout(problem).run(
        **{n: t.detach().requires_grad_() for n, t in factors.items()}
    )
    torch.testing.assert_close(y, frozen)
    for name, grad in grads.items():
        if name.startswith("lora_"):
            assert not grad.any(), name
        else:
            torch.testing.assert_close(grad, truths[name], msg=name)


def problem_without_dropout(problem):
    problem.dropout_p = 0.0
    return problem


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.0}, {"dropout_p": 0}, {"dropout_p": 0.9, "training": False}], ids=str
)
@OF_AN_X
def test_no_dropout_draws_nothing(backend, options):
    """Without dropout the result is the plain one and torch's generator does not move."""
    problem = problem_of(backend.op, device=backend.device)
    state = torch.get_rng_state()
    again = named((problem.call(**options, seed=None), {}))
    plain = named((problem.call(), {}))
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert torch.equal(torch.get_rng_state(), state)


@OF_AN_X
def test_seeds(backend):
    """torch.manual_seed reproduces; two calls differ; an integer or a tensor leaves the generator alone and agree."""
    problem = problem_of(backend.op, dropout_p=0.5, device=backend.device)

    def run(seed):
        y = (
            problem.call(seed=seed).detach()
            if not isinstance(problem.grad_y, tuple)
            else torch.cat(problem.call(seed=seed), -1)
        )
        return y

    torch.manual_seed(11)
    first, second = run(None), run(None)
    torch.manual_seed(11)
    assert torch.equal(run(None), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    several = not backend.op.startswith("multi_")  # whose mask is that of the layer, whichever adapters run
    adapters = sum(name.startswith("lora_A") for name in problem.tensors) if several else 1
    assert torch.equal(run(-5), run(torch.arange(-5, -5 + adapters, device=backend.device)))
    assert not torch.equal(run(-5), run(-6))
    assert torch.equal(torch.get_rng_state(), state)


@GROUP
def test_each_adapter_has_its_own_probability(backend):
    """One keeps everything, one drops half, one drops all: nested as the adapters are."""
    x = torch.rand(30, K, device=backend.device) + 0.5
    one, two = transparent(backend.op, x, p=(0.0, [0.5, 1.0]))
    assert torch.equal(one, x)
    torch.testing.assert_close(two, x * mask_of(x, 0.5, SEED + 1))
    one, two = transparent(backend.op, x, p=(0.5, [1.0, 0.0]))
    torch.testing.assert_close(one, x * mask_of(x, 0.5, SEED))
    torch.testing.assert_close(two, 100 * x)


@GROUP
def test_a_group_of_one_is_the_linear(backend):
    """The same seed, the same mask, as `lora_linear`."""
    x = torch.rand(30, K, dtype=F64, device=backend.device)
    w, a, b = (torch.rand(*size, dtype=F64, device=backend.device) for size in ((9, K), (3, K), (9, 3)))
    (y,) = functional.lora_linear_group(x, [w], [a], [b], scalings=0.5, dropout_p=P, seed=SEED)
    with use_backend("reference"):
        truth = functional.lora_linear(x, w, a, b, scaling=0.5, dropout_p=P, seed=SEED)
    torch.testing.assert_close(y, truth)


@pytest.mark.parametrize("backend", across("lora_expert_linear"), indirect=True)
def test_experts_draw_by_row_of_the_whole(backend):
    """The mask of a row does not depend on which expert has it, so that it is that of `philox_dropout(x)`."""
    x = torch.ones(30, K, device=backend.device)
    eye, zero = torch.eye(K, device=backend.device), torch.zeros(K, K, device=backend.device)
    results = []
    for ends in ((30, 30, 30), (1, 17, 30), (0, 0, 30)):
        offsets = torch.tensor(ends, dtype=torch.int32, device=backend.device)
        args = (t.expand(3, K, K) for t in (zero, eye, eye))
        results.append(functional.lora_expert_linear(x, *args, offsets, dropout_p=P, seed=SEED))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", across("lora_swiglu_mlp"), indirect=True)
def test_the_block_drops_x_twice_and_the_activation_once(backend):
    """gate takes the seed, up the next, down the one after; the mask of down has the shape of the activation."""
    k = 48
    x = torch.rand(20, k, dtype=F64, device=backend.device)
    eye, zero = (torch.eye(k, dtype=F64, device=backend.device), torch.zeros(k, k, dtype=F64, device=backend.device))
    y = functional.lora_swiglu_mlp(
        x, (zero,) * 3, (eye,) * 3, (eye,) * 3, scalings=1.0, activation="gelu", dropout_p=P, seed=SEED
    )
    gate, up = x * mask_of(x, P, SEED), x * mask_of(x, P, SEED + 1)
    h = torch.nn.functional.gelu(gate) * up
    torch.testing.assert_close(y, h * mask_of(h, P, SEED + 2))
