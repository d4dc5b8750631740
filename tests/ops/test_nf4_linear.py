"""`nf4_linear` and `nf4_lora_linear`: every implementation computes the specification with the weights of the format.

What holds for all ops is in `test_accuracy.py` and its neighbours, with whole weights, nested, in blocks of 64. Here
are the numbers of rows for which there are kernels of their own, all blocksizes, and parts of weights.
"""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.memory import peak_bytes
from peft_kernels import functional, use_backend
from peft_kernels.formats.nf4 import BLOCKSIZES
from peft_kernels.kernels.composed import nf4_linear as composed
from peft_kernels.problems import Draw, nf4_decoded, nf4_weight
from tests.backends import across, everywhere, on_cpu
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.ops.cases import BF16, DTYPES, F16, F32, F64, dtype_id, over
from tests.ops.test_accuracy import strided
from tests.problems import Nf4LoraProblem, Nf4Problem, Problem
from tests.problems.nf4 import PARTS, huge_weight, part_of

LINEAR = pytest.mark.parametrize("backend", everywhere("nf4_linear"), indirect=True)
BOTH = pytest.mark.parametrize("backend", across("nf4_linear", "nf4_lora_linear"), indirect=True)
CLASSES = {"nf4_linear": Nf4Problem, "nf4_lora_linear": Nf4LoraProblem}
NAN = float("nan")

BATCHES = ((), (0,), (1,), (2,), (7,), (8,), (16,), (17,), (33,), (2, 0), (1, 1), (2, 3, 5))
SIZES = ((1, 1), (31, 7), (64, 48), (65, 33), (96, 129), (128, 40), (3420, 9), (515, 67))  # (k, n)
RANKS = (1, 2, 3, 5, 8, 16, 24, 64, 96)


def grid() -> list[tuple]:
    """Each number of rows three times, each size and each blocksize often, the rest seeded; in float32 and, of the
    other dtypes, in one: for each size a CPU compiles a 16-bit matmul of its own, which takes most of the time."""
    chance = random.Random(20240611)
    cases = []
    for i in range(3 * len(BATCHES)):
        size, blocksize = SIZES[(5 * i + i // 12) % len(SIZES)], BLOCKSIZES[(3 * i + i // 8) % len(BLOCKSIZES)]
        part, layout = chance.choice(PARTS), chance.choice(("plain", "transposed", "sliced", "expanded"))
        case = (
            BATCHES[i % len(BATCHES)], *size, chance.choice(RANKS), blocksize, chance.random() < 0.6, part,
            layout, chance.random() < 0.6, chance.choice((0.0, 0.0, 0.3)),
        )  # fmt: skip
        others = (*DTYPES[1:], (F32, BF16), (F64, F64), (BF16, F32))
        cases += [(*case, (F32, F32)), (*case, others[i % len(others)])]
    return cases


def case_id(case: tuple) -> str:
    batch, k, n, r, blocksize, nested, part, layout, bias, p, dtypes = case
    batch = "x".join(map(str, batch)) or "vector"
    options = f"b{blocksize}{'-nested' * nested}-{part}-{layout}{'-bias' * bias}-p{p:g}"
    return f"{batch}-k{k}-n{n}-r{r}-{options}-{dtype_id(dtypes)}"


def problem_of(op: str, m, k, n, r=4, **options) -> Problem:
    """A problem of either op."""
    if op == "nf4_lora_linear":
        return Nf4LoraProblem(m, k, n, r, **options)
    lora_only = ("adapter_dtype", "dropout_p", "scaling")
    return Nf4Problem(m, k, n, **{name: value for name, value in options.items() if name not in lora_only})


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "plain" or (layout == "transposed" and tensor.ndim < 2) or tensor.numel() == 0:
        return tensor
    if layout == "expanded":
        return tensor.detach()[..., :1].expand(tensor.shape).requires_grad_(tensor.requires_grad)
    return strided(tensor, layout).detach().requires_grad_(tensor.requires_grad)


@over(
    "case",
    CLASSES,
    grid(),
    id_of=case_id,
    composed=grid()[::2] + grid()[1::6],
    reference=grid()[::10] + grid()[1::10],
)
def test_awkward_problems(backend, case):
    """Every element of y and of all gradients is right to rounding, at any strides of x and dY."""
    batch, k, n, r, blocksize, nested, part, layout, bias, dropout_p, dtypes = case
    problem = problem_of(
        backend.op, batch, k, n, r, dtype=dtypes[0], adapter_dtype=dtypes[1], bias=bias, dropout_p=dropout_p,
        blocksize=blocksize, nested=nested, part=part, device=backend.device,
    )  # fmt: skip
    backend.skip_unless_runnable(problem.dispatched())
    problem.tensors["x"] = laid_out(problem.tensors["x"], layout)
    problem.grad_y = laid_out(problem.grad_y, layout)
    assert_within_rounding(problem, problem.run())


@over(
    "dtype,k,n",
    ["nf4_linear"],
    [(dtype, *size) for dtype in (F32, BF16) for size in ((33, 70), (95, 33), (67, 64), (70, 129))],
    composed=[(F32, 33, 70), (BF16, 70, 129)],
    reference=[(F32, 67, 64)],
)
def test_every_number_of_rows_with_every_remainder(backend, dtype, k, n):
    """Tiles of rows, of columns and of both have ends of their own."""
    for m in range(1, 20):
        problem = Nf4Problem(m, k, n, dtype, blocksize=32, part=PARTS[m % len(PARTS)], device=backend.device)
        assert_within_rounding(problem, problem.run())


# (m, k, n, blocksize, nested): enough outputs that the ratio of two errors is not a matter of luck. For up to 11 rows
# CPU matmuls in float32 have kernels of their own, with shorter sums: there each element has its bound, above.
RULE = ((16, 515, 259, 4096, False), (129, 200, 136, 256, True))
MORE = ((1, 1140, 515, 64, True), (2, 96, 1031, 32, False), (8, 515, 259, 128, True), (17, 515, 259, 64, True))


@over(
    "m,k,n,blocksize,nested,dtypes",
    CLASSES,
    [(*size, pair) for size in RULE for pair in DTYPES] + [(*size, (BF16, F32)) for size in MORE],
    composed=[(*size, pair) for size in RULE for pair in ((F32, F32), (F16, F16))] + [(*MORE[2], (BF16, F32))],
    reference=[(*RULE[1], (F32, F32)), (*MORE[1], (BF16, F32))],
)
def test_as_accurate_as_eager(backend, m, k, n, blocksize, nested, dtypes):
    problem = problem_of(
        backend.op, m, k, n, 24, dtype=dtypes[0], adapter_dtype=dtypes[1], blocksize=blocksize, nested=nested,
        device=backend.device,
    )  # fmt: skip
    backend.skip_unless_runnable(problem.dispatched())
    if backend.op == "nf4_lora_linear":  # a few rows make few terms of dA and dB: those have the bound of each element
        problem.freeze_all_but("x", *(("lora_A", "lora_B") if m > 100 else ()))
    else:
        problem.freeze_all_but("x")
    y, grads = problem.run()
    assert_as_accurate_as_eager(problem, (y, grads))


@over(
    "m,dtype",
    ["nf4_linear"],
    [(m, dtype) for dtype in (F32, F16, BF16) for m in (1, 2, 3, 8, 16, 17, 33, 70)],
    composed=[(1, F32), (17, F16), (70, BF16)],
    reference=[(1, BF16), (33, F32)],
)
def test_the_same_bits_at_every_number_of_rows_and_in_both_directions(backend, m, dtype):
    """Rows of the identity matrix read single weights off: exactly those of the format, rounded once."""
    for part, blocksize, nested, k, n in (("whole", 64, True, 128, 64), ("corner", 32, False, 67, 70)):
        q = part_of(part, n, k, blocksize=blocksize, nested=nested, device=backend.device)
        weight = nf4_decoded(q, dtype)
        for start in {0, max(0, k - m), (k - m) // 3 if k > m else 0}:
            columns = torch.arange(start, min(k, start + m), device=backend.device)
            x = torch.zeros(m, k, dtype=dtype, device=backend.device).requires_grad_()
            x.data[torch.arange(len(columns)), columns] = 1
            y = functional.nf4_linear(x, q)
            assert torch.equal(y[: len(columns)], weight[:, columns].t()), (part, start)
            assert not y[len(columns) :].any()
        for start in {0, max(0, n - m)}:
            rows = torch.arange(start, min(n, start + m), device=backend.device)
            grad_y = torch.zeros(m, n, dtype=dtype, device=backend.device)
            grad_y[torch.arange(len(rows)), rows] = 1
            (grad_x,) = torch.autograd.grad(functional.nf4_linear(x, q), x, grad_y)
            assert torch.equal(grad_x[: len(rows)], weight[rows]), (part, start)
            assert not grad_x[len(rows) :].any()


@BOTH
def test_a_row_alone_and_in_a_batch(backend):
    """Each of 33 rows by itself, in tens and all at once: to the rounding of the result."""
    problem = problem_of(backend.op, 33, 192, 128, dtype=BF16, device=backend.device)
    x, whole = problem.tensors["x"].detach(), problem.call().detach().float()
    for size in (1, 10, 16):
        parts = [problem.call({**problem.tensors, "x": rows}).detach() for rows in x.split(size)]
        torch.testing.assert_close(torch.cat(parts).float(), whole, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("bias_dtype", [F32, F16, F64], ids=str)
@LINEAR
def test_a_bias_of_another_dtype(backend, bias_dtype):
    problem = Nf4Problem(5, 67, 33, BF16, bias_dtype=bias_dtype, device=backend.device)
    y, grads = problem.run()
    assert (y.dtype, grads["bias"].dtype) == (BF16, bias_dtype)
    assert_within_rounding(problem, (y, grads))


@pytest.mark.parametrize("m", [3, 40])
@BOTH
def test_rows_do_not_mix(backend, m):
    """Infinity and NaN in a row of x or dY reach that row's results and no other's."""
    problem = problem_of(backend.op, m, 67, 33, device=backend.device)
    problem.freeze_all_but("x")
    clean_y, clean = problem.run()
    x = problem.tensors["x"].detach().clone()
    x[1] = float("inf")
    x[1, 7] = NAN
    problem.grad_y[2] = NAN
    y, grads = problem.run(x=x.requires_grad_())
    assert y[1].isnan().all()
    assert grads["x"][2].isnan().all()
    assert torch.equal(y[torch.arange(m) != 1], clean_y[torch.arange(m) != 1])
    assert torch.equal(grads["x"][torch.arange(m) != 2], clean["x"][torch.arange(m) != 2])


@pytest.mark.parametrize("m", [1, 16, 40])
@LINEAR
def test_nan_in_an_absmax_stays_in_its_block(backend, m):
    """It is neither hidden nor spread: in y to the outputs of the rows that the block is in, in dx to its columns."""
    problem = Nf4Problem(m, 48, 40, blocksize=32, nested=False, device=backend.device)
    problem.freeze_all_but("x")
    clean_y, clean = problem.run()
    problem.q.absmax[7] = NAN  # elements 224 to 255: row 4 from column 32, row 5 up to column 15
    y, grads = problem.run()
    bad = torch.tensor([row in (4, 5) for row in range(40)])
    assert y[:, bad].isnan().all()
    torch.testing.assert_close(y[:, ~bad], clean_y[:, ~bad], rtol=1e-6, atol=1e-6)
    bad = torch.tensor([column >= 32 or column < 16 for column in range(48)])
    assert grads["x"][:, bad].isnan().all()
    torch.testing.assert_close(grads["x"][:, ~bad], clean["x"][:, ~bad], rtol=1e-6, atol=1e-6)


@BOTH
def test_same_bits_every_time_and_the_weight_left_alone(backend):
    for m in (1, 16, 130):
        problem = problem_of(backend.op, m, 515, 130, 24, dtype=BF16, part="corner", device=backend.device)
        before = [(tensor.clone(), tensor._version) for tensor in problem.q.tensors]
        first = named(problem.run())
        for _ in range(3):
            again = named(problem.run())
            assert all(torch.equal(again[name], first[name]) for name in first)
        for tensor, (values, version) in zip(problem.q.tensors, before, strict=True):
            assert torch.equal(tensor, values)
            assert tensor._version == version


@pytest.mark.parametrize("m", [2, 20])
@LINEAR
def test_past_2_to_the_32(backend, m):
    """Numbers of elements, bytes and blocks that 32 bits do not hold, forward and backward."""
    whole, weight = huge_weight(3, 96, 2**31 + 5, backend.device)
    for q, dense in ((whole, weight), (whole.rows(2, 3).columns(1, 96), weight[2:, 1:])):
        dense = dense.to(BF16)
        x = torch.eye(m, q.shape[1], dtype=BF16, device=backend.device).requires_grad_()
        y = functional.nf4_linear(x, q)
        assert torch.equal(y, dense[:, :m].t())
        grad_y = torch.eye(m, q.shape[0], dtype=BF16, device=backend.device)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
        assert torch.equal(grad_x[: q.shape[0]], dense[:m])


def test_any_dtype_of_the_weight_gives_the_same_product():
    """What was quantised says nothing about the dtype of the product: that is x's."""
    q = nf4_weight(Draw("cpu"), 40, 67)
    x = torch.randn(5, 67).to(BF16)
    ys = [functional.nf4_linear(x, q._replace(dtype=dtype)) for dtype in (F32, F16, BF16)]
    assert all(y.dtype == BF16 and torch.equal(y, ys[0]) for y in ys)


# `composed` in pieces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kib", [2, 5, 33, 64, 100])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_composed_in_pieces(monkeypatch, kib, dtype, bias):
    """Whatever is dense at a time stays within the scratch memory, and the pieces make up the whole."""
    monkeypatch.setattr(composed, "SCRATCH_BYTES", kib << 10)
    sizes, dense = [], composed.dense
    monkeypatch.setattr(composed, "dense", lambda q: sizes.append(dense(q).nbytes) or dense(q))
    problem = Nf4Problem(9, 321, 197, dtype, bias=bias, part="corner")
    with use_backend("composed"):
        assert_within_rounding(problem, problem.run())
    assert max(sizes) <= max(kib << 10, 321 * dtype.itemsize)
    assert sum(sizes) == 2 * problem.weight.nbytes, "each weight once in each direction"
    assert (len(sizes) == 2) == (problem.weight.nbytes <= kib << 10)


@pytest.mark.parametrize("kib", [1, 64])
def test_composed_takes_a_row_that_is_larger_than_its_scratch(monkeypatch, kib):
    monkeypatch.setattr(composed, "SCRATCH_BYTES", kib << 10)
    problem = Nf4Problem(3, 40_000, 3, BF16)
    with use_backend("composed"):
        assert_within_rounding(problem, problem.run())


def composed_peak(n: int, direction: str) -> int:
    """The most that `composed` allocates at once for one row and a weight of n x 4096 in bfloat16."""
    q = nf4_weight(Draw("cpu"), n, 4096, nested=False, dtype=BF16)
    x, grad_y = torch.zeros(1, 4096, dtype=BF16), torch.zeros(1, n, dtype=BF16)
    steps = {"forward": lambda: composed.forward(x, q, None), "backward": lambda: composed.backward(grad_y, q)}
    return peak_bytes(steps[direction], "cpu")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("decoder", on_cpu("nf4_dequantize"))
def test_composed_holds_one_piece_at_a_time(monkeypatch, decoder, direction):
    """Of a weight of 24 MiB, 8, and what decoding takes."""
    monkeypatch.setattr(composed, "SCRATCH_BYTES", 8 << 20)
    with use_backend(decoder):
        assert (6 << 20) <= composed_peak(3072, direction) <= (18 << 20)


def test_composed_never_holds_more_than_64_mib():
    """Of a weight of 66."""
    assert (33 << 20) <= composed_peak(8448, "forward") <= (64 << 20)
