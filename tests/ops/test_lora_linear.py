"""`lora_linear`: every implementation computes the specification, at any shape, dtype and layout.

The specification itself is held against the float64 composition and against finite differences.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from peft_kernels import functional, use_backend
from peft_kernels.kernels.composed import _passes
from tests.backends import everywhere, on_cpu
from tests.helpers import GRADS, LoraProblem, assert_as_accurate_as_eager, assert_within_rounding

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("lora_linear"), indirect=True)

BATCHES = ((), (0,), (1,), (2,), (17,), (130,), (2, 0), (3, 17), (2, 1, 5), (2, 3, 0, 2), (2, 2, 3, 7))
RANKS = (1, 3, 8, 24, 96, 512)
SIZES = (1, 5, 17, 31, 48, 67, 101, 129)  # 129 and 101 leave tails of 1 and 5 behind blocks of 16 and 32

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# (dtype of x and W, dtype of A and B)
DTYPES = ((F32, F32), (F16, F16), (BF16, BF16), (F64, F64), (BF16, F32), (F16, F32), (F32, BF16))


def grid() -> list[tuple]:
    """Each batch shape with each rank, at seeded sizes, with or without bias and dropout: in float32, and in the other
    dtypes by turns, so that each of them sees all batch shapes or all ranks."""
    chance = random.Random(20240611)
    cases = [
        (batch, chance.choice(SIZES), chance.choice(SIZES), r, chance.random() < 0.7, chance.choice((0.0, 0.0, 0.3)))
        for batch, r in itertools.product(BATCHES, RANKS)
    ]
    by_turns = [DTYPES[1 + (i + i // len(RANKS)) % (len(DTYPES) - 1)] for i in range(len(cases))]
    return [(case, dtypes) for case, other in zip(cases, by_turns, strict=True) for dtypes in (DTYPES[0], other)]


def case_id(case: tuple) -> str:
    batch, k, n, r, bias, dropout_p = case
    return (
        f"{'x'.join(map(str, batch)) or 'vector'}-k{k}-n{n}-r{r}" + "-bias" * bias + f"-p{dropout_p}" * (dropout_p > 0)
    )


def dtype_id(pair: tuple) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in pair]
    return names[0] if names[0] == names[1] else "+".join(names)


def run(backend, problem: LoraProblem, **changes):
    backend.skip_unless_lora_linear(problem)
    return problem.run(**changes)


@pytest.mark.parametrize(
    ("case", "dtypes"), grid(), ids=lambda value: case_id(value) if len(value) > 2 else dtype_id(value)
)
@EVERYWHERE
def test_awkward_shapes(backend, case, dtypes):
    """Every element of y and of all five gradients is right to rounding."""
    batch, k, n, r, bias, dropout_p = case
    problem = LoraProblem(
        batch, k, n, r, dtype=dtypes[0], adapter_dtype=dtypes[1], bias=bias, dropout_p=dropout_p, device=backend.device
    )
    assert_within_rounding(problem, run(backend, problem))


@pytest.mark.parametrize("dtypes", [pair for pair in DTYPES if pair[0] != F64], ids=dtype_id)
@pytest.mark.parametrize(
    ("size", "dropout_p"),
    [((300, 192, 160, 8), 0.3), ((257, 129, 101, 24), 0.0), ((257, 129, 101, 24), 0.3), ((512, 100, 250, 96), 0.0)],
    ids=str,
)
@EVERYWHERE
def test_as_accurate_as_eager(backend, dropout_p, size, dtypes):
    """The accuracy rule, at sizes where the ratio of two errors is not a matter of luck."""
    m, k, n, r = size
    problem = LoraProblem(
        m, k, n, r, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=dropout_p, device=backend.device
    )
    assert_as_accurate_as_eager(problem, run(backend, problem))


@pytest.mark.parametrize(
    ("frozen", "dropout_p"),
    [
        ((), 0.0), ((), 0.4), (("x",), 0.4), (("weight", "bias"), 0.0), (("lora_A",), 0.4), (("lora_B", "x"), 0.0),
        (("x", "weight", "bias"), 0.4),
    ],
)  # fmt: skip
@EVERYWHERE
def test_gradcheck(backend, dropout_p, frozen):
    """Gradients equal finite differences of the forward pass, dropout included (the seed fixes its mask)."""
    problem = LoraProblem((2, 3), 5, 4, 3, dtype=F64, device=backend.device)
    backend.skip_unless_lora_linear(problem)
    tensors = [problem.tensors[name].detach().requires_grad_(name not in frozen) for name in GRADS]

    def forward(x, weight, bias, lora_A, lora_B):
        return functional.lora_linear(
            x, weight, lora_A, lora_B, bias=bias, scaling=0.7, dropout_p=dropout_p, seed=99 if dropout_p else None
        )

    assert torch.autograd.gradcheck(forward, tensors)


def strided(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another layout, as a leaf."""
    tensor = tensor.detach()
    if layout == "transposed":
        other = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "sliced":  # every second column of a wider tensor whose other columns are NaN
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"))
        other = wide[..., 1 : 2 * tensor.shape[-1] + 1 : 2]
        other.copy_(tensor)
    elif layout == "split":  # a chunk of a fused projection: rows further apart than they are long
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 7), float("nan"))
        other = wide[..., 4 : 4 + tensor.shape[-1]]
        other.copy_(tensor)
    else:
        other = tensor.clone()
    assert torch.equal(other, tensor)
    return other.requires_grad_()


@pytest.mark.parametrize(
    ("dtype", "layout"), [(F32, "transposed"), (F32, "sliced"), (F32, "split"), (BF16, "sliced")], ids=str
)
@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
@EVERYWHERE
def test_strides_of_inputs(backend, dtype, name, layout):
    problem = LoraProblem((3, 17), 67, 48, 5, dtype=dtype, dropout_p=0.2, device=backend.device)
    other = strided(problem.tensors[name], layout)
    assert not other.is_contiguous()
    assert_within_rounding(problem, run(backend, problem, **{name: other}))


@pytest.mark.parametrize("batch_first", [True, False])
@EVERYWHERE
def test_expanded_input(backend, batch_first):
    """x.expand: all rows (or all blocks of rows) are the same memory; its gradient must not be summed by the op."""
    problem = LoraProblem((4, 6), 31, 17, 3, device=backend.device)
    one = problem.tensors["x"].detach()[:1] if batch_first else problem.tensors["x"].detach()[:, :1]
    problem.tensors["x"] = one.expand(4, 6, 31).requires_grad_()
    assert 0 in problem.tensors["x"].stride()
    assert_within_rounding(problem, run(backend, problem))


@pytest.mark.parametrize("layout", ["scalar", "row", "transposed", "sliced", "split"])
@EVERYWHERE
def test_strides_of_the_incoming_gradient(backend, layout):
    """`.sum().backward()` gives strides (0, 0), a per-feature loss (0, 1); none may be read in physical order."""
    problem = LoraProblem((3, 11), 31, 17, 3, device=backend.device)
    if layout == "scalar":
        problem.grad_y = torch.ones((), device=backend.device).expand(3, 11, 17)
    elif layout == "row":
        problem.grad_y = problem.grad_y[0, 0].expand(3, 11, 17)
    else:
        problem.grad_y = strided(problem.grad_y, layout).detach()
    assert not problem.grad_y.is_contiguous()
    assert_within_rounding(problem, run(backend, problem))


@pytest.mark.parametrize("rows", [1, 7, 13, 40])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=dtype_id)
def test_composed_in_blocks_of_rows(monkeypatch, dtypes, rows):
    """The bounded scratch of `composed` splits big batches: same mask, same sums, whatever the block."""
    monkeypatch.setattr(_passes, "SCRATCH_ELEMENTS", rows * 31)
    problem = LoraProblem(40, 31, 17, 3, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=0.4)
    with use_backend("composed"):
        assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F32), (BF16, F32), (BF16, BF16)], ids=dtype_id)
@EVERYWHERE
def test_exact_on_small_integers(backend, dtypes, dropout_p):
    """Every product and sum is an integer that its dtype holds, so that the order of sums does not matter: nothing but
    the exact result will do. Gradients of float32 adapters exceed what 16 bits hold: they are never rounded to that."""
    problem = LoraProblem(
        3001, 40, 24, 3, dtype=dtypes[0], adapter_dtype=dtypes[1], scaling=1.0, dropout_p=dropout_p,
        device=backend.device,
    )  # fmt: skip
    problem.tensors = {n: t.detach().sign().requires_grad_() for n, t in problem.tensors.items()}
    problem.tensors["x"] = (problem.tensors["x"] > 0).to(dtypes[0]).requires_grad_()
    problem.grad_y = (problem.grad_y > -1).to(dtypes[0])
    true_y, truth = problem.eager(F64)
    y, grads = run(backend, problem)
    assert torch.equal(y.double(), true_y.to(y.dtype).double())
    for name, grad in grads.items():
        assert torch.equal(grad.double(), truth[name].to(grad.dtype).double()), name
    if dtypes == (BF16, F32):
        assert not torch.equal(grads["lora_B"].bfloat16().float(), grads["lora_B"])


@EVERYWHERE
def test_same_bits_every_time(backend):
    problem = LoraProblem(130, 101, 67, 24, dtype=BF16, adapter_dtype=F32, dropout_p=0.1, device=backend.device)
    first = run(backend, problem)
    for _ in range(2):
        y, grads = run(backend, problem)
        assert torch.equal(y, first[0])
        assert all(torch.equal(grads[name], first[1][name]) for name in GRADS)


@EVERYWHERE
def test_rows_do_not_mix(backend):
    """Infinity and NaN in one row reach that row's result and no other's."""
    problem = LoraProblem(9, 31, 17, 3, dropout_p=0.2, device=backend.device)
    x, grad_y = problem.tensors["x"].detach().clone(), problem.grad_y.clone()
    x[2], x[5, 7] = float("inf"), float("nan")
    grad_y[4] = float("nan")
    clean_y, clean = run(backend, problem)
    problem.grad_y = grad_y
    y, grads = run(backend, problem, x=x.requires_grad_())
    assert not y[2].isfinite().any()
    assert y[5].isnan().all()
    assert grads["x"][4].isnan().all()
    others = [row for row in range(9) if row not in (2, 5)]
    torch.testing.assert_close(y[others], clean_y[others], rtol=1e-6, atol=1e-6)
    others = [row for row in range(9) if row != 4]
    torch.testing.assert_close(grads["x"][others], clean["x"][others], rtol=1e-6, atol=1e-6)
    assert grads["lora_A"].isnan().all(), "a NaN must not be hidden from the parameters' gradients"


@EVERYWHERE
def test_inputs_and_gradients_are_left_alone(backend):
    problem = LoraProblem(17, 31, 48, 8, dropout_p=0.5, device=backend.device)
    before = {name: tensor.detach().clone() for name, tensor in problem.tensors.items()}
    grad_y = problem.grad_y.clone()
    versions = {name: tensor._version for name, tensor in problem.tensors.items()}
    run(backend, problem)
    assert torch.equal(problem.grad_y, grad_y)
    for name, tensor in problem.tensors.items():
        assert torch.equal(tensor, before[name]), name
        assert tensor._version == versions[name], name


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_implementations_agree(dropout_p):
    """One seed, one mask: all implementations differ by the order of their sums only."""
    problem = LoraProblem((5, 7), 67, 48, 3, dropout_p=dropout_p)
    results = []
    for name in on_cpu("lora_linear"):
        with use_backend(name):
            results.append(problem.run())
    for y, grads in results[1:]:
        torch.testing.assert_close(y, results[0][0], rtol=1e-5, atol=1e-5)
        for name in GRADS:
            torch.testing.assert_close(grads[name], results[0][1][name], rtol=1e-5, atol=1e-4)
    assert len(results) >= 2
