"""csrc/sparse_delta_linear.cpp at every vector width: right to rounding, the same bits at any number of threads, and
places past 32 bits. Densities and shapes are in tests/ops."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import use_backend
from peft_kernels.formats.sparse_delta import sparse_delta
from peft_kernels.kernels.cpu import sparse_delta_linear
from tests.helpers import assert_within_rounding, named
from tests.problems import SparseDeltaProblem

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("m", [1, 15, 17, 300])
def test_right_to_rounding(width, m, dtype):
    """Blocks of 16 rows and panels of 256 that are not full, columns that are no multiple of 4, rows of W with 0 to 9
    places, so that groups of four are full, begun and empty."""
    for k, n, deltas in ((7, 70, None), (66, 33, None), (35, 19, 3)):
        problem = SparseDeltaProblem(m, k, n, dtype, F32, 0.13, deltas=deltas)
        with use_backend("cpu"):
            assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("options", [{}, {"nf4": True, "k": 576}, {"deltas": 3}], ids=["dense", "nf4", "several"])
def test_many_places_are_right_to_rounding(width, options, dtype):
    """Where Δ is added to rows of W on their way into the product. Pieces of 256 columns, the last one not full, from
    which both directions take parts that begin within one; places of either width."""
    for density, wide in ((0.4, False), (1.0, True)):
        problem = SparseDeltaProblem(**{"m": 5, "k": 555, "n": 70, **options}, dtype=dtype, density=density)
        if wide:
            problem.places = [places._replace(flat=places.flat.long()) for places in problem.places]
        with use_backend("cpu"):
            assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_sum_is_rounded_once(width, dtype):
    """A weight in float32, as under autocast: rounded before Δ is added, or never, it would give other numbers."""
    eps = torch.finfo(dtype).eps
    weight, values = torch.tensor([[1 + 0.3 * eps]]), torch.tensor([0.4 * eps])
    delta = sparse_delta(torch.tensor([0]), values, (1, 1))
    x, changed = torch.full((1, 1), 3.0, dtype=dtype), 1 + eps
    y = sparse_delta_linear.forward(x, weight, [delta], None, None)
    grad_x = sparse_delta_linear.backward(x, x, weight, [delta], None, (True, False, False, [False]))[0]
    assert y == grad_x == torch.tensor(3 * changed).to(dtype)
    assert y != torch.tensor(3 * (1 + 0.7 * eps)).to(dtype)


def test_the_same_bits_at_any_number_of_threads(width):
    """Sizes at which several threads share blocks of rows, and rows of W where there is one block only."""
    before = torch.get_num_threads()
    for m, deltas, density in ((270, None, 0.1), (16, None, 0.1), (90, 3, 0.1), (270, None, 0.4)):
        problem = SparseDeltaProblem(m, 320, 256, density=density, deltas=deltas)
        problem.freeze_all_but("x", "values", "values.0", "values.1", "values.2")
        results = []
        try:
            for threads in (1, 2, 5):
                # PyTorch's product with W is not what is tested: a weight of zeros, of which every bit is the same.
                torch.set_num_threads(threads)
                weight = torch.zeros_like(problem.tensors["weight"]).detach()
                with use_backend("cpu"):
                    results.append(named(problem.run(weight=weight)))
        finally:
            torch.set_num_threads(before)
        for name, value in results[0].items():
            # Of several the first has no places and the last no rows.
            assert name in ("values.0", "values.2") or value.any(), name
            assert all(torch.equal(other[name], value) for other in results[1:]), name


def test_places_past_32_bits(width, cpu):
    """A matrix of 2³¹ weights that nobody has: y and dx of one row of x, and the gradients, at int64 places."""
    n, k = 1 << 16, 1 << 15
    rows, columns = torch.tensor([0, 40_000, 65_535, 65_535]), torch.tensor([3, 32_767, 0, 32_767])
    flat, values = rows * k + columns, torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert flat.max() == 2**31 - 1
    x, grad_y = torch.randn(1, k), torch.randn(1, n)
    y, grad_x, grads = torch.zeros(1, n), torch.zeros(1, k), torch.full((4,), float("nan"))
    delta = (flat.data_ptr(), True, 4, values.data_ptr(), 0, 1, grads.data_ptr())
    cpu.sparse_delta_forward(n, k, [delta], x.data_ptr(), k, y.data_ptr(), 2)
    cpu.sparse_delta_backward(n, k, [delta], 0, grad_y.data_ptr(), n, x.data_ptr(), k, grad_x.data_ptr(), 2)
    expected_y = torch.zeros(1, n).index_add(1, rows, x[:, columns] * values)
    expected_x = torch.zeros(1, k).index_add(1, columns, grad_y[:, rows] * values)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(grad_x, expected_x)
    torch.testing.assert_close(grads, grad_y[0, rows] * x[0, columns])
