"""The 4-bit ops in the Triton kernels: the bits of the format in every product, PyTorch's accuracy, any layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft_kernels import explain, functional, tuning, use_backend
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.reference import nf4_dequantize as specification
from peft_kernels.kernels.triton import _launch, nf4_dequantize, nf4_linear
from peft_kernels.problems import Draw, nf4_weight
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding
from tests.problems.nf4 import PARTS, Nf4LoraProblem, Nf4Problem, huge_weight, part_of
from tests.triton.launches import record_launches

F16, F32 = torch.float16, torch.float32
# (N, K, blocksize): blocks that divide rows, half blocks, blocks across rows, odd rows, a row within a block.
SHAPES = ((70, 128, 64), (5, 96, 64), (7, 130, 64), (5, 65, 64), (9, 96, 32), (40, 300, 256), (3, 70, 4096))


def _name(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request, monkeypatch) -> str:
    """The configurations and forms of this architecture, which the interpreter runs as well as any others."""
    monkeypatch.setattr(_launch, "architecture", lambda device: request.param)
    return request.param


@pytest.fixture
def launched(monkeypatch) -> list[tuple[str, dict]]:
    """(name, options) of the kernels launched from now on."""
    names, launch = [], _launch.launch

    def record(kernel, *arguments, **options):
        names.append((kernel.__name__, options))
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(_launch, "launch", record)
    return names


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    whole = torch.int16 if a.element_size() == 2 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.view(whole), b.view(whole))


def _weights(n: int, k: int, blocksize: int, dtype: torch.dtype, nested: bool) -> list[NF4Weight]:
    return [part_of(part, n, k, blocksize=blocksize, nested=nested, seed=n)._replace(dtype=dtype) for part in PARTS]


# Each shape in each dtype, nested in one of them in turn.
@pytest.mark.parametrize(
    ("shape", "dtype", "nested"),
    [(shape, dtype, (i + j) % 2 == 0) for i, shape in enumerate(SHAPES) for j, dtype in enumerate((F16, F32))],
    ids=_name,
)
def test_dequantise(shape, dtype, nested):
    for q in _weights(*shape, dtype, nested):
        assert _same_bits(nf4_dequantize.forward(q), specification.forward(q)), q.layout


def test_dequantise_of_columns_that_begin_at_a_block(launched):
    """What `composed` takes of a large weight: rows with a stride, 16-byte loads."""
    q = nf4_weight(Draw("cpu"), 9, 256, dtype=F16)
    for part, segment in ((q.columns(64, 192), 64), (q.columns(32, 128), 32)):
        assert _same_bits(nf4_dequantize.forward(part), specification.forward(part))
        assert not launched[-1][1]["STRADDLES"]
        assert launched[-1][1]["SEGMENT"] == segment


@pytest.mark.parametrize("k", [65, 130, 1024])
def test_a_whole_weight_is_taken_as_one_row(k, launched):
    """Also where rows are odd: one launch, no block straddles a segment."""
    q = nf4_weight(Draw("cpu"), 33, k, dtype=F16)
    assert _same_bits(functional.nf4_dequantize(q), specification.forward(q))
    ((name, options),) = launched
    assert name == "nf4_dequantize"
    assert options["FLAT"]
    assert not options["STRADDLES"]


def _one_hot(m: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    hot = torch.arange(m) * 29 % width
    return torch.eye(width, dtype=dtype)[hot], hot


ARCHS = ("sm_80", "sm_90")


# Every shape at one number of rows, the architectures in turn, and every number of rows at one shape on each: all of
# both take minutes in the interpreter.
@pytest.mark.parametrize(
    ("arch", "shape", "m"),
    [
        *((arch, shape, 17) for arch, shape in zip(itertools.cycle(ARCHS), SHAPES, strict=False)),
        *((arch, SHAPES[1], m) for m in (1, 5, 40) for arch in ARCHS),
        ("sm_80", SHAPES[3], 17),  # odd rows
    ],
    indirect=["arch"],
    ids=_name,
)
def test_the_bits_of_products(arch, shape, m):
    """Products with 1 and 0 are exact, so y and dx show the weights themselves: the same at every M."""
    n, k, blocksize = shape
    part = PARTS[(m + n) % len(PARTS)]
    for which in dict.fromkeys(("whole", part)):
        q = part_of(which, n, k, blocksize=blocksize, nested=m % 2 == 1, seed=m)._replace(dtype=F16)
        weight = specification.forward(q)
        x, hot = _one_hot(m, k, F16)
        assert torch.equal(nf4_linear.forward(x, q, None), weight.t()[hot])
        grad_y, hot = _one_hot(m, n, F16)
        assert torch.equal(nf4_linear.backward(grad_y, q), weight[hot])


def test_the_bits_of_float32_products():
    for q in _weights(5, 70, 64, F32, True):
        weight = specification.forward(q)
        assert torch.equal(nf4_linear.forward(_one_hot(3, 70, F32)[0], q, None), weight.t()[_one_hot(3, 70, F32)[1]])
        assert torch.equal(nf4_linear.backward(torch.eye(5), q), weight)


# Whole weights on sm_90: `test_operands_of_sm_90`.
@pytest.mark.parametrize(
    ("arch", "m", "k", "n", "part"),
    [
        ("sm_80", 1, 96, 33, "whole"), ("sm_80", 17, 130, 7, "columns"), ("sm_90", 17, 130, 7, "columns"),
        ("sm_80", 40, 320, 70, "whole"), ("sm_80", 70, 65, 130, "rows"), ("sm_90", 70, 65, 130, "rows"),
        ("sm_80", 70, 192, 131, "whole"),
    ],
    indirect=["arch"],
)  # fmt: skip
def test_as_accurate_as_eager(arch, m, k, n, part):
    problem = Nf4Problem(m, k, n, dtype=F16, part=part, bias=m != 17)
    assert_as_accurate_as_eager(problem, problem.run())


def test_float32():
    problem = Nf4Problem(9, 70, 33)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize(("m", "form"), [(1, True), (17, True), (40, False), (70, False)])
def test_operands_of_sm_90(m, form, monkeypatch, launched):
    """Few rows: W first, its columns permuted, and x's alike."""
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    problem = Nf4Problem(m, 320, 70, dtype=F16)
    assert_as_accurate_as_eager(problem, problem.run())
    options = dict(launched)["_nf4_gemm"]
    assert options["W_FIRST"] == options["PERMUTED"] == form


def test_split_sums(arch, launched):
    """Where a few tiles do not fill the GPU the sum is split, and its partials are added in a fixed order."""
    problem = Nf4Problem(3, 600, 20, dtype=F16)
    first = problem.run()
    again = nf4_linear.forward(problem.tensors["x"].detach(), problem.q, problem.tensors["bias"].detach())
    assert [name for name, _ in launched[:4]] == ["_nf4_gemm", "splitk_reduce", "_nf4_grad_x", "_nf4_gemm"]
    assert_as_accurate_as_eager(problem, first)
    assert torch.equal(first[0], again)


def test_a_row_does_not_depend_on_the_others(arch):
    problem = Nf4Problem(16, 300, 40, dtype=F16)
    x, bias = (problem.tensors[name].detach() for name in ("x", "bias"))
    whole = nf4_linear.forward(x, problem.q, bias)
    for rows in (slice(0, 1), slice(5, 14)):
        assert torch.equal(nf4_linear.forward(x[rows], problem.q, bias), whole[rows])


@pytest.mark.parametrize(
    ("m", "k", "n", "part", "dropout_p", "r"),
    [(5, 130, 40, "whole", 0.0, 8), (40, 128, 70, "columns", 0.3, 40), (70, 192, 70, "whole", 0.3, 8)],
)
def test_lora(m, k, n, part, dropout_p, r, arch):
    problem = Nf4LoraProblem(
        m, k, n, r, dtype=F16, dropout_p=dropout_p, part=part, adapter_dtype=F32 if r == 40 else F16
    )
    assert_as_accurate_as_eager(problem, problem.run())


def test_lora_in_float32():
    problem = Nf4LoraProblem(9, 70, 33, 3, dropout_p=0.3)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_number_of_launches(arch, dropout_p, monkeypatch):
    """Two forward and at most four backward, the sums of partials not counted."""
    launched = record_launches(monkeypatch, run=False)
    problem = Nf4LoraProblem(70, 64, 96, 8, dtype=F16, dropout_p=dropout_p)
    t = problem.tensors
    y = functional.nf4_lora_linear(
        t["x"], problem.q, t["lora_A"], t["lora_B"], scaling=1.5, dropout_p=dropout_p, seed=1
    )
    assert [name for name in launched if name != "splitk_reduce"] == ["_down_projection", "_nf4_gemm"]
    launched.clear()
    y.sum().backward()
    named = [name for name in launched if name != "splitk_reduce"]
    assert named.count("_nf4_grad_x") == 1
    assert len(named) <= 4


def test_only_what_is_wanted_is_computed(launched):
    problem = Nf4LoraProblem(30, 41, 35, 6, dropout_p=0.3, dtype=F16)
    _, everything = problem.run()
    names = ("x", "lora_A", "lora_B")
    for wanted in itertools.chain.from_iterable(itertools.combinations(names, count) for count in (1, 2)):
        launched.clear()
        changes = {
            name: t.detach().requires_grad_(name in wanted) for name, t in problem.tensors.items() if t is not None
        }
        _, grads = problem.run(**changes)
        assert set(grads) == set(wanted)
        assert ("_nf4_grad_x" in dict(launched)) == ("x" in wanted)
        for name, grad in grads.items():
            assert torch.equal(grad, everything[name])


def _every_second(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((tensor.shape[0] * 2, tensor.shape[1] * 2), float("nan"), dtype=tensor.dtype)
    wide[::2, ::2] = tensor
    return wide[::2, ::2]


@pytest.mark.parametrize("place", [_every_second, lambda t: t.t().contiguous().t()], ids=["every second", "transposed"])
def test_strides(place, arch):
    problem = Nf4Problem(19, 96, 26, dtype=F16)
    x, bias, grad_y = problem.tensors["x"].detach(), problem.tensors["bias"].detach(), problem.grad_y
    expected = nf4_linear.forward(x, problem.q._replace(dtype=F16), bias)
    wide = torch.full((26, 3), float("nan"), dtype=F16)
    wide[:, 1] = bias
    assert torch.equal(nf4_linear.forward(place(x), problem.q._replace(dtype=F16), wide[:, 1]), expected)
    expected = nf4_linear.backward(grad_y, problem.q._replace(dtype=F16))
    assert torch.equal(nf4_linear.backward(place(grad_y), problem.q._replace(dtype=F16)), expected)


def test_nothing_beyond_the_rows_is_taken(arch):
    """NaN in the blocks and rows around a part, and beyond the ends of x: none reaches a result."""
    stack = nf4_weight(Draw("cpu"), 12, 70, dtype=F16, nested=False)
    q = stack.rows(4, 8).columns(3, 60)
    blocks = torch.unique((torch.arange(4)[:, None] * 70 + 4 * 70 + torch.arange(3, 60)) // 64)
    absmax = torch.full_like(stack.absmax, float("nan"))
    absmax[blocks] = stack.absmax[blocks]
    poisoned = q._replace(absmax=absmax)
    x = torch.full((40, 96), float("nan"), dtype=F16)
    x[:17, :57] = torch.randn(17, 57).to(F16)
    y = nf4_linear.forward(x[:17, :57], poisoned, None)
    assert torch.equal(y, nf4_linear.forward(x[:17, :57].contiguous(), q, None))
    grad_y = torch.randn(17, 4).to(F16)
    assert torch.equal(nf4_linear.backward(grad_y, poisoned), nf4_linear.backward(grad_y, q))
    assert y.isfinite().all()


def test_nan_absmax_stays_in_its_block(arch):
    q = nf4_weight(Draw("cpu"), 6, 128, dtype=F16, nested=False)
    absmax = q.absmax.clone()
    absmax[3] = float("nan")  # row 1, columns 64 to 127
    y = nf4_linear.forward(torch.ones(17, 128, dtype=F16), q._replace(absmax=absmax), None)
    assert y.isnan().any(0).tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("k", [70, 65])
def test_infinite_absmax_meets_nothing_beyond_a_row(k, arch):
    """Of the last segment of a row only a part is there: the rest is 0, not a code times infinity."""
    q = nf4_weight(Draw("cpu"), 1, k, dtype=F16, nested=False)
    q = q._replace(packed=torch.full_like(q.packed, 255), absmax=torch.full_like(q.absmax, float("inf")))
    y = nf4_linear.forward(torch.ones(17, k, dtype=F16), q, None)
    assert torch.equal(y, torch.full_like(y, float("inf")))


@pytest.mark.parametrize("m", [0, 3])
def test_empty(m):
    q = nf4_weight(Draw("cpu"), 6, 70, dtype=F16)
    assert nf4_dequantize.forward(q.rows(2, 2)).shape == (0, 70)
    assert nf4_linear.forward(torch.ones(m, 70, dtype=F16), q.rows(2, 2), None).shape == (m, 0)
    assert torch.equal(nf4_linear.backward(torch.ones(m, 0, dtype=F16), q.rows(2, 2)), torch.zeros(m, 70, dtype=F16))
    nothing = q.columns(4, 4)
    assert torch.equal(nf4_linear.forward(torch.ones(m, 0, dtype=F16), nothing, None), torch.zeros(m, 6, dtype=F16))


def test_rows_beyond_32_bits():
    q, weight = huge_weight(2, 70, (1 << 33) + 2, "cpu")
    assert torch.equal(nf4_dequantize.forward(q), weight)
    assert torch.equal(nf4_linear.forward(_one_hot(3, 70, F32)[0], q, None), weight.t()[_one_hot(3, 70, F32)[1]])
    assert torch.equal(nf4_linear.backward(torch.eye(2), q), weight)


def test_each_rule_is_asked_for_what_it_serves():
    """Blocks within rows take the kernels of whole segments, others and float32 those named "any"."""
    from peft_kernels.kernels.triton._nf4_tile import aligned

    for k, dtype, expected in ((128, F16, True), (96, F16, True), (3420, F16, False), (128, F32, False)):
        assert aligned(nf4_weight(Draw("cpu"), 2, k, dtype=dtype)) == expected
    for kernel in ("nf4_gemm", "nf4_grad_x"):
        assert not any(rule.dtype == "float32" for rule in tuning.rules("sm_90", kernel))


def test_the_interpreter_is_never_chosen_by_itself():
    q = nf4_weight(Draw("cpu"), 6, 70, dtype=F16)
    with use_backend(None):
        for op, arguments in (("nf4_linear", (torch.ones(2, 70, dtype=F16), q)), ("nf4_dequantize", (q,))):
            choice = explain(op, *arguments)
            assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in choice.rejected
