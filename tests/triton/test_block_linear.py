"""`sparse_linear` over whole blocks in the Triton kernels: edges, empty lines, splits, nothing beyond the results."""

from __future__ import annotations

import math

import pytest
import torch

from peft_kernels import explain, use_backend
from peft_kernels.formats import sparse
from peft_kernels.kernels.triton import _launch, sparse_linear
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.problems import SparseProblem
from tests.triton.launches import record_launches

pytest.importorskip("triton", reason="triton is not installed")

F16, F32 = torch.float16, torch.float32


# Blocks that reach over both edges, more rows than a tile, one whole block, nothing kept; the second line is empty.
@pytest.mark.parametrize(
    ("m", "n", "k", "block", "density", "dtype"),
    [
        (33, 150, 70, 32, 0.5, F32), (130, 100, 140, 64, 0.6, F16), (20, 128, 128, 128, 1.0, F16),
        (5, 40, 48, 32, 0.0, F16),
    ],
)  # fmt: skip
def test_against_float64(m, n, k, block, density, dtype):
    problem = SparseProblem(m, k, n, dtype=dtype, block=block, density=density)
    assert_within_rounding(problem, problem.run())


def test_the_accuracy_rule_and_the_same_bits():
    problem = SparseProblem(70, 66, 301, dtype=F16, density=0.7)
    result = problem.run()
    assert_as_accurate_as_eager(problem, result)
    first, second = named(result), named(problem.run())
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strides_of_x_and_of_the_gradient(layout):
    problem = SparseProblem(34, 70, 40, dtype=F16, density=0.7)
    x, grad_y = problem.tensors["x"].detach(), problem.grad_y
    if layout == "transposed":
        x, grad_y = (t.t().contiguous().t() for t in (x, grad_y))
    else:
        x, grad_y = (torch.stack([t, t.new_full(t.shape, math.nan)], -1)[..., 0] for t in (x, grad_y))
    problem.tensors["x"], problem.grad_y = x.requires_grad_(), grad_y
    assert_within_rounding(problem, problem.run())


def test_rows_are_split_where_blocks_are_few(monkeypatch):
    """One kept block over 300 rows: partial sums, added in order."""
    launched = record_launches(monkeypatch)
    problem = SparseProblem(300, 32, 32, dtype=F16, density=1.0)
    problem.freeze_all_but("values")
    assert_as_accurate_as_eager(problem, problem.run())
    assert launched[-2:] == ["_block_grad_values", "splitk_reduce"]


def test_a_line_without_blocks_gets_the_bias_or_zeros():
    problem = SparseProblem(9, 64, 96, dtype=F16, density=0.9)
    y, grads = problem.run()
    assert torch.equal(y[:, 32:64], problem.tensors["bias"][32:64].expand(9, 32))  # the second block row is empty
    kept = torch.zeros(96, 64)
    kept[:32, 32:] = 1
    weight = sparse.compress(kept.to(F16), "block", block=32)
    problem.weight, problem.tensors["values"] = weight, weight.values.requires_grad_()
    _, grads = problem.run()
    assert grads["x"][:, :32].eq(0).all()
    assert grads["x"][:, 32:].ne(0).any()


def test_nothing_beyond_the_results_is_written(monkeypatch):
    guarded = []

    def empty(shape, dtype, device):
        buffer = torch.full((math.prod(shape) + 4096,), float("nan"), dtype=dtype, device=device)
        guarded.append(buffer[math.prod(shape) :])
        return buffer[: math.prod(shape)].view(shape)

    problem = SparseProblem(21, 35, 37, density=0.8)
    monkeypatch.setattr(torch, "empty", empty)
    result = named(problem.run())
    assert len(guarded) >= 3
    assert all(guard.isnan().all() for guard in guarded)
    assert not any(value.isnan().any() for value in result.values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layout": "2:4"}, "not with layout '2:4'"),
        ({"weight_dtype": torch.bfloat16}, "a weight of the same dtype"),
        ({"dtype": torch.float64, "weight_dtype": torch.float64}, "float64 runs in PyTorch"),
        ({}, None),
    ],
)
def test_unsupported_says_why(changes, reason):
    found = sparse_linear.unsupported(SparseProblem(4, dtype=F16).dispatched()._replace(**changes))
    assert found is None if reason is None else reason in found


def test_the_interpreter_is_never_chosen_by_itself():
    problem = SparseProblem(4)
    args, options = problem.arguments(problem.tensors)
    with use_backend(None):
        assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in explain("sparse_linear", *args, **options).rejected
