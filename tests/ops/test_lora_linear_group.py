"""`lora_linear_group` and the options that `lora_linear` shares with it: nestings, unused outputs, token masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import functional, use_backend
from tests.backends import everywhere
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.ops.cases import BF16, F32, dtype_id
from tests.problems import GroupProblem, LoraProblem

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("lora_linear_group"), indirect=True)

NESTINGS = {
    "one": ((9,), ((4,),), 1.5),
    "frozen": ((9, 5), ((), ()), 1.5),
    "q, k, v of grouped-query attention": ((32, 8, 8), ((4,), (4,), (4,)), 1.5),
    "unequal ranks and scalings": ((32, 8, 7), ((1,), (16,), (3,)), (1.5, -0.25, 7.0)),
    "one of three": ((11, 23, 7), ((), (5,), ()), (None, 2.0, None)),
    "several at once": ((11, 23), ((2, 1, 8), (3, 3)), ([1.5, 0.0, -2.0], 0.5)),
    "all kinds": ((1, 23, 2, 40), ((2, 7), (), (1,), (3, 3, 3)), (0.5, None, 3.0, [1.0, 2.0, 3.0])),
}


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [(name, (F32, F32)) for name in NESTINGS] + [("several at once", (BF16, F32)), ("all kinds", (BF16, BF16))],
    ids=lambda value: dtype_id(value) if isinstance(value, tuple) else None,
)
@EVERYWHERE
def test_nestings(backend, name, dtypes):
    """With dropout; other tests of the group run without."""
    ns, ranks, scalings = NESTINGS[name]
    problem = GroupProblem(
        19, 21, ns, ranks, scalings=scalings, dropout_p=0.3, dtype=dtypes[0], adapter_dtype=dtypes[1],
        device=backend.device,
    )  # fmt: skip
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("dropout_p", [0.0, (0.3, 0.3, (0.0, 0.3))], ids=str)
@pytest.mark.parametrize("unused", [(0,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
@EVERYWHERE
def test_unused_outputs(backend, unused, dropout_p):
    """Autograd hands None for an output that no loss depends on: its tensors get zeros, the others are right."""
    problem = GroupProblem(19, 21, scalings=(1.5, None, (0.5, 2.0)), dropout_p=dropout_p, device=backend.device)
    problem.grad_y = tuple(None if j in unused else grad for j, grad in enumerate(problem.grad_y))
    y, grads = problem.run()
    assert_within_rounding(problem, (y, grads))
    for j in unused:
        assert not any(grad.any() for name, grad in grads.items() if f"s.{j}" in name)


@EVERYWHERE
def test_backward_of_one_output_after_another(backend):
    """Each output by its own backward pass, gradients accumulated: the same as all at once."""
    problem = GroupProblem(19, 21, device=backend.device)
    _, together = problem.run()
    ys = problem.call()
    for y, grad in zip(ys, problem.grad_y, strict=True):
        y.backward(grad, retain_graph=True)
    for name, tensor in problem.tensors.items():
        torch.testing.assert_close(tensor.grad, together[name], rtol=1e-5, atol=1e-5, msg=name)


@EVERYWHERE
def test_gradients_do_not_share_memory(backend):
    """dA of adapters that are computed side by side: an optimizer may write into each in place."""
    problem = GroupProblem(19, 21, ranks=((5,), (2,), (3, 8)), device=backend.device)
    leaves = list(problem.tensors.values())
    torch.autograd.backward(problem.call(), problem.grad_y)
    before = [leaf.grad.clone() for leaf in leaves]
    for i, leaf in enumerate(leaves):
        leaf.grad.fill_(float(i))
    assert all(bool((leaf.grad == i).all()) for i, leaf in enumerate(leaves))
    again = problem.run()[1]
    assert all(torch.equal(grad, first) for grad, first in zip(again.values(), before, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@EVERYWHERE
def test_tied_projections(backend, dropout_p):
    """One weight and one adapter in two places: gradients add up."""
    one = GroupProblem(19, 21, (9,), ((4,),), bias=False, device=backend.device)
    t = one.tensors
    w, a, b = t["weights.0"], t["lora_As.0.0"], t["lora_Bs.0.0"]
    ys = functional.lora_linear_group(t["x"], [w, w], [a, a], [b, b], scalings=1.5, dropout_p=dropout_p, seed=3)
    grads = torch.autograd.grad([y.sum() for y in ys], (t["x"], w, a, b))
    expected = [torch.zeros_like(grad) for grad in grads]
    for seed in (3, 4):
        y = functional.lora_linear(t["x"], w, a, b, scaling=1.5, dropout_p=dropout_p, seed=seed)
        for total, grad in zip(expected, torch.autograd.grad(y.sum(), (t["x"], w, a, b)), strict=True):
            total += grad
    torch.testing.assert_close(list(grads), expected, rtol=1e-5, atol=1e-4)


def masks(batch: tuple[int, ...], device: str) -> dict[str, torch.Tensor]:
    some = torch.rand(batch, generator=torch.Generator().manual_seed(1)) < 0.4
    last = torch.zeros(batch, dtype=torch.bool)
    last[..., -3:] = True  # aLoRA: the tokens from the invocation on
    made = {
        "all": torch.ones(batch, dtype=torch.bool),
        "none": torch.zeros(batch, dtype=torch.bool),
        "some": some,
        "last": last,
    }
    made["strided"] = torch.stack([some, ~some], -1)[..., 0]
    return {name: mask.to(device) for name, mask in made.items()}


@pytest.mark.parametrize(
    ("which", "dtypes"),
    [(which, (F32, F32)) for which in ("all", "none", "some", "last", "strided")] + [("some", (BF16, F32))],
    ids=lambda value: dtype_id(value) if isinstance(value, tuple) else None,
)
@pytest.mark.parametrize(
    ("op", "dropout_p"), [("lora_linear", 0.3), ("lora_linear_group", 0.0), ("lora_linear_group", 0.3)]
)
@EVERYWHERE
def test_token_masks(backend, op, dropout_p, which, dtypes):
    mask, kind = masks((3, 7), backend.device)[which], LoraProblem if op == "lora_linear" else GroupProblem
    options = {"dropout_p": dropout_p, "dtype": dtypes[0], "adapter_dtype": dtypes[1], "device": backend.device}
    if op == "lora_linear":
        options["lora_bias"] = True
    problem = kind((3, 7), 21, token_mask=mask, **options)
    y, grads = problem.run()
    assert_within_rounding(problem, (y, grads))
    if which == "none":
        assert not any(grad.any() for name, grad in grads.items() if name.startswith("lora_"))
        t = problem.tensors
        weight, bias, out = (
            (t["weight"], t["bias"], y) if op == "lora_linear" else (t["weights.0"], t["biases.0"], y[0])
        )
        assert torch.equal(out, F.linear(t["x"], weight, bias).detach())


@EVERYWHERE
def test_all_true_is_no_mask(backend):
    problem = GroupProblem((3, 7), 21, device=backend.device)
    plain = named(problem.run())
    problem.token_mask = torch.ones(3, 7, dtype=torch.bool, device=backend.device)
    masked = named(problem.run())
    assert all(torch.equal(masked[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@EVERYWHERE
def test_what_is_masked_leaks_nowhere(backend, dropout_p):
    """A predicate, not a product: where the low-rank branch of a masked row overflows to infinity or NaN (A so large
    that only W sees a finite row), neither y nor the gradients of A and B see it."""
    mask = torch.tensor([True, False, True, True, False, True], device=backend.device)
    problem = GroupProblem(6, 21, (9, 5), ((3,), (2, 4)), dropout_p=dropout_p, token_mask=mask, device=backend.device)
    x = problem.tensors["x"].detach().clone()
    x[~mask] *= 2e38 / x[~mask].abs().max()
    for name in ("lora_As.0.0", "lora_As.1.1"):  # x A overflows in the masked rows alone
        problem.tensors[name] = (problem.tensors[name].detach() * 8).requires_grad_()
    with torch.no_grad():
        assert not (x @ problem.tensors["lora_As.0.0"].t())[~mask].isfinite().all(), "the situation itself"
    problem.freeze_all_but("x", "lora_As", "lora_Bs")
    truth = named(problem.run(x=torch.where(mask.unsqueeze(1), x, 0.0).requires_grad_()))
    dirty = named(problem.run(x=x.requires_grad_()))
    for name in ("y.0", "y.1", "x"):
        assert torch.equal(dirty[name][mask], truth[name][mask]), name
        assert dirty[name][mask].isfinite().all(), name
    for name in (name for name in dirty if name.startswith("lora_")):
        assert torch.equal(dirty[name], truth[name]), name


@EVERYWHERE
def test_a_masked_row_with_nan_in_its_gradient(backend):
    """NaN in dY of a masked row is dx's and dW's business: the adapters' gradients do not have that row."""
    mask = torch.tensor([True, False, True, True, False, True], device=backend.device)
    problem = GroupProblem(6, 21, (9, 5), ((3,), (2, 4)), token_mask=mask, device=backend.device)
    problem.freeze_all_but("lora_As")
    clean = problem.run()[1]
    problem.grad_y = tuple(grad.masked_fill(~mask.unsqueeze(1), float("nan")) for grad in problem.grad_y)
    for name, grad in problem.run()[1].items():
        assert torch.equal(grad, clean[name]), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=dtype_id)
@pytest.mark.parametrize("backend", everywhere("lora_linear"), indirect=True)
def test_lora_bias(backend, dtypes, bias):
    """PEFT's `lora_bias=True`: scaled with the update, trained, never dropped."""
    problem = LoraProblem(
        40, 66, 301, 36, dtype=dtypes[0], adapter_dtype=dtypes[1], bias=bias, dropout_p=0.3, lora_bias=True,
        scaling=-2.5, device=backend.device,
    )  # fmt: skip
    result = problem.run()
    assert_within_rounding(problem, result)
    assert_as_accurate_as_eager(problem, result)
    assert result[1]["lora_bias"].dtype == dtypes[1]


def test_scalings_of_adapters_are_not_mixed_up():
    """Adapters of one output with their own factors, next to one shared factor: float64 to the last bits."""
    for scalings in (1.0, 0.5, (0.5, (2.0, 2.0)), (0.5, (2.0, -3.0)), (0.0, (0.0, 1.0))):
        problem = GroupProblem(6, 21, (9, 5), ((3,), (2, 4)), scalings=scalings, dtype=torch.float64)
        truth = named(problem.eager())
        for name in ("reference", "composed"):
            with use_backend(name):
                torch.testing.assert_close(named(problem.run()), truth, rtol=1e-11, atol=1e-12)
