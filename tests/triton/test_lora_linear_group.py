"""`lora_linear_group` in the Triton kernels: as accurate as PyTorch's own composition, at any shape and layout."""

from __future__ import annotations

import functools
import itertools
import math
import random

import pytest
import torch

from peft_kernels import explain, use_backend
from peft_kernels.kernels.reference import philox_dropout
from peft_kernels.kernels.triton import _launch, lora_linear_group
from peft_kernels.ops.lora_linear_group import Problem
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.problems import GroupProblem
from tests.triton.launches import record_launches

F16, F32 = torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
# One adapter each, a frozen projection, several adapters at once, nothing but one projection.
LAYOUTS = (((1,), (3,), (8,)), ((16,), (), (5,)), ((3, 16), (48,)), ((8,),), ((1, 1, 1), (), (24,), (2,)))


def _grid() -> list[tuple]:
    chance = random.Random(11)
    sizes = (1, 7, 40, 67)
    cases = [
        (m, chance.choice(sizes), tuple(chance.choice(sizes) for _ in ranks), ranks, chance.choice((0.0, 0.4)))
        # Every second of all pairs: each number of rows with several layouts, each layout with two numbers of rows.
        for m, ranks in list(itertools.product((0, 1, 17, 67), LAYOUTS))[::2]
    ]
    return [(case, F16) for case in cases] + [(case, F32) for case in cases[1::3]]


def _name(value) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else "-".join(map(str, value))


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request, monkeypatch) -> str:
    monkeypatch.setattr(_launch, "architecture", lambda device: request.param)
    return request.param


def _token_mask(m: int) -> torch.Tensor:
    return torch.arange(m) % 3 != 1


@pytest.mark.parametrize(("case", "dtype"), _grid(), ids=_name)
def test_awkward_shapes(case, dtype):
    m, k, ns, ranks, p = case
    token_mask = _token_mask(m) if m % 2 else None
    problem = GroupProblem(m, k, ns, ranks, dtype=dtype, dropout_p=p, token_mask=token_mask)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize(
    ("arch", "dropout_p", "masked"),
    [("sm_80", [0.2, 0.0, 0.5], True), ("sm_90", 0.0, False)],
    indirect=["arch"],
    ids=str,
)
def test_several_tiles_and_splits_of_each_architecture(arch, dropout_p, masked):
    problem = GroupProblem(
        132, 72, (136, 72, 40), ((16,), (3,), (8,)), dtype=F16, dropout_p=dropout_p,
        token_mask=_token_mask(132) if masked else None,
    )  # fmt: skip
    assert_as_accurate_as_eager(problem, problem.run())


def test_several_adapters_of_their_own_scalings():
    problem = GroupProblem(
        70, 72, (40, 72), ((8, 3), (8, 1)), dtype=F16, scalings=[[2.0, 0.3], [1.0, 5.0]],
        dropout_p=[[0.3, 0.0], [0.1, 0.6]], token_mask=_token_mask(70),
    )  # fmt: skip
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize(("ranks", "dropout_p"), [(((48, 48), (1,)), 0.3), (((160,), (8,)), 0.0)], ids=str)
def test_ranks_that_need_two_passes_over_grad_y(ranks, dropout_p):
    problem = GroupProblem(70, 72, (40, 24), ranks, dtype=F16, scalings=[[2.0, 0.5][: len(ranks[0])], 0.3],
                           dropout_p=dropout_p, token_mask=_token_mask(70))  # fmt: skip
    if len(ranks[0]) == 1:
        problem.scalings = 2.0
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_float32_adapters_over_a_float16_layer(dropout_p):
    problem = GroupProblem(37, 65, (50, 24), ((12,), (5, 2)), dtype=F16, adapter_dtype=F32, dropout_p=dropout_p)
    y, grads = problem.run()
    assert {grads[name].dtype for name in grads if name.startswith("lora")} == {F32}
    assert_as_accurate_as_eager(problem, (y, grads))


@DTYPES
def test_an_output_that_nobody_uses(dtype):
    problem = GroupProblem(40, 33, (26, 17, 9), ((5,), (3,), (8,)), dtype=dtype, dropout_p=0.2)
    problem.grad_y = (problem.grad_y[0], None, problem.grad_y[2])
    assert_as_accurate_as_eager(problem, problem.run())


def test_no_adapter_at_all():
    problem = GroupProblem(40, 33, (26, 17), ((), ()), dtype=F16)
    assert_as_accurate_as_eager(problem, problem.run())


def test_batch_dimensions():
    problem = GroupProblem((2, 3, 7), 33, (20, 9), ((4,), (2,)), dropout_p=0.2)
    assert_as_accurate_as_eager(problem, problem.run())


# What the passes promise.


def test_one_launch_for_all_projections(monkeypatch):
    launched = record_launches(monkeypatch)
    GroupProblem(70, 40, (72, 24, 24), ((16,), (8,), (8,)), dtype=F16).run()
    assert [name for name in launched if name != "splitk_reduce"] == [
        "_down_projection", "_group_gemm", "_group_grad_s_b", "_group_grad_x", "_sum_over_rows"
    ]  # fmt: skip


def test_dropout_reads_x_once(monkeypatch):
    launched = record_launches(monkeypatch)
    GroupProblem(70, 40, (72, 24, 24), ((16,), (8,), (8,)), dtype=F16, dropout_p=0.1).run()
    assert launched.count("_group_down_projection") == launched.count("_group_sum_over_rows") == 1


def test_rows_that_tma_can_address_go_through_descriptors(monkeypatch):
    from peft_kernels.kernels.triton import _product

    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    forms, fits = [], _product.fits
    monkeypatch.setattr(_product, "fits", lambda x, w: forms.append(fits(x, w)) or forms[-1])
    problem = GroupProblem(132, 72, (264, 72), ((16,), (8,)), dtype=F16)
    expected = named(problem.run())
    assert forms
    assert all(forms)
    weight = problem.tensors["weights.1"].detach()
    placed = torch.empty(weight.numel() + 1, dtype=F16)[1:].view(weight.shape).copy_(weight)
    forms.clear()
    misaligned = named(problem.run(**{"weights.1": placed.requires_grad_()}))
    assert not all(forms)
    for name, value in misaligned.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-3)


def _every_second(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full((tensor.shape[0] * 2, tensor.shape[1] * 2), float("nan"), dtype=tensor.dtype)
    wide[::2, ::2] = tensor
    return wide[::2, ::2]


def _in_poison(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the middle of a buffer of NaN, rows padded too."""
    rows, columns = tensor.shape
    buffer = torch.full((rows + 2, columns + 24), float("nan"), dtype=tensor.dtype)
    buffer[1:-1, 16 : 16 + columns] = tensor
    return buffer[1:-1, 16 : 16 + columns]


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t().contiguous().t()


def _for_layouts(dtype: torch.dtype) -> GroupProblem:
    return GroupProblem(19, 33, (26, 40), ((5,), (3, 8)), dtype=dtype, dropout_p=0.3, token_mask=_token_mask(19))


@functools.cache
def _contiguous(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return named(_for_layouts(dtype).run())


@pytest.mark.parametrize(
    ("place", "dtype"), [(_transposed, F16), (_every_second, F16), (_in_poison, F16), (_in_poison, F32)]
)
def test_layouts(place, dtype):
    """Every matrix laid out otherwise; nothing beyond the tails is read."""
    problem, expected = _for_layouts(dtype), _contiguous(dtype)
    changes = {
        name: place(tensor.detach()).requires_grad_()
        for name, tensor in problem.tensors.items()
        if tensor is not None and tensor.ndim == 2
    }
    problem.grad_y = tuple(place(grad) for grad in problem.grad_y)
    result = named(problem.run(**changes))
    for name, value in expected.items():
        if name.startswith(("weights", "biases")):  # PyTorch's, whose order of additions follows strides
            torch.testing.assert_close(result[name], value, rtol=5e-3, atol=5e-3)
        else:
            assert torch.equal(result[name], value), name


def test_expanded_grad():
    """`.sum().backward()` sends gradients with strides (0, 0)."""
    problem = GroupProblem(19, 33, (26, 8), ((5,), (3,)), dtype=F16)
    problem.grad_y = tuple(torch.ones(1, 1, dtype=F16).expand(19, n) for n in problem.ns)
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_nothing_beyond_the_results_is_written(dropout_p, monkeypatch):
    guarded = []

    def empty(shape, dtype, device):
        buffer = torch.full((math.prod(shape) + 4096,), float("nan"), dtype=dtype, device=device)
        guarded.append(buffer[math.prod(shape) :])
        return buffer[: math.prod(shape)].view(shape)

    problem = GroupProblem(21, 35, (37, 20), ((3,), (40,)), dropout_p=dropout_p, token_mask=_token_mask(21))
    monkeypatch.setattr(torch, "empty", empty)
    result = named(problem.run())
    assert len(guarded) >= 6
    assert all(guard.isnan().all() for guard in guarded)
    assert not any(value.isnan().any() for value in result.values())


def test_rows_outside_the_token_mask_get_no_update():
    problem = GroupProblem(50, 33, (26, 17), ((5,), (8,)), dtype=F16, dropout_p=0.3, token_mask=_token_mask(50))
    ys, _ = problem.run()
    problem.scalings = 0.0
    frozen, _ = problem.run()
    for y, base in zip(ys, frozen, strict=True):
        assert torch.equal(y[~problem.token_mask], base[~problem.token_mask])
        assert not torch.equal(y[problem.token_mask], base[problem.token_mask])


def test_a_row_outside_the_token_mask_may_hold_anything():
    """S and dB do not see it, where 0 times infinity would be NaN."""
    problem = GroupProblem(50, 33, (26,), ((5,),), dtype=F16, token_mask=_token_mask(50))
    x = problem.tensors["x"].detach().clone()
    x[1] = float("inf")
    _, grads = problem.run(x=x.requires_grad_())
    assert grads["lora_Bs.0.0"].isfinite().all()


def test_the_same_bits_run_to_run():
    problem = GroupProblem(70, 72, (80, 30), ((8,), (3, 16)), dtype=F16, dropout_p=0.2)
    first, second = named(problem.run()), named(problem.run())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_only_what_is_wanted_is_computed():
    problem = GroupProblem(30, 41, (35, 12), ((6,), (3, 4)), dropout_p=0.3)
    _, everything = problem.run()
    for wanted in ("x", "lora_As", "lora_Bs", "weights", "biases", "lora_Bs.1.0", "lora_As.0.0"):
        problem.freeze_all_but(wanted)
        _, grads = problem.run()
        assert grads
        assert all(name.startswith(wanted) for name in grads)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, everything[name], rtol=1e-5, atol=1e-5)


# The masks, bit for bit: products with 0 and 1 are exact, so that each kernel shows the mask itself.


def _masks(small: tuple[int, int], large: tuple[int, int]):
    """Each size in each dtype, each architecture with each of both."""
    cases = [("sm_80", *small, F32), ("sm_90", *small, F16), ("sm_90", *large, F32), ("sm_80", *large, F16)]
    return pytest.mark.parametrize(("arch", "m", "k", "dtype"), cases, indirect=["arch"], ids=str)


ARCH_AND_DTYPE = pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_80", F32), ("sm_90", F16)], indirect=["arch"], ids=str
)
PS, SEEDS = [0.3, 0.0, 0.7], torch.tensor([-987654321012345, 5, 2**62 + 3])


def _dropped(x: torch.Tensor) -> list[torch.Tensor]:
    return [philox_dropout.forward(x, p, SEEDS[i : i + 1]) for i, p in enumerate(PS)]


@_masks(small=(20, 33), large=(70, 41))
def test_masks_of_the_down_projections(arch, m, k, dtype):
    from peft_kernels.kernels.triton._group_passes import group_down_projection

    x, one = torch.randn(m, k).to(dtype), torch.eye(k, dtype=dtype)
    s = group_down_projection(x, torch.cat([one] * 3), [k] * 3, PS, SEEDS, None)
    assert torch.equal(s, torch.cat(_dropped(x), 1))


@ARCH_AND_DTYPE
def test_masks_of_dx(arch, dtype):
    from peft_kernels.kernels.triton._group_grad_x import group_grad_x

    m, k = 70, 160
    grad_ys, weights = [torch.zeros(m, 8, dtype=dtype)] * 2, [torch.zeros(8, k, dtype=dtype)] * 2
    for i, mask in enumerate(_dropped(torch.ones(m, k, dtype=dtype))):
        grad_s = torch.zeros(m, 3, dtype=dtype)
        grad_s[:, i] = 1.0
        a = torch.ones(3, k, dtype=dtype)
        assert torch.equal(group_grad_x(grad_ys, weights, grad_s, a, [1, 1, 1], PS, SEEDS), mask)


@_masks(small=(20, 33), large=(40, 160))
def test_masks_of_da(arch, m, k, dtype):
    from peft_kernels.kernels.triton._group_passes import group_sum_over_rows

    x, one = torch.randn(m, k).to(dtype), torch.eye(m, dtype=dtype)
    grad_a = group_sum_over_rows(torch.cat([one] * 3, 1), x, [m] * 3, dtype, PS, SEEDS)
    assert torch.equal(grad_a, torch.cat(_dropped(x)))


def test_everything_dropped():
    problem = GroupProblem(20, 33, (26, 8), ((5,), (3,)), dropout_p=1.0)
    ys, grads = problem.run()
    t = problem.tensors
    for j, y in enumerate(ys):
        base = torch.nn.functional.linear(t["x"], t[f"weights.{j}"], t[f"biases.{j}"]).detach()
        torch.testing.assert_close(y, base)
    assert all(grads[name].eq(0).all() for name in grads if name.startswith("lora"))


def _problem(**changes) -> Problem:
    return Problem("cpu", None, F16, F16, 64, (8, 8), 8, (4, 4), (0, 1), False, False)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ns": (8,) * 5}, "5 projections, more than 4"),
        ({"rs": (1,) * 9}, "9 adapters, more than 8"),
        ({"rs": (400, 200)}, "ranks of 600 together, above 512"),
        ({"dtype": torch.bfloat16}, "interpreter rounds to bfloat16 wrongly"),
        ({"adapter_dtype": torch.float64}, "float64 runs in PyTorch"),
        ({}, None),
        ({"rs": (), "adapter_dtype": None}, None),
    ],
)
def test_unsupported_says_why(changes, reason):
    found = lora_linear_group.unsupported(_problem(**changes))
    assert found is None if reason is None else reason in found


def test_the_interpreter_is_never_chosen_by_itself():
    args, options = GroupProblem(4, 8, (8, 8), ((2,), (2,))).arguments(GroupProblem(4, 8, (8, 8), ((2,), (2,))).tensors)
    with use_backend(None):
        assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in explain("lora_linear_group", *args, **options).rejected
