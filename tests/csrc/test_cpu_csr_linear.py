"""csrc/csr_linear.cpp at every vector width: right to rounding, the same bits at any number of threads, wide rows, and
numbers that pad. Densities are in tests/ops."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import use_backend
from peft_kernels.formats import sparse
from peft_kernels.kernels.cpu import sparse_linear
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.problems import SparseProblem

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(("m", "dtype"), [(3, F32), (15, F32), (33, F32), (3, BF16), (33, F16)])
def test_right_to_rounding(width, m, dtype):
    """Dots and blocks of 16 rows that are not full, sides that are no multiple of 4, rows longer than what is summed at
    a time (256, 32) and columns longer than that (64)."""
    for k, n, density in ((7, 70, 0.3), (66, 33, 0.1), (601, 90, 0.8)):
        problem = SparseProblem(m, k, n, dtype, layout="csr", density=density, bias=n != 33)
        with use_backend("cpu"):
            assert_within_rounding(problem, problem.run())


def test_sums_are_as_accurate_as_eager(width):
    """Long ones, and those of a row that keeps 80 of 4096 numbers: a dense product cuts its sums by columns, so that it
    adds a few of them at a time."""
    for m, k, n, density in ((2, 2100, 1000, 0.9), (7, 2100, 1000, 0.9), (16, 4096, 1024, 0.02)):
        problem = SparseProblem(m, k, n, layout="csr", density=density, bias=False)
        with use_backend("cpu"):
            assert_as_accurate_as_eager(problem, problem.run())


def test_the_same_bits_at_any_number_of_threads(width):
    """Sizes at which several threads share blocks of rows, and rows of W where there is one block only."""
    before = torch.get_num_threads()
    for m in (1, 16, 130):
        problem = SparseProblem(m, 700, 500, layout="csr", density=0.4)
        problem.freeze_all_but("x")
        results = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                with use_backend("cpu"):
                    results.append(named(problem.run()))
        finally:
            torch.set_num_threads(before)
        for name, value in results[0].items():
            assert value.any(), name
            assert all(torch.equal(other[name], value) for other in results[1:]), name


@pytest.mark.parametrize("k", [40_000, 65_535, 65_536])
def test_columns_past_15_and_16_bits(width, k):
    weight = torch.zeros(5, k)
    weight[0, [0, 32_767, 32_768, k - 1]] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    weight[3, k - 2] = 16
    packed = sparse.compress(weight, "csr")
    draw = torch.Generator().manual_seed(1)
    for m in (1, 5):
        x = torch.randint(-8, 9, (m, k), generator=draw).float()
        grad_y = torch.randint(-8, 9, (m, 5), generator=draw).float()
        assert torch.equal(sparse_linear.forward(x, packed, None), x @ weight.t())
        grad_x, *_ = sparse_linear.backward(grad_y, None, packed, (True, False, False))
        assert torch.equal(grad_x, grad_y @ weight)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_is_not_kept_meets_no_infinity(width, dtype):
    """Numbers that pad are 0 times a zero: an infinity of x reaches only rows that keep its column."""
    weight = torch.zeros(3, 50, dtype=dtype)
    weight[0, 3], weight[1, 49] = 1, 2
    packed = sparse.compress(weight, "csr")
    wider = sparse.compress(torch.ones(2, 51, dtype=dtype), "csr")
    for m in (1, 6):
        # Infinities in memory of the size that the next call asks for.
        sparse_linear.forward(torch.full((m, 51), torch.inf, dtype=dtype), wider, None)
        x = torch.ones(m, 50, dtype=dtype)
        x[0, 3], x[-1, 0], x[-1, 48] = torch.inf, torch.nan, torch.inf
        y = sparse_linear.forward(x, packed, None)
        assert y[0].tolist() == [torch.inf, 2, 0]
        assert m == 1 or y[-1].tolist() == [1, 2, 0]
        grad_y = torch.ones(m, 3, dtype=dtype)
        grad_y[0, 2] = torch.inf
        grad_x, *_ = sparse_linear.backward(grad_y, None, packed, (True, False, False))
        assert torch.equal(grad_x, weight[:2].sum(0).expand(m, 50))


def test_rows_and_weights_that_lie_apart(width):
    """Strides, and tensors that begin anywhere, as those of a file may."""
    weight = torch.randint(-3, 4, (33, 60), generator=torch.Generator().manual_seed(3)).float()
    packed = sparse.compress(weight, "csr")
    moved = packed.with_tensors([torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in packed.tensors])
    x = torch.arange(4 * 61 * 2).remainder(5).float().view(8, 61)[::2, 1:]
    assert torch.equal(sparse_linear.forward(x, moved, None), x @ weight.t())
    grad_y = x.t()[:33, :].t()
    assert torch.equal(sparse_linear.backward(grad_y, None, moved, (True, False, False))[0], grad_y @ weight)
