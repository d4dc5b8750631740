"""csrc/lora_linear.cpp: accuracy around the edges of its tiles at every vector width, and bits that depend on nothing
but the inputs. The grid of shapes that all implementations share is in tests/ops."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft_kernels import use_backend
from peft_kernels.kernels.cpu import lora_linear as cpu_kernel
from peft_kernels.kernels.reference import lora_linear as reference
from peft_kernels.ops.lora_linear import Problem
from tests.helpers import LoraProblem, assert_as_accurate_as_eager, assert_within_rounding, relative_error

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# (M, K, N, r) one below, at and above the tiles of rows (48) and columns (96; 384 for masks), register tiles (6 or 12
# rows, 8 to 48 columns), vectors, and the parts of the rows that have sums of their own.
EDGES = (
    (47, 95, 97, 4),
    (48, 96, 96, 8),
    (49, 97, 95, 9),
    (65, 384, 40, 16),
    (97, 385, 130, 17),
    (130, 17, 300, 17),
    (200, 260, 131, 33),
    (96, 48, 64, 100),
    (600, 100, 70, 5),
)
# Where the whole layer is one call: one below, at and above vectors (4, 8, 16) and blocks of rows (4).
SMALL = (
    (1, 1, 1, 1),
    (4, 16, 16, 4),
    (5, 17, 15, 3),
    (7, 33, 31, 8),
    (16, 64, 64, 17),
    (3, 2, 100, 64),
    (200, 5, 3, 2),
    (130, 1000, 1, 2),
    (1, 1, 4000, 64),
)


DTYPES = ((F32, F32), (BF16, F32), (F16, F16))


def by_turns(shapes: tuple) -> pytest.MarkDecorator:
    """Every shape in every dtype, with and without a mask by turns: each shape and each dtype meets both, and in
    float32 the shapes about the width of the masks have one."""
    cases = [
        (shape, dtypes, (0.0, 0.3)[(i + j) % 2]) for i, shape in enumerate(shapes) for j, dtypes in enumerate(DTYPES)
    ]
    return pytest.mark.parametrize(("shape", "dtypes", "dropout_p"), cases, ids=str)


@by_turns(EDGES)
def test_accuracy(width, shape, dtypes, dropout_p):
    m, k, n, r = shape
    problem = LoraProblem(m, k, n, r, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=dropout_p)
    with use_backend("cpu"):
        assert_as_accurate_as_eager(problem, problem.run())


@by_turns(SMALL)
def test_rounding_of_small_layers(width, shape, dtypes, dropout_p):
    m, k, n, r = shape
    assert cpu_kernel.is_small(m, n, k, r)
    problem = LoraProblem(m, k, n, r, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=dropout_p)
    for tensor in ("weight", "bias"):  # by PyTorch anyway
        problem.tensors[tensor].requires_grad_(False)
    with use_backend("cpu"):
        assert_within_rounding(problem, problem.run())


def tensors(m: int, k: int, n: int, r: int, dtype: torch.dtype = F32):
    x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    return x, weight, torch.randn(r, k), torch.randn(n, r), torch.randn(m, n, dtype=dtype), torch.tensor([5])


def run(m: int, k: int, n: int, r: int, dropout_p: float = 0.25):
    torch.manual_seed(0)
    x, weight, a, b, grad_y, seed = tensors(m, k, n, r)
    y, s = cpu_kernel.forward(x, weight, None, a, b, 0.5, dropout_p, seed)
    grads = cpu_kernel.backward(grad_y, x, s, weight, a, b, 0.5, dropout_p, seed, (True, False, False, True, True))
    return y, s, grads[0], grads[3], grads[4]


def test_bits_do_not_depend_on_the_number_of_threads(cpu, monkeypatch):
    """Only the low-rank half is ours: the base matmuls are replaced by zeros, for PyTorch promises no such thing."""
    monkeypatch.setattr(cpu_kernel._base.F, "linear", lambda x, weight, bias: x.new_zeros(x.shape[0], weight.shape[0]))
    monkeypatch.setattr(cpu_kernel.torch, "mm", lambda grad_y, weight: grad_y.new_zeros(len(grad_y), weight.shape[1]))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(333, 200, 150, 12))
    torch.set_num_threads(before)
    assert float(results[0][0].norm()) > 0
    for result, (name, i) in itertools.product(results[1:], {"y": 0, "s": 1, "dx": 2, "dA": 3, "dB": 4}.items()):
        assert torch.equal(result[i], results[0][i]), name


SIZES = {"small": (20, 40, 50, 6), "large": (70, 60, 80, 6)}


def test_both_ways_are_tested(cpu):
    assert [cpu_kernel.is_small(m, n, k, r) for m, k, n, r in SIZES.values()] == [True, False]


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_each_combination_of_wanted_gradients(cpu, size, needs):
    """What a wanted gradient does not read may be missing: x without dA, s without dB."""
    need_x, need_a, need_b = needs
    x, weight, a, b, grad_y, seed = tensors(*SIZES[size])
    _, s = reference.forward(x, weight, None, a, b, 0.5, 0.25, seed)
    wanted = (need_x, False, False, need_a, need_b)
    saved = (x if need_a else None, s if need_b else None)
    got = cpu_kernel.backward(grad_y, *saved, weight, a, b, 0.5, 0.25, seed, wanted)
    expected = reference.backward(grad_y, x, s, weight, a, b, 0.5, 0.25, seed, wanted)
    for have, want in zip(got, expected, strict=True):
        assert (have is None) == (want is None)
        if want is not None:
            assert relative_error(have, want) < 1e-6


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("size", SIZES)
def test_dropout_of_nothing_and_of_everything(width, size, p):
    x, weight, a, b, _, seed = tensors(*SIZES[size])
    y, s = cpu_kernel.forward(x, weight, None, a, b, 0.5, p, seed)
    want_y, want_s = reference.forward(x, weight, None, a, b, 0.5, p, seed)
    assert relative_error(y, want_y) < 1e-6
    assert relative_error(s, want_s) < 1e-6
    assert (p == 1) == (float(s.abs().sum()) == 0)


def test_rows_do_not_depend_on_the_batch(cpu):
    """S of a row is the same bits alone as among others, also where it alone is a small layer."""
    x, weight, a, b, _, _ = tensors(50, 300, 10, 8)
    _, whole = cpu_kernel.forward(x, weight, None, a, b, 0.5, 0.0, None)
    assert cpu_kernel.is_small(1, 10, 300, 8)
    assert not cpu_kernel.is_small(50, 10, 300, 8)
    for row in (0, 7, 33, 49):
        _, alone = cpu_kernel.forward(x[row : row + 1], weight, None, a, b, 0.5, 0.0, None)
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("size", SIZES)
def test_strided_operands(cpu, size):
    x, weight, a, b, grad_y, seed = tensors(*SIZES[size])
    wanted = (True, True, True, True, True)

    def both(x, weight, a, b, grad_y):
        y, s = cpu_kernel.forward(x, weight, None, a, b, 0.5, 0.25, seed)
        return y, *cpu_kernel.backward(grad_y, x, s, weight, a, b, 0.5, 0.25, seed, wanted)

    def other_layout(t):
        return t.t().contiguous().t()

    for have, want in zip(
        both(*map(other_layout, (x, weight, a, b, grad_y))), both(x, weight, a, b, grad_y), strict=True
    ):
        assert relative_error(have, want) < 1e-6


def problem(**changes) -> Problem:
    base = Problem("cpu", None, F32, F32, 512, 1024, 1024, 8, False)
    return base._replace(**changes)


def test_what_it_refuses_and_what_it_leaves_to_others(cpu):
    assert cpu_kernel.unsupported(problem()) is None
    assert "x is on cuda" in cpu_kernel.unsupported(problem(device="cuda"))
    assert "float64" in cpu_kernel.unsupported(problem(dtype=torch.float64))
    assert "nothing" in cpu_kernel.unsupported(problem(m=0))
    for taken in ({}, {"r": 64}, {"m": 1, "dropout": True}, {"m": 1, "dtype": BF16}, {"m": 4, "k": 16, "n": 16}):
        assert cpu_kernel.unproven(problem(**taken)) is None, taken
    for left, why in (({"r": 128}, "above rank"), ({"m": 32}, "64 rows"), ({"m": 128, "r": 16}, "so few")):
        assert why in cpu_kernel.unproven(problem(**left)), left
