"""`sparse_linear` in every layout: accurate at all densities, over edges and empty lines; who runs, and errors."""

from __future__ import annotations

import importlib

import pytest
import torch

from peft_kernels import dispatch, explain, functional, use_backend
from peft_kernels.formats import nf4, sparse
from peft_kernels.ops.sparse_linear import Problem
from tests.allocations import peak_bytes
from tests.backends import on_cpu
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding
from tests.problems import SparseProblem

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BACKENDS = on_cpu("sparse_linear")
LAYOUTS = [{"layout": "block"}, {"layout": "2:4"}, {"layout": "bitmap"}, {"nf4": True}, {"layout": "csr"}]
BY_LAYOUT = pytest.mark.parametrize("options", LAYOUTS, ids=["block", "2:4", "bitmap", "nf4", "csr"])


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def run_by(backend: str, problem: SparseProblem):
    reason = dispatch.objection("sparse_linear", backend, problem.dispatched(), forced=True)
    if reason is not None:
        pytest.skip(f"sparse_linear by {backend}: {reason}")
    with use_backend(backend):
        return problem.run()


@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("options", [LAYOUTS[0], *LAYOUTS[2:]], ids=["block", "bitmap", "nf4", "csr"])
def test_densities(backend, options, density):
    """The last blocks reach over both edges."""
    problem = SparseProblem(9, 140, 170, density=density, **options)
    assert_within_rounding(problem, run_by(backend, problem))


@BY_LAYOUT
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_the_accuracy_rule(backend, options, dtype):
    problem = SparseProblem(70, 96, 301, dtype=dtype, density=0.6, **options)
    rule = assert_within_rounding if dtype == F64 else assert_as_accurate_as_eager
    rule(problem, run_by(backend, problem))


@pytest.mark.parametrize(
    ("m", "n", "k", "block"),
    [(3, 200, 130, 64), (5, 129, 300, 128), (250, 70, 65, 32), ((2, 0), 40, 48, 32), ((), 40, 33, 32), (2, 1, 1, 32)],
)  # fmt: skip
def test_sizes_and_blocks(backend, m, n, k, block):
    """Few rows are dots, many come in several pieces; one line, no rows, a vector."""
    problem = SparseProblem(m, k, n, block=block, density=0.8)
    assert_within_rounding(problem, run_by(backend, problem))


def test_padding_has_no_effect_and_no_gradient(backend):
    problem = SparseProblem(6, 40, 41, density=1.0)
    first, grads = run_by(backend, problem)
    assert grads["values"][-1, 9:].eq(0).all()
    assert grads["values"][-1, :, 8:].eq(0).all()
    with torch.no_grad():
        problem.tensors["values"][-1, 9:] += 5
    assert torch.equal(run_by(backend, problem)[0], first)


def test_the_same_bits_by_any_number_of_threads():
    problem = SparseProblem(130, 300, 200, density=0.7)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(problem.run())
        finally:
            torch.set_num_threads(before)
    for y, grads in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(torch.equal(grad, results[0][1][name]) for name, grad in grads.items() if name != "bias")


@pytest.mark.parametrize("layout", ["block", "2:4"])
def test_no_copy_of_the_size_of_the_weight(layout):
    """Forward and backward, by the automatic choice: less than half of a dense W at any time."""
    problem = SparseProblem(4, 1024, 2048, density=0.5, layout=layout, block=64)
    problem.freeze_all_but("x")
    assert peak_bytes(problem.run) < 1024 * 2048 * 4 / 2


def test_autocast_rounds_the_weight_to_its_dtype(backend):
    problem = SparseProblem(9, 70, 66, density=0.8)
    with use_backend(None if backend == "cpu" else backend), torch.autocast("cpu", BF16):
        y = problem.call()
    weight = problem.weight.dense().to(BF16)
    expected = torch.nn.functional.linear(problem.tensors["x"].to(BF16), weight, problem.tensors["bias"].to(BF16))
    assert y.dtype == BF16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    grads = problem.gradients(y.float(), problem.tensors)
    assert grads["values"].dtype == F32


def described(**changes) -> Problem:
    return Problem("cpu", None, F32, F32, "block", 0.1, 64, 256, 1024, 4096)._replace(**changes)


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        ("cpu", {"layout": "bitmap"}, "for layouts 'block' and 'csr', not 'bitmap'"),
        ("cpu", {"dtype": F64, "weight_dtype": F64}, "float64 runs in PyTorch"),
        ("cpu", {"dtype": BF16}, "a weight of the same dtype"),
        ("cpu", {}, None),
        ("composed", {"layout": "2:4"}, None),
    ],
)
def test_dispatch_says_why(backend, changes, reason):
    found = dispatch.objection("sparse_linear", backend, described(**changes))
    assert found is None if reason is None else reason in found


def test_explain_names_the_way():
    problem = SparseProblem(64, 64, 64, density=1.0)
    args, options = problem.arguments(problem.tensors)
    choice = explain("sparse_linear", *args, **options)
    assert choice.backend in BACKENDS
    assert "cuda" in dict(choice.rejected)


def weight_like(shape=(8, 16), dtype=F32, layout="bitmap"):
    return sparse.compress(torch.zeros(shape, dtype=dtype), layout)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x is list"),
        ({"x": torch.zeros(2, 16, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.zeros(())}, ValueError, "x has no dimensions"),
        ({"x": torch.zeros(2, 15)}, ValueError, r"weight has shape \(8, 16\), but x has 15 features"),
        ({"x": torch.zeros(2, 16, device="meta")}, ValueError, "weight is on cpu"),
        ({"weight": torch.zeros(8, 16)}, TypeError, "expected what peft_kernels.formats.sparse.compress returns"),
        ({"weight": weight_like(dtype=BF16)}, TypeError, "weight has dtype torch.bfloat16, but x has torch.float32"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias has shape \(7,\)"),
        ({"bias": torch.zeros(8, dtype=BF16)}, TypeError, "bias has dtype torch.bfloat16"),
    ],
)
def test_errors(changes, error, message):
    arguments = {"x": torch.zeros(2, 16), "weight": weight_like(), **changes}
    with pytest.raises(error, match=message):
        functional.sparse_linear(**arguments)


def test_a_frozen_layout_cannot_train():
    weight = weight_like(layout="2:4")
    trains = weight.with_tensors([weight.values.requires_grad_(), weight.places])
    with pytest.raises(TypeError, match="weight of layout '2:4' is frozen"):
        functional.sparse_linear(torch.zeros(2, 16), trains)


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_nf4_decodes_to_the_bits_of_the_nf4_weight(backend):
    """x = 1: y is the weight, rounded once to x's dtype."""
    q = nf4.quantize(torch.randn(40, 33))
    for dtype in (F32, BF16):
        weight = sparse.compress(q)
        y = importlib.import_module(f"peft_kernels.kernels.{backend}.sparse_linear").forward(
            torch.eye(33, dtype=dtype), weight, None
        )
        assert torch.equal(y, q.dequantize(dtype).t())
