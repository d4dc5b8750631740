"""`lora_linear` in the Triton kernels: as accurate as PyTorch's own composition, at any shape and layout."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random

import pytest
import torch

from peft_kernels import explain, functional, tuning, use_backend
from peft_kernels.kernels.reference import philox_dropout
from peft_kernels.kernels.triton import _launch
from tests.helpers import LoraProblem, assert_as_accurate_as_eager, assert_within_rounding
from tests.triton.launches import record_launches

F16, F32 = torch.float16, torch.float32
ROWS = (0, 1, 17, 70)
RANKS = (1, 3, 8, 12, 16, 64, 96)
SIZES = (1, 7, 40, 67, 101)


def _grid() -> list[tuple]:
    chance = random.Random(7)
    # Every second of all pairs: each number of rows with several ranks, each rank with several numbers of rows.
    pairs = list(itertools.product(ROWS, RANKS))[::2]
    cases = [(m, chance.choice(SIZES), chance.choice(SIZES), r) for m, r in pairs]
    cases = [(*case, chance.random() < 0.5, chance.choice((0.0, 0.4))) for case in cases]
    # float32 goes in smaller tiles, which take the interpreter longer: every third case.
    return [(case, F16) for case in cases] + [(case, F32) for case in cases[1::3]]


def _name(value) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    m, k, n, r, bias, dropout_p = value
    return f"m{m}-k{k}-n{n}-r{r}{'-bias' * bias}-p{dropout_p}"


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request, monkeypatch) -> str:
    """The configurations of this architecture, which the interpreter runs as well as any others."""
    monkeypatch.setattr(_launch, "architecture", lambda device: request.param)
    return request.param


@pytest.mark.parametrize(("case", "dtype"), _grid(), ids=_name)
def test_awkward_shapes(case, dtype):
    m, k, n, r, bias, dropout_p = case
    problem = LoraProblem(m, k, n, r, dtype=dtype, bias=bias, dropout_p=dropout_p)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize(("m", "r", "dropout_p"), [(300, 16, 0.25), (70, 160, 0.0)])
def test_several_tiles_and_splits_of_each_architecture(arch, m, r, dropout_p):
    problem = LoraProblem(m, 300, 290, r, dtype=F16, dropout_p=dropout_p)
    assert_as_accurate_as_eager(problem, problem.run())


PERSISTENT, TMA = "extended_gemm_persistent", "extended_gemm_tma"


@pytest.mark.parametrize(
    ("form", "m", "r", "dropout_p"),
    [
        (PERSISTENT, 50, 5, 0.3), (PERSISTENT, 140, 70, 0.3), (PERSISTENT, 300, 16, 0.0),
        (TMA, 50, 5, 0.3), (TMA, 140, 70, 0.0),
    ],
)  # fmt: skip
def test_forms_with_descriptors(form, m, r, dropout_p, monkeypatch):
    """Rows of a multiple of 16 bytes go through descriptors on sm_90, forward and backward; each size has a tail, and
    the persistent form has several tiles a program."""
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    if form == TMA:
        _without(monkeypatch, PERSISTENT)
    launched = record_launches(monkeypatch)
    problem = LoraProblem(m, 136, 520, r, dtype=F16, dropout_p=dropout_p)
    assert_as_accurate_as_eager(problem, problem.run())
    assert launched.count(f"_{form}") == 2


def _without(monkeypatch, kernel: str) -> None:
    """No configuration of `kernel` from now on."""
    choose = tuning.config
    monkeypatch.setattr(tuning, "config", lambda arch, k, *a, **s: None if k == kernel else choose(arch, k, *a, **s))


@pytest.mark.parametrize(("m", "r", "scaling"), [(300, 3, -0.3), (140, 96, 1.5), (70, 8, 0.0)])
def test_low_rank_step_last(m, r, scaling, monkeypatch):
    """The form that bfloat16 takes, here in float16, since the interpreter cannot do bfloat16."""
    from peft_kernels.kernels.triton import _extended_gemm

    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_extended_gemm, "low_rank_last", lambda dtype, dropout: not dropout)
    launched = record_launches(monkeypatch)
    problem = LoraProblem(m, 136, 520, r, dtype=F16, scaling=scaling)
    assert_as_accurate_as_eager(problem, problem.run())
    assert launched.count(f"_{PERSISTENT}") == 2


def test_rows_of_y_that_tma_cannot_address(monkeypatch):
    """N = 67: x and W have rows for descriptors, y has not."""
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    launched = record_launches(monkeypatch)
    problem = LoraProblem(70, 136, 67, 8, dtype=F16)
    assert_as_accurate_as_eager(problem, problem.run())
    assert "_extended_gemm_tma" in launched
    assert "_extended_gemm" in launched


def _misaligned_base(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


def _misaligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape[0], tensor.shape[1] + 7, dtype=tensor.dtype)[:, : tensor.shape[1]]


def _overlapping_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize("place", [_misaligned_base, _misaligned_rows, _overlapping_rows])
@pytest.mark.parametrize("name", ["x", "weight"])
def test_rows_that_tma_cannot_address_take_pointers(name, place, monkeypatch):
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    problem = LoraProblem(70, 40, 24, 5, dtype=F16)
    values = problem.tensors[name].detach()
    placed = place(values)
    if place is _overlapping_rows:
        values = placed.clone()
    else:
        placed.copy_(values)
    expected, _ = problem.run(**{name: values.requires_grad_()})
    launched = record_launches(monkeypatch)
    y, _ = problem.run(**{name: placed.requires_grad_()})
    assert "_extended_gemm" in launched
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("arch", "m", "k", "n", "r"),
    [
        ("sm_80", 1, 67, 101, 1), ("sm_90", 7, 300, 130, 3), ("sm_90", 16, 520, 64, 8), ("sm_80", 17, 40, 67, 12),
        ("sm_90", 17, 40, 67, 12), ("sm_90", 33, 129, 131, 16), ("sm_80", 64, 200, 70, 64),
    ],
    indirect=["arch"],
)  # fmt: skip
def test_single_pass(arch, m, k, n, r, monkeypatch):
    """Few rows: one launch, and two more to add the partials where K is split."""
    launched = record_launches(monkeypatch)
    problem = LoraProblem(m, k, n, r, dtype=F16, bias=m != 16)
    t = problem.tensors
    with torch.no_grad():
        functional.lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"])
    assert launched in (["_single_pass"], ["_single_pass", "splitk_reduce", "splitk_reduce"])
    assert (len(launched) == 3) == (k > 64)
    assert_as_accurate_as_eager(problem, problem.run())


def test_a_row_of_the_single_pass_does_not_depend_on_the_others(arch):
    problem = LoraProblem(40, 200, 130, 8, dtype=F16)
    t = {name: tensor.detach() for name, tensor in problem.tensors.items()}

    def run(rows: slice) -> torch.Tensor:
        return functional.lora_linear(t["x"][rows], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"])

    whole = run(slice(0, 40))
    for rows in (slice(0, 1), slice(5, 19), slice(3, 36)):
        assert torch.equal(run(rows), whole[rows])


@pytest.mark.parametrize(("m", "r", "dropout_p"), [(65, 8, 0.0), (4, 65, 0.0), (4, 8, 0.3)])
def test_two_launches_where_one_pass_does_not_serve(m, r, dropout_p, monkeypatch):
    launched = record_launches(monkeypatch)
    problem = LoraProblem(m, 40, 70, r, dtype=F16, dropout_p=dropout_p)
    assert_as_accurate_as_eager(problem, problem.run())
    assert "_single_pass" not in launched


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_number_of_launches(arch, dropout_p, monkeypatch):
    """At most two forward and four backward, the sums of partials not counted."""
    launched = record_launches(monkeypatch, run=False)
    problem = LoraProblem(200, 136, 264, 8, dtype=F16, dropout_p=dropout_p)
    t = problem.tensors
    y = functional.lora_linear(
        t["x"], t["weight"].detach(), t["lora_A"], t["lora_B"], scaling=1.5, dropout_p=dropout_p, seed=1
    )
    assert len([name for name in launched if name != "splitk_reduce"]) <= 2
    launched.clear()
    y.sum().backward()
    assert len([name for name in launched if name != "splitk_reduce"]) <= 4


@pytest.mark.parametrize("r", [384, 512])
def test_large_rank(r):
    problem = LoraProblem(9, 40, 24, r, dtype=F16, dropout_p=0.3)
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_float32_adapters_over_a_float16_layer(dropout_p):
    problem = LoraProblem(37, 65, 50, 12, dtype=F16, adapter_dtype=F32, dropout_p=dropout_p)
    y, grads = problem.run()
    assert grads["lora_A"].dtype == grads["lora_B"].dtype == F32
    assert_as_accurate_as_eager(problem, (y, grads))


def test_batch_dimensions():
    problem = LoraProblem((2, 3, 7), 33, 20, 4, dropout_p=0.2)
    assert_as_accurate_as_eager(problem, problem.run())


def _every_second(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((tensor.shape[0] * 2, tensor.shape[1] * 2), float("nan"), dtype=tensor.dtype)
    wide[::2, ::2] = tensor
    return wide[::2, ::2]


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second row and column": _every_second,
}


def _for_strides(dtype: torch.dtype) -> LoraProblem:
    return LoraProblem(19, 33, 26, 5, dtype=dtype, dropout_p=0.3)


@functools.cache
def _without_strides(dtype: torch.dtype):
    return _for_strides(dtype).run()


NAMES = ("x", "weight", "lora_A", "lora_B", "grad_y")


# In float32 each matrix once, the layouts in turn.
@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    [
        *((name, layout, F16) for name in NAMES for layout in LAYOUTS),
        *((name, layout, F32) for name, layout in zip(NAMES, itertools.cycle(LAYOUTS), strict=False)),
    ],
    ids=str,
)
def test_strides(name, layout, dtype):
    problem = _for_strides(dtype)
    expected_y, expected = _without_strides(dtype)
    changes = {}
    if name == "grad_y":
        problem.grad_y = LAYOUTS[layout](problem.grad_y)
    else:
        changes[name] = LAYOUTS[layout](problem.tensors[name].detach()).requires_grad_()
    y, grads = problem.run(**changes)
    assert torch.equal(y, expected_y)
    for gradient in ("x", "lora_A", "lora_B"):  # the other two are PyTorch's, whose order of additions follows strides
        assert torch.equal(grads[gradient], expected[gradient]), gradient


def test_bias_strides():
    problem = LoraProblem(19, 33, 26, 5, dtype=F16)
    expected, _ = problem.run()
    wide = torch.full((26, 3), float("nan"), dtype=F16)
    wide[:, 1] = problem.tensors["bias"].detach()
    y, _ = problem.run(bias=wide[:, 1].requires_grad_())
    assert torch.equal(y, expected)


def test_expanded_grad():
    """`.sum().backward()` sends a gradient with strides (0, 0)."""
    problem = LoraProblem(19, 33, 26, 5, dtype=F16)
    problem.grad_y = torch.ones(1, 1, dtype=F16).expand(19, 26)
    assert problem.grad_y.stride() == (0, 0)
    assert_as_accurate_as_eager(problem, problem.run())


def _in_poison(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the middle of a buffer of NaN, rows padded too."""
    rows, columns = tensor.shape
    buffer = torch.full((rows + 2, columns + 24), float("nan"), dtype=tensor.dtype)
    buffer[1:-1, 16 : 16 + columns] = tensor
    return buffer[1:-1, 16 : 16 + columns]


@pytest.mark.parametrize(("r", "dtype"), [(3, F32), (40, F16)], ids=str)
def test_nothing_beyond_the_tails_is_read(r, dtype):
    problem = LoraProblem(21, 35, 37, r, dtype=dtype, dropout_p=0.3)
    expected_y, expected = problem.run()
    poisoned = {
        name: _in_poison(problem.tensors[name].detach()).requires_grad_()
        for name in ("x", "weight", "lora_A", "lora_B")
    }
    problem.grad_y = _in_poison(problem.grad_y)
    y, grads = problem.run(**poisoned)
    assert torch.equal(y, expected_y)
    for name in ("x", "lora_A", "lora_B"):
        assert torch.equal(grads[name], expected[name]), name


@pytest.mark.parametrize("r", [3, 40])
def test_nothing_beyond_the_results_is_written(r, monkeypatch):
    guarded = []

    def empty(shape, dtype, device):
        buffer = torch.full((math.prod(shape) + 4096,), float("nan"), dtype=dtype, device=device)
        guarded.append(buffer[math.prod(shape) :])
        return buffer[: math.prod(shape)].view(shape)

    problem = LoraProblem(21, 35, 37, r, dropout_p=0.3)
    monkeypatch.setattr(torch, "empty", empty)
    y, grads = problem.run()
    assert len(guarded) >= 5
    assert all(guard.isnan().all() for guard in guarded)
    assert not any(result.isnan().any() for result in (y, *grads.values()))


def test_nan_and_infinity_stay_in_their_row():
    problem = LoraProblem(20, 33, 26, 5)
    x = problem.tensors["x"].detach().clone()
    x[3, 5], x[9, 0] = float("nan"), float("inf")
    y, _ = problem.run(x=x.requires_grad_())
    clean, _ = problem.run()
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 9]] = True
    assert torch.equal(y[~bad], clean[~bad])
    assert not y[bad].isfinite().any()


def test_the_same_bits_run_to_run():
    problem = LoraProblem(140, 136, 72, 8, dtype=F16, dropout_p=0.2)
    (y, grads), (y_again, grads_again) = problem.run(), problem.run()
    assert torch.equal(y, y_again)
    for name in grads:
        assert torch.equal(grads[name], grads_again[name]), name


def _wanted(problem: LoraProblem, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    changes = {n: t if t is None else t.detach().requires_grad_(n in names) for n, t in problem.tensors.items()}
    return problem.run(**changes)[1]


def test_only_what_is_wanted_is_computed():
    problem = LoraProblem(30, 41, 35, 6, dropout_p=0.3)
    names = tuple(problem.tensors)
    _, everything = problem.run()
    for count in (1, 2):
        for wanted in itertools.combinations(names, count):
            grads = _wanted(problem, wanted)
            assert set(grads) == set(wanted)
            for name, grad in grads.items():
                torch.testing.assert_close(grad, everything[name], rtol=1e-5, atol=1e-5)


def test_two_passes_over_grad_y_where_partials_would_not_fit(monkeypatch):
    """The way without scratch memory gives the gradients of the one with it."""
    problem = LoraProblem(150, 40, 70, 8, dtype=F16)
    _, one_pass = problem.run()
    choose, asked = tuning.config, []

    def without_scratch(arch, kernel, *arguments, **sizes):
        asked.append(kernel)
        config = choose(arch, kernel, *arguments, **sizes)
        return dataclasses.replace(config, scratch_mib=0) if kernel == "grad_s_b" else config

    monkeypatch.setattr(tuning, "config", without_scratch)
    result = problem.run()
    assert asked.count("sum_over_rows") == 2
    assert_as_accurate_as_eager(problem, result)
    torch.testing.assert_close(result[1]["lora_B"], one_pass["lora_B"], rtol=2e-3, atol=2e-3)


# The mask, bit for bit: products with 0 and 1 are exact, so that each kernel shows the mask itself.


def _masks(small: tuple[int, int], large: tuple[int, int]):
    """Each size in each dtype, each architecture with each of both."""
    cases = [("sm_80", *small, F32), ("sm_90", *small, F16), ("sm_90", *large, F32), ("sm_80", *large, F16)]
    return pytest.mark.parametrize(("arch", "m", "k", "dtype"), cases, indirect=["arch"], ids=str)


@_masks(small=(20, 33), large=(70, 96))
def test_mask_of_the_down_projection(arch, m, k, dtype):
    from peft_kernels.kernels.triton._down_projection import down_projection

    x, seed = torch.randn(m, k).to(dtype), torch.tensor([-987654321012345])
    s = down_projection(x, torch.eye(k, dtype=dtype), 0.3, seed)
    assert torch.equal(s, philox_dropout.forward(x, 0.3, seed))


@_masks(small=(20, 33), large=(70, 160))
def test_mask_of_dx(arch, m, k, dtype):
    from peft_kernels.kernels.triton._extended_gemm import extended_gemm

    seed = torch.tensor([2**62 + 3])
    no_base = torch.zeros(m, 8, dtype=dtype), torch.zeros(8, k, dtype=dtype)
    ones = torch.ones(m, 1, dtype=dtype), torch.ones(1, k, dtype=dtype)
    grad_x = extended_gemm(*no_base, *ones, 1.0, None, 0.3, seed)
    assert torch.equal(grad_x, philox_dropout.forward(torch.ones(m, k, dtype=dtype), 0.3, seed))


@_masks(small=(20, 33), large=(90, 160))
def test_mask_of_da(arch, m, k, dtype):
    from peft_kernels.kernels.triton._sum_over_rows import sum_over_rows

    x, seed = torch.randn(m, k).to(dtype), torch.tensor([42])
    grad_a = sum_over_rows(torch.eye(m, dtype=dtype), x, 1.0, dtype, 0.3, seed)
    assert torch.equal(grad_a, philox_dropout.forward(x, 0.3, seed))


def test_everything_dropped():
    problem = LoraProblem(20, 33, 26, 5, dropout_p=1.0)
    y, grads = problem.run()
    t = problem.tensors
    torch.testing.assert_close(y, torch.nn.functional.linear(t["x"], t["weight"], t["bias"]).detach())
    assert grads["lora_A"].eq(0).all()
    assert grads["lora_B"].eq(0).all()


def test_unsupported_says_why():
    problem = LoraProblem(4, 8, 8, 2, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter rounds to bfloat16 wrongly"):
        problem.run()
    with pytest.raises(RuntimeError, match="float64 runs in PyTorch"):
        LoraProblem(4, 8, 8, 2, dtype=torch.float64).run()


def test_the_interpreter_is_never_chosen_by_itself():
    t = LoraProblem(4, 8, 8, 2).tensors
    with use_backend(None):
        choice = explain("lora_linear", t["x"], t["weight"], t["lora_A"], t["lora_B"])
        assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in choice.rejected
        y = functional.lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"])
    assert y.shape == (4, 8)
