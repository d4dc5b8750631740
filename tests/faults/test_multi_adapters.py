"""Faults of others where the rows of a batch run adapters of their own: F50, F51, and what F11 says of segments."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import functional
from tests.backends import everywhere
from tests.helpers import assert_within_rounding, named
from tests.problems import MultiLoraProblem

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("multi_lora_linear"), indirect=True)


@pytest.mark.parametrize("per_row", [1, 2])
@EVERYWHERE
def test_f50_nothing_of_another_users_adapter(backend, per_row):
    """All other adapters are NaN, those that no row chose and those that other rows chose: neither the row's result nor
    any gradient of its adapter may touch them."""
    problem = MultiLoraProblem(33, ranks=(8, 5, 8, 3), per_row=per_row, dropout_p=0.2, device=backend.device)
    clean, mine = named(problem.run()), 1
    own = ((problem.choices == mine) | (problem.choices == -1)).all(1)
    assert own.any()
    poisoned = {
        name: torch.full_like(t, float("nan")).requires_grad_()
        for name, t in problem.tensors.items()
        if name.startswith("lora_") and not name.endswith(f".{mine}")
    }
    problem.grad_y = problem.grad_y * own.unsqueeze(1)
    expected = named(problem.run())
    result = named(problem.run(**poisoned))
    assert torch.equal(result["y"][own], clean["y"][own])
    assert result["y"][~own].isnan().any()
    assert torch.equal(result["x"][own], expected["x"][own])
    for name in (f"lora_As.{mine}", f"lora_Bs.{mine}"):
        assert torch.equal(result[name], expected[name]), name


@EVERYWHERE
def test_f50_unknown_ids_are_refused_not_served_by_the_base_model(backend):
    problem = MultiLoraProblem(5, ranks=(4, 4), device=backend.device)
    for ids in ([0, 1, 2, 0, 0], [0, -3, 1, 0, 0]):
        problem.ids = torch.tensor(ids)
        with pytest.raises(ValueError, match=r"adapter_ids holds -?[23]; expected ids in"):
            problem.call()


@pytest.mark.parametrize("what", ["ids", "weights"])
@EVERYWHERE
def test_f50_a_buffer_of_ids_filled_anew_before_backward(backend, what):
    """A server's buffers are used again for the next batch: gradients must not go to the adapters of that one."""
    problem = MultiLoraProblem(9, per_row=2, device=backend.device)
    buffer = problem.ids if what == "ids" else problem.tensors["adapter_weights"].detach()
    y = problem.call({**problem.tensors, "adapter_weights": problem.tensors["adapter_weights"].detach()})
    buffer.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("ranks", [(1, 8, 64, 96), (96, 64, 8, 1), (64,), (16, 16, 16)], ids=str)
@EVERYWHERE
def test_f51_mixed_ranks_in_one_batch(backend, ranks):
    """The largest first and last; one adapter alone is no other path with other numbers."""
    ids = [(5 * row) % (len(ranks) + 1) - 1 for row in range(37)]
    problem = MultiLoraProblem(37, ranks=ranks, ids=ids, device=backend.device)
    assert_within_rounding(problem, problem.run())


@EVERYWHERE
def test_f51_order_of_rows_and_duplicates(backend):
    """Sorted or not, each row's result is the same, and the same adapter under two ids is one adapter."""
    problem = MultiLoraProblem(40, ranks=(4, 7, 4), device=backend.device, bias=False)
    y = problem.call()
    order = torch.randperm(40)
    t = {**problem.tensors, "x": problem.tensors["x"][order]}
    (x, weight, lora_As, lora_Bs, ids), options = problem.arguments(t)
    torch.testing.assert_close(
        functional.multi_lora_linear(x, weight, lora_As, lora_Bs, ids[order], **options), y[order]
    )
    lora_As, lora_Bs, scalings = lora_As * 2, lora_Bs * 2, problem.scalings * 2
    doubled = torch.where((torch.arange(40) % 2 == 0) & (problem.ids >= 0), problem.ids + 3, problem.ids)
    options["scalings"] = scalings
    again = functional.multi_lora_linear(problem.tensors["x"], weight, lora_As, lora_Bs, doubled, **options)
    torch.testing.assert_close(again, y)
    first = torch.autograd.grad(again.square().sum(), lora_As[:3] + lora_Bs[:3])
    torch.testing.assert_close(
        first, torch.autograd.grad(y.square().sum(), lora_As[:3] + lora_Bs[:3]), rtol=1e-5, atol=1e-4
    )


@EVERYWHERE
def test_f11_adapters_without_rows(backend):
    """First, last, all of them: zero gradients, not the memory of whoever had it before."""
    for ids in ([1, 1, 1], [0, 0, 2], [-1, -1, -1], []):
        problem = MultiLoraProblem(
            len(ids), ranks=(4, 7, 4), ids=torch.tensor(ids, dtype=torch.int64), device=backend.device
        )
        _, grads = problem.run()
        for adapter in range(3):
            for side in "AB":
                assert bool(grads[f"lora_{side}s.{adapter}"].any()) == (adapter in ids), (ids, adapter)
