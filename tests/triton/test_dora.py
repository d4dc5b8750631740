"""`dora_linear` and `dora_weight_norm` in the Triton kernels: as accurate as PyTorch's own, at any shape."""

from __future__ import annotations

import functools
import itertools
import math
import random

import pytest
import torch

from peft_kernels import explain, functional, use_backend
from peft_kernels.kernels.triton import _launch
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named, relative_error
from tests.problems import DoraProblem

F16, F32 = torch.float16, torch.float32
RANKS = (1, 3, 8, 16, 48)


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request, monkeypatch) -> str:
    monkeypatch.setattr(_launch, "architecture", lambda device: request.param)
    return request.param


def _problem(*sizes, norm_given: bool = True, **options) -> DoraProblem:
    """With the norm of the exact matrix, so that the accuracy of `dora_linear` shows and not that of the norm."""
    problem = DoraProblem(*sizes, **options)
    if norm_given:
        exact = {name: None if t is None else t.detach().double() for name, t in problem.tensors.items()}
        problem.weight_norm = problem.norm(exact).float()
    return problem


def _grid() -> list[tuple]:
    chance = random.Random(5)
    sizes = (1, 7, 40, 67)
    cases = [
        ((m, chance.choice(sizes), chance.choice(sizes), r), chance.random() < 0.5, chance.choice((0.0, 0.4)))
        # Every second of all pairs: each number of rows with several ranks, each rank with two numbers of rows.
        for m, r in list(itertools.product((0, 1, 17, 67), RANKS))[::2]
    ]
    return [(*case, F16) for case in cases] + [(*case, F32) for case in cases[::3]]


@pytest.mark.parametrize(("sizes", "bias", "dropout_p", "dtype"), _grid(), ids=str)
def test_awkward_shapes(sizes, bias, dropout_p, dtype):
    problem = _problem(*sizes, dtype=dtype, bias=bias, dropout_p=dropout_p)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize(
    ("arch", "m", "r", "dropout_p"),
    [("sm_80", 140, 16, 0.0), ("sm_90", 140, 16, 0.25), ("sm_80", 20, 160, 0.0)],
    indirect=["arch"],
)
def test_several_tiles_and_splits_of_each_architecture(arch, m, r, dropout_p):
    problem = _problem(m, 136, 264, r, dtype=F16, dropout_p=dropout_p)
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_float32_adapters_over_a_float16_layer(dropout_p):
    problem = _problem(37, 65, 50, 12, dtype=F16, adapter_dtype=F32, dropout_p=dropout_p)
    y, grads = problem.run()
    assert {grads[name].dtype for name in ("lora_A", "lora_B", "magnitude")} == {F32}
    assert_as_accurate_as_eager(problem, (y, grads))


def test_with_its_own_norm():
    problem = _problem((2, 3, 7), 33, 20, 4, dtype=F16, norm_given=False, dropout_p=0.2)
    assert_as_accurate_as_eager(problem, problem.run())


def test_one_gemm_and_one_pass_more(monkeypatch):
    launched, launch = [], _launch.launch

    def record(kernel, *arguments, **options):
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(_launch, "launch", record)
    problem = _problem(70, 40, 48, 8, dtype=F16, dropout_p=0.1)
    problem.run()
    passes = [name for name in launched if name != "splitk_reduce"]
    assert passes[:3] == ["_down_projection", "_dora_gemm", "_grad_scale"]
    assert sum("gemm" in name for name in passes) == 2


def _every_second(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((tensor.shape[0] * 2, tensor.shape[1] * 2), float("nan"), dtype=tensor.dtype)
    wide[::2, ::2] = tensor
    return wide[::2, ::2]


def _in_poison(tensor: torch.Tensor) -> torch.Tensor:
    rows, columns = tensor.shape
    buffer = torch.full((rows + 2, columns + 24), float("nan"), dtype=tensor.dtype)
    buffer[1:-1, 16 : 16 + columns] = tensor
    return buffer[1:-1, 16 : 16 + columns]


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def _for_layouts(dtype: torch.dtype) -> DoraProblem:
    return _problem(19, 33, 26, 5, dtype=dtype, dropout_p=0.3)


@functools.cache
def _contiguous(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return named(_for_layouts(dtype).run())


@pytest.mark.parametrize(
    ("place", "dtype"), [(_transposed, F16), (_every_second, F16), (_in_poison, F16), (_in_poison, F32)]
)
def test_layouts(place, dtype):
    problem, expected = _for_layouts(dtype), _contiguous(dtype)
    changes = {
        name: (place(t.detach()) if t.ndim == 2 else place(t.detach()[None])[0]).requires_grad_()
        for name, t in problem.tensors.items()
    }
    problem.grad_y = place(problem.grad_y)
    problem.weight_norm = place(problem.weight_norm[None])[0]
    result = named(problem.run(**changes))
    for name, value in expected.items():
        if name == "weight":  # PyTorch's, whose order of additions follows strides
            torch.testing.assert_close(result[name], value, rtol=5e-3, atol=5e-3)
        else:
            assert torch.equal(result[name], value), name


def test_expanded_grad():
    problem = _problem(19, 33, 26, 5, dtype=F16)
    problem.grad_y = torch.ones(1, 1, dtype=F16).expand(19, 26)
    assert_as_accurate_as_eager(problem, problem.run())


def test_nothing_beyond_the_results_is_written(monkeypatch):
    guarded = []

    def empty(shape, dtype, device):
        buffer = torch.full((math.prod(shape) + 4096,), float("nan"), dtype=dtype, device=device)
        guarded.append(buffer[math.prod(shape) :])
        return buffer[: math.prod(shape)].view(shape)

    problem = _problem(21, 35, 37, 3, norm_given=False, dropout_p=0.3)
    monkeypatch.setattr(torch, "empty", empty)
    result = named(problem.run())
    assert len(guarded) >= 7
    assert all(guard.isnan().all() for guard in guarded)
    assert not any(value.isnan().any() for value in result.values())


def test_the_same_bits_run_to_run():
    problem = _problem(70, 72, 40, 8, dtype=F16, dropout_p=0.2)
    first, second = named(problem.run()), named(problem.run())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_only_what_is_wanted_is_computed():
    problem = _problem(20, 17, 15, 6, dtype=F16, dropout_p=0.3)
    _, everything = problem.run()
    for count in (1, 2):
        for wanted in itertools.combinations(everything, count):
            problem.freeze_all_but(*wanted)
            _, grads = problem.run()
            assert set(grads) == set(wanted)
            for name, grad in grads.items():
                torch.testing.assert_close(grad, everything[name], rtol=2e-3, atol=2e-3)


# dora_weight_norm


def _matrices(n, k, r, dtype, adapter_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale, dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    kind = adapter_dtype or dtype
    return draw(n, k, scale=k**-0.5, dtype=dtype), *(
        draw(*shape, scale=scale, dtype=kind) for shape, scale in (((r, k), k**-0.5), ((n, r), r**-0.5))
    )


def _exact(weight, lora_A, lora_B, scaling):
    return (weight.double() + scaling * lora_B.double() @ lora_A.double()).norm(dim=1)


NORM_SIZES = ((1, 1, 1), (7, 40, 3), (67, 133, 8), (70, 300, 16), (33, 64, 48))
NORM_DTYPES = ((F32, F32), (F16, F16), (F16, F32))


# Each size in each pair of dtypes, the norm of the weight known at every second.
@pytest.mark.parametrize(
    ("n", "k", "r", "dtype", "adapter_dtype", "known"),
    [(*size, *dtypes, i % 2 == 1) for i, (size, dtypes) in enumerate(itertools.product(NORM_SIZES, NORM_DTYPES))],
    ids=str,
)
def test_norm(n, k, r, dtype, adapter_dtype, known):
    """float32's accuracy from 16-bit matrices too: their products are exact in float32, their sums are its."""
    weight, lora_A, lora_B = _matrices(n, k, r, dtype, adapter_dtype)
    squares = (weight.double() ** 2).sum(1).float() if known else None
    found = functional.dora_weight_norm(weight, lora_A, lora_B, scaling=1.5, weight_norm_squared=squares)
    assert found.dtype == F32
    # A of float32 over a 16-bit weight is split into two 16-bit matrices, which hold 22 of its 24 bits.
    assert relative_error(found, _exact(weight, lora_A, lora_B, 1.5)) <= (5e-7 if dtype == adapter_dtype else 2e-6)


def test_norm_of_a_rank_above_one_tile(arch):
    weight, lora_A, lora_B = _matrices(20, 24, 136, F16)
    found = functional.dora_weight_norm(weight, lora_A, lora_B, scaling=0.7)
    assert relative_error(found, _exact(weight, lora_A, lora_B, 0.7)) <= 5e-7


def test_norm_of_a_matrix_that_the_update_cancels():
    """The sum of the three terms may come out below 0: that is a norm of 0, not NaN."""
    lora_A, lora_B = torch.randn(4, 40), torch.randn(20, 4)
    found = functional.dora_weight_norm(-(lora_B @ lora_A), lora_A, lora_B, scaling=1.0)
    assert not found.isnan().any()
    assert (found < 0.02).all()


@pytest.mark.parametrize("place", [_transposed, _every_second, _in_poison])
def test_norm_layouts(place):
    matrices = _matrices(26, 33, 5, F16)
    expected = functional.dora_weight_norm(*matrices, scaling=1.5)
    assert torch.equal(functional.dora_weight_norm(*map(place, matrices), scaling=1.5), expected)


@pytest.mark.parametrize("op", ["dora_linear", "dora_weight_norm"])
def test_unsupported_and_unproven_say_why(op):
    matrices = _matrices(8, 8, 2, torch.bfloat16)
    arguments = (torch.ones(4, 8).bfloat16(), *matrices, torch.ones(8)) if op == "dora_linear" else matrices
    with pytest.raises(RuntimeError, match="interpreter rounds to bfloat16 wrongly"):
        explain(op, *arguments)
    arguments = [tensor.float() for tensor in arguments]
    with use_backend(None):
        assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in explain(op, *arguments).rejected
