"""`sparse_delta_linear`: densities, several deltas, places in any order and past every size, and what it refuses. What
it shares with other ops is in `test_accuracy.py` and its neighbours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import dispatch, explain, functional, use_backend
from peft_kernels.formats.positions import Positions
from peft_kernels.formats.sparse_delta import SparseDelta, prepare
from peft_kernels.kernels import _masked
from tests.allocations import peak_bytes
from tests.backends import across
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.problems import SparseDeltaProblem
from tests.problems.base import drawer

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
EACH = pytest.mark.parametrize("backend", across("sparse_delta_linear"), indirect=True)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("options", [{}, {"nf4": True, "k": 96}, {"deltas": 4}], ids=["dense", "nf4", "several"])
@EACH
def test_densities(backend, options, density):
    """Of densities between 0 and 1 a row of W is empty; 100 rows of W straddle strips of 64."""
    problem = SparseDeltaProblem(**{"m": 37, "k": 75, "n": 100, **options}, density=density, device=backend.device)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("options", [{}, {"nf4": True}, {"deltas": 3, "m": (5, 40)}], ids=["dense", "nf4", "several"])
@EACH
def test_as_accurate_as_peft_over_16_bits(backend, options):
    """Values in float32: W + Δ is rounded once, as PEFT's SHiRA rounds its copy of W, and y once."""
    problem = SparseDeltaProblem(
        **{"m": 70, "k": 66, "n": 301, **options}, dtype=BF16, adapter_dtype=F32, device=backend.device
    )
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize(
    "options",
    [{"m": 0}, {"m": ()}, {"deltas": 0}, {"deltas": 1, "m": (0, 3)}, {"k": 0}, {"n": 0}, {"deltas": 5, "m": 2}],
    ids=str,
)
@EACH
def test_empty(backend, options):
    problem = SparseDeltaProblem(**{"m": 5, "k": 33, "n": 18, **options}, density=0.3, device=backend.device)
    assert_within_rounding(problem, problem.run())


@EACH
def test_rows_do_not_mix(backend):
    """Infinity in the values of one delta, or in one row of x, reaches the rows that it belongs to and no other's."""
    problem = SparseDeltaProblem(12, 31, 18, deltas=4, density=0.5, device=backend.device)
    clean = named(problem.run())
    assert set(problem.ids.tolist()) == {-1, 0, 1, 2}
    values = problem.tensors["values.1"].detach().clone().fill_(float("inf")).requires_grad_()
    bad = named(problem.run(**{"values.1": values}))
    mine = problem.ids == 1
    # The second row of every delta is empty: what belongs to it stays.
    assert not bad["y"][mine].isfinite().all(1).any()
    for name in ("y", "x"):
        assert torch.equal(bad[name][~mine], clean[name][~mine]), name
    for name in ("values.0", "values.2", "values.3"):
        assert torch.equal(bad[name], clean[name]), name


@EACH
def test_a_delta_that_no_row_chose_gets_zeros(backend):
    """Not None, which autograd would fill in but a compiled graph would miss."""
    problem = SparseDeltaProblem(6, 31, 18, deltas=2, density=0.5, device=backend.device)
    x, weight = (problem.tensors[name].detach() for name in ("x", "weight"))
    deltas = [
        SparseDelta(positions, problem.tensors[f"values.{i}"].detach()) for i, positions in enumerate(problem.places)
    ]
    ids = torch.full((6,), 0, device=backend.device)
    implementation = dispatch.implementation("sparse_delta_linear", backend.name)
    *_, grads = implementation.backward(problem.grad_y, x, weight, deltas, ids, (False, False, False, [False, True]))
    assert grads[0] is None
    assert grads[1].shape == deltas[1].values.shape != (0,)
    assert not grads[1].any()


def test_ids_per_sample_choose_as_per_row():
    problem = SparseDeltaProblem((3, 4), 20, 9, deltas=3)
    per_sample = torch.tensor([1, -1, 0], dtype=torch.int32)
    problem.ids = per_sample.long().unsqueeze(1).expand(3, 4)
    args, kwargs = problem.arguments(problem.tensors)
    expected = functional.sparse_delta_linear(*args, **kwargs)
    assert torch.equal(functional.sparse_delta_linear(*args, **{**kwargs, "delta_ids": per_sample}), expected)
    assert_within_rounding(problem, problem.run())


def test_raw_indices_in_any_order():
    """[nnz] and PEFT's [2, nnz], int32 and int64, shuffled: the same bits as prepared, gradients in the given order."""
    problem = SparseDeltaProblem(20, 31, 18)
    y, grads = problem.run()
    (x, weight, places, values), kwargs = problem.arguments(problem.tensors)
    shuffled = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(1))
    flat, own = places.flat[shuffled], values.detach()[shuffled].requires_grad_()
    for indices in (flat, flat.long(), torch.stack((flat // 31, flat % 31)), Positions(*places[:3])):
        moved = values if isinstance(indices, Positions) else own
        given = functional.sparse_delta_linear(x, weight, indices, moved, **kwargs)
        grad_x, grad = torch.autograd.grad(given, (x, moved), problem.grad_y)
        assert torch.equal(given, y)
        assert torch.equal(grad_x, grads["x"])
        assert torch.equal(grad, grads["values"] if moved is values else grads["values"][shuffled])


@EACH
def test_dimensions_beyond_16_bits(backend):
    """A place in the last column of 40,000 and in the last row of 40,000, where 16 bits do not reach."""
    for n, k in ((3, 40_000), (40_000, 3)):
        draw = drawer(3, backend.device)
        flat = torch.tensor([0, k - 1, n * k - 2, n * k - 1], device=backend.device)
        x, values, grad_y = draw(2, k), draw(4), draw(2, n).detach()
        weight, (places, _) = torch.zeros(n, k, device=backend.device), prepare(flat, (n, k))
        y = functional.sparse_delta_linear(x, weight, places, values)
        grad_x, grad = torch.autograd.grad(y, (x, values), grad_y)
        dense = weight.flatten().index_put((flat,), values.detach()).view(n, k)
        torch.testing.assert_close(y, x @ dense.t())
        torch.testing.assert_close(grad_x, grad_y @ dense)
        torch.testing.assert_close(grad, (grad_y.t() @ x).flatten()[flat])


def test_places_past_32_bits():
    """From 2³¹ weights on places are int64, in strips and by columns."""
    shape = (1 << 16, 1 << 15)
    flat = torch.tensor([5, (1 << 31) - 1, 40_000 * (1 << 15) + 3, 64 * (1 << 15)])
    places, order = prepare(flat, shape)
    assert places.flat.dtype == torch.int64
    assert places.flat.tolist() == sorted(flat.tolist())
    assert order.tolist() == [0, 3, 2, 1]
    assert places.starts[[0, 1, 2, 625, 626, 1023, 1024]].tolist() == [0, 1, 2, 2, 3, 3, 4]
    assert places.flat[places.order].remainder(1 << 15).tolist() == [0, 3, 5, (1 << 15) - 1]
    assert places.column_starts[[0, 1, 511, 512]].tolist() == [0, 3, 3, 4]
    assert prepare(flat[:1], (1 << 15, 1 << 15))[0].flat.dtype == torch.int32


@pytest.mark.parametrize("options", [{}, {"nf4": True}, {"deltas": 3}], ids=["dense", "nf4", "several"])
def test_pieces_of_many_strips(options, monkeypatch):
    """Pieces of 64 rows or columns, of which the last is not full."""
    monkeypatch.setattr(_masked, "CPU_SCRATCH_BYTES", 1)
    problem = SparseDeltaProblem(**{"m": 9, "k": 160, "n": 130, **options})
    with use_backend("composed"):
        assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize(("name", "density"), [("composed", 0.01), ("cpu", 0.01), ("cpu", 0.4)])
def test_no_temporary_of_the_size_of_the_weight(name, density):
    """Forward and backward hold pieces of 1 MiB beside results; PEFT's clone is the 16 MiB of W."""
    problem = SparseDeltaProblem(4, 1024, 4096, density=density)
    problem.freeze_all_but("x", "values")
    results = 4 * problem.places[0].flat.numel()
    with use_backend(name):
        problem.run()
        assert peak_bytes(problem.run) < results + (4 << 20)
        eager = peak_bytes(lambda: problem.gradients(problem.compose(problem.tensors), problem.tensors))
    assert eager > 16 << 20


def test_dispatch_at_every_density():
    for nnz in (40, 2000, 4096):
        flat = torch.arange(nnz)
        choice = explain("sparse_delta_linear", torch.zeros(8, 64), torch.zeros(64, 64), flat, torch.zeros(nnz))
        if "not built" in str(choice.rejected):
            pytest.skip(dict(choice.rejected)["cpu"])
        assert choice.backend == "cpu"


X, W = torch.zeros(4, 6), torch.zeros(5, 6)
PLACES = prepare(torch.tensor([1, 7]), (5, 6))[0]
V = torch.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, W, torch.tensor([7, 1, 7]), torch.zeros(3)), {}, ValueError, "1 places more than once, the first is 7"),
        ((X, W, torch.tensor([1, 30]), V), {}, ValueError, r"1 to 30; expected places in \[0, 30\)"),
        ((X, W, torch.tensor([-1, 3]), V), {}, ValueError, "-1 to 3"),
        ((X, W, torch.tensor([[0, 1], [0, 6]]), V), {}, ValueError, r"columns 0 to 6; expected them in \[0, 6\)"),
        ((X, W, torch.tensor([1.0, 2.0]), V), {}, TypeError, "indices is torch.float32"),
        ((X, W, torch.zeros(3, 2, dtype=torch.int64), V), {}, ValueError, r"shape \(3, 2\)"),
        ((X, W, [1, 7], V), {}, TypeError, "indices is list"),
        ((X, W, PLACES, torch.zeros(3)), {}, ValueError, r"values has shape \(3,\), but indices has 2 places"),
        ((X, W, PLACES, torch.zeros(2, dtype=torch.int64)), {}, TypeError, "values has dtype torch.int64"),
        ((X, torch.zeros(6, 6), PLACES, V), {}, ValueError, r"indices has shape \(5, 6\)"),
        ((X, torch.zeros(5, 7), PLACES, V), {}, ValueError, "x has 6 features"),
        ((X, W.double(), PLACES, V), {}, TypeError, "weight has dtype torch.float64"),
        ((X, W, PLACES, V, torch.zeros(6)), {}, ValueError, "bias has shape"),
        ((X, W, PLACES, V.to("meta")), {}, ValueError, "values is on meta"),
        ((X, W, PLACES, V), {"delta_ids": torch.zeros(4, dtype=torch.int64)}, TypeError, "expected a sequence"),
        (
            (X, W, [PLACES], [V, V]),
            {"delta_ids": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            "and values 2",
        ),
        ((X, W, [PLACES], [V]), {"delta_ids": torch.tensor([0, 1, 0, 0])}, ValueError, "delta_ids holds 1"),
        ((X, W, [PLACES], [V]), {"delta_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "delta_ids has shape"),
        ((X, W, [PLACES], [V]), {"delta_ids": torch.zeros(4)}, TypeError, "delta_ids has dtype torch.float32"),
        ((X, W, [PLACES] * 2, [V, V.double()]), {"delta_ids": torch.tensor([0, 1, 0, 0])}, TypeError, r"values\[1\]"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        functional.sparse_delta_linear(*arguments, **options)


def test_autocast_rounds_the_sum_and_not_its_terms():
    """W in float32 under bfloat16: a change smaller than a step of bfloat16 at W counts where the sum rounds up."""
    x = torch.eye(2, requires_grad=True)
    weight = torch.full((1, 2), 1 + 2**-8)  # between 1 and the next bfloat16, 1 + 2⁻⁷: a tie
    values = torch.tensor([2.0**-12], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.sparse_delta_linear(x, weight, torch.tensor([1]), values)
        expected = F.linear(x, weight + torch.tensor([[0.0, 2.0**-12]]))
    assert y.dtype == BF16
    assert torch.equal(y, expected)
    assert y[0] != y[1]
    y.sum().backward()
    assert values.grad.dtype == F32
    assert values.grad.item() == 1.0
