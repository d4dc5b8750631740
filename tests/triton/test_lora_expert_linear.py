"""`lora_expert_linear` in the Triton kernels: as accurate as PyTorch's own composition, whoever gets which rows."""

from __future__ import annotations

import functools
import math
import random

import pytest
import torch

from peft_kernels import explain, use_backend
from peft_kernels.kernels.reference import philox_dropout
from peft_kernels.kernels.triton import _launch, lora_expert_linear
from peft_kernels.ops.lora_expert_linear import Problem
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.problems import ExpertProblem
from tests.triton.launches import record_launches

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

F16, F32 = torch.float16, torch.float32
ARCH_AND_DTYPE = pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_80", F32), ("sm_90", F16)], indirect=["arch"], ids=str
)
# One expert, empty ones at every place, more experts than rows, more rows than a tile, nobody at all.
COUNTS = ((21,), (0, 9, 0, 70, 1, 0), (1, 0, 0, 1, 0, 0), (64, 64), (0, 0))


def _grid() -> list[tuple]:
    chance = random.Random(5)
    counts = (*COUNTS, COUNTS[1])
    # Dropout and rows that nobody owns at every second: the second of COUNTS comes with them and without.
    others = ((3, 0.4, 5), (40, 0.0, 0), (16, 0.3, 5), (1, 0.0, 0), (3, 0.4, 5), (3, 0.4, 5))
    cases = [
        (each, chance.choice((1, 7, 40, 67)), chance.choice((1, 9, 40)), *other)
        for each, other in zip(counts, others, strict=True)
    ]
    return [(case, F16) for case in cases] + [(case, F32) for case in cases[::2]]


def _name(value) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else "-".join(map(str, value))


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request, monkeypatch) -> str:
    monkeypatch.setattr(_launch, "architecture", lambda device: request.param)
    return request.param


@pytest.mark.parametrize(("case", "dtype"), _grid(), ids=_name)
def test_awkward_shapes(case, dtype):
    counts, k, n, r, p, orphans = case
    problem = ExpertProblem(counts, k, n, r, dtype=dtype, dropout_p=p, orphans=orphans)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize(("arch", "dropout_p"), [("sm_80", 0.2), ("sm_90", 0.0)], indirect=["arch"])
def test_several_tiles_and_splits_of_each_architecture(arch, dropout_p):
    problem = ExpertProblem((140, 0, 20), 136, 72, 16, dtype=F16, dropout_p=dropout_p, orphans=9)
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("r", [160, 512])
def test_large_rank(r):
    problem = ExpertProblem((9, 0, 5), 40, 24, r, dtype=F16, dropout_p=0.3, orphans=2)
    assert_as_accurate_as_eager(problem, problem.run())


def test_float32_adapters_over_a_float16_layer():
    problem = ExpertProblem((20, 0, 18), 65, 50, 12, dtype=F16, adapter_dtype=F32, dropout_p=0.4)
    y, grads = problem.run()
    assert grads["lora_A"].dtype == grads["lora_B"].dtype == F32
    assert_as_accurate_as_eager(problem, (y, grads))


@pytest.mark.parametrize("counts", [(), (0, 0)], ids=["no expert", "no row"])
def test_nothing_to_do(counts):
    """Rows that nobody owns, and no rows at all: zeros."""
    from peft_kernels.kernels.triton.lora_expert_linear import backward, forward

    e, m = len(counts), 0 if counts else 5
    x, grad_y, weight = torch.randn(m, 8), torch.randn(m, 6), torch.randn(e, 6, 8)
    a, b, bias, offsets = (
        torch.randn(e, 4, 8),
        torch.randn(e, 6, 4),
        torch.randn(e, 6),
        torch.zeros(e, dtype=torch.int32),
    )
    y, s = forward(x, weight, bias, a, b, offsets, 2.0, 0.0, None)
    grads = backward(grad_y, x, s, weight, a, b, offsets, 2.0, 0.0, None, (True,) * 5)
    assert [tuple(t.shape) for t in (y, *grads)] == [(m, 6), (m, 8), (e, 6, 8), (e, 6), (e, 4, 8), (e, 6, 4)]
    assert all(t.eq(0).all() for t in (y, s, *grads))


# Which rows belong to which expert.


@triton.jit
def _locate_all(offsets, out, M, E, steps, BLOCK_M: tl.constexpr):
    from_each = tl.program_id(0)
    expert, row, end = locate(from_each, offsets, M, E, steps, BLOCK_M)
    tl.store(out + from_each * 3 + 0, expert.to(tl.int64))
    tl.store(out + from_each * 3 + 1, row)
    tl.store(out + from_each * 3 + 2, end)


if _launch.INTERPRETED:
    from peft_kernels.kernels.triton._expert_rows import bisections, locate, tile_numbers


def _tiles(ends: list[int], m: int, block: int) -> list[tuple[int, int, int]]:
    """(expert, first row, row after the last) of every tile that has rows."""
    numbers = tile_numbers(m, len(ends), block)
    out, offsets = torch.empty(numbers, 3, dtype=torch.int64), torch.tensor(ends, dtype=torch.int32)
    _locate_all[(numbers,)](offsets, out, m, len(ends), bisections(len(ends)), BLOCK_M=block)
    return [(e, row, min(row + block, end)) for e, row, end in out.tolist() if row < end]


def test_each_row_has_one_tile_of_its_expert():
    chance = random.Random(3)
    for _ in range(12):
        experts, block = chance.choice((0, 1, 2, 3, 7, 8, 17)), chance.choice((16, 64))
        counts = [chance.choice((0, 0, 1, block - 1, block, 3 * block + 1)) for _ in range(experts)]
        ends = [sum(counts[: e + 1]) for e in range(experts)]
        m = sum(counts) + chance.choice((0, 1, block))
        owner = [e for e, count in enumerate(counts) for _ in range(count)] + [experts] * (m - sum(counts))
        found = sorted((row, e) for e, first, last in _tiles(ends, m, block) for row in range(first, last))
        assert found == list(enumerate(owner)), (counts, m, block)


@pytest.mark.parametrize("ends", [[30, 10, 20], [-5, 8, 20], [10, 2**31 - 1, 50], [-9, -9, -9]], ids=str)
def test_wrong_offsets_reach_no_other_memory(ends):
    """They cannot be checked without waiting for the GPU: results are wrong then, accesses are not."""
    tiles = _tiles(ends, 24, 16)
    assert all(0 <= first < last <= 24 and 0 <= e <= 3 for e, first, last in tiles)


# What the passes promise.


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_number_of_launches(arch, dropout_p, monkeypatch):
    """Two forward and four backward, the sums of partials not counted, whatever the experts' rows."""
    launched = record_launches(monkeypatch, run=False)
    problem = ExpertProblem((40, 0, 3, 25), 40, 72, 8, dtype=F16, dropout_p=dropout_p)
    problem.freeze_all_but("x", "lora_A", "lora_B")
    problem.run()
    assert [name for name in launched if name != "splitk_reduce"] == [
        "_expert_down_projection", "_expert_gemm", "_expert_down_projection", "_expert_gemm",
        "_expert_sum_over_rows", "_expert_sum_over_rows",
    ]  # fmt: skip


def test_stacks_that_tma_can_address_go_through_descriptors(monkeypatch):
    from peft_kernels.kernels.triton import _expert_gemm

    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    forms, fits = [], _expert_gemm._fits
    monkeypatch.setattr(_expert_gemm, "_fits", lambda x, w: forms.append(fits(x, w)) or forms[-1])
    problem = ExpertProblem((70, 5), 72, 136, 16, dtype=F16, orphans=4)
    expected = named(problem.run())
    assert forms == [True, True]
    weight = problem.tensors["weight"].detach()
    placed = torch.empty(weight.numel() + 1, dtype=F16)[1:].view(weight.shape).copy_(weight)
    forms.clear()
    misaligned = named(problem.run(weight=placed.requires_grad_()))
    assert forms == [False, False]
    for name, value in misaligned.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-3)


def _every_second(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.full([size * 2 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    every = (slice(None, None, 2),) * tensor.ndim
    wide[every] = tensor
    return wide[every]


def _in_poison(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the middle of a buffer of NaN, rows padded too."""
    *stack, rows, columns = tensor.shape
    buffer = torch.full((*stack, rows + 2, columns + 24), float("nan"), dtype=tensor.dtype)
    buffer[..., 1:-1, 16 : 16 + columns] = tensor
    return buffer[..., 1:-1, 16 : 16 + columns]


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.mT.contiguous().mT


def _for_layouts(dtype: torch.dtype) -> ExpertProblem:
    return ExpertProblem((19, 0, 4), 40, 24, 5, dtype=dtype, dropout_p=0.3, orphans=2)


@functools.cache
def _contiguous(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return named(_for_layouts(dtype).run())


@pytest.mark.parametrize(
    ("place", "dtype"), [(_transposed, F16), (_every_second, F16), (_in_poison, F16), (_in_poison, F32)]
)
def test_layouts(place, dtype, monkeypatch):
    """Every matrix laid out otherwise; nothing beyond the tails is read."""
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    problem, expected = _for_layouts(dtype), _contiguous(dtype)
    changes = {name: place(t.detach()).requires_grad_() for name, t in problem.tensors.items() if name != "bias"}
    problem.grad_y = place(problem.grad_y)
    for name, value in named(problem.run(**changes)).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_an_expert_that_is_broken_stays_alone(arch):
    """NaN and infinity in one expert's rows and matrices, and in rows that nobody owns, reach no other expert."""
    problem = ExpertProblem((20, 7, 40), 40, 24, 5, dtype=F16, orphans=6)
    y, grads = problem.run()
    broken = {name: t.detach().clone() for name, t in problem.tensors.items()}
    broken["x"][20:27] = broken["x"][67:] = float("nan")
    for name in ("weight", "lora_A", "lora_B", "bias"):
        broken[name][1] = float("inf")
    problem.grad_y[20:27] = problem.grad_y[67:] = float("nan")
    y_broken, grads_broken = problem.run(**{name: t.requires_grad_() for name, t in broken.items()})
    rows = [m for m in range(73) if not 20 <= m < 27]
    assert torch.equal(y_broken[rows], y[rows])
    assert torch.equal(grads_broken["x"][rows], grads["x"][rows])
    for name in ("weight", "lora_A", "lora_B", "bias"):
        assert torch.equal(grads_broken[name][[0, 2]], grads[name][[0, 2]]), name


def test_expanded_grad_and_shared_weights():
    """`.sum().backward()` sends gradients with strides (0, 0); one weight may serve all experts."""
    problem = ExpertProblem((19, 3), 33, 26, 5, dtype=F16)
    problem.grad_y = torch.ones(1, 1, dtype=F16).expand(22, 26)
    assert_as_accurate_as_eager(problem, problem.run())
    shared = problem.tensors["weight"].detach()[:1].expand(2, 26, 33)
    y, _ = problem.run(weight=shared)
    problem.tensors["weight"] = shared.contiguous()
    assert torch.equal(y, problem.run()[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_nothing_beyond_the_results_is_written(dropout_p, monkeypatch):
    guarded = []

    def empty(shape, dtype, device):
        buffer = torch.full((math.prod(shape) + 4096,), float("nan"), dtype=dtype, device=device)
        guarded.append(buffer[math.prod(shape) :])
        return buffer[: math.prod(shape)].view(shape)

    problem = ExpertProblem((21, 0, 6), 35, 37, 3, dropout_p=dropout_p, orphans=3)
    monkeypatch.setattr(torch, "empty", empty)
    result = named(problem.run())
    assert len(guarded) >= 7
    assert all(guard.isnan().all() for guard in guarded)
    assert not any(value.isnan().any() for value in result.values())


def test_a_program_writes_rows_of_its_own_expert_alone(arch, monkeypatch):
    """Others would race with it. In the interpreter, where programs follow each other, that shows when it is alone."""
    from peft_kernels.kernels.triton._expert_down_projection import expert_down_projection
    from peft_kernels.kernels.triton._expert_gemm import expert_gemm

    launch = _launch.launch

    def launch_one(kernel, grid, *arguments, **options):
        launch(kernel, (1,) * len(grid), *arguments, **options)

    monkeypatch.setattr(_launch, "launch", launch_one)
    offsets, x = torch.tensor([5, 40], dtype=torch.int32), torch.randn(40, 16, dtype=F16)
    s = expert_down_projection(x, torch.randn(2, 4, 16, dtype=F16), offsets)
    y = expert_gemm(x, torch.randn(2, 16, 16, dtype=F16), s, torch.randn(2, 4, 16, dtype=F16), offsets, 1.0)
    for out in (s, y):
        assert out[:5].isfinite().all()
        assert out[5:].isnan().all()


def test_experts_without_rows_get_zeros_and_so_do_rows_without_experts():
    problem = ExpertProblem((0, 12, 0), 33, 26, 5, dtype=F16, orphans=4)
    y, grads = problem.run()
    assert y[12:].eq(0).all()
    assert grads["x"][12:].eq(0).all()
    for name in ("weight", "bias", "lora_A", "lora_B"):
        assert grads[name][[0, 2]].eq(0).all()
        assert grads[name][1].ne(0).any()


def test_the_same_bits_run_to_run():
    problem = ExpertProblem((70, 0, 33), 40, 72, 8, dtype=F16, dropout_p=0.2, orphans=5)
    first, second = named(problem.run()), named(problem.run())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_splits_of_the_rows(monkeypatch):
    """Few experts with few columns: each expert's rows are split, unevenly filled splits and empty experts too."""
    launched = record_launches(monkeypatch)
    problem = ExpertProblem((200, 0, 1), 20, 24, 4, dtype=F16, dropout_p=0.3)
    problem.freeze_all_but("lora_A", "lora_B")
    assert_as_accurate_as_eager(problem, problem.run())
    assert launched[-4:] == ["_expert_sum_over_rows", "splitk_reduce"] * 2


def test_only_what_is_wanted_is_computed():
    problem = ExpertProblem((17, 0, 9), 41, 35, 6, dtype=F16, dropout_p=0.3)
    _, everything = problem.run()
    for wanted in ("x", "lora_A", "lora_B", "weight", "bias"):
        problem.freeze_all_but(wanted)
        _, grads = problem.run()
        assert list(grads) == [wanted]
        assert torch.equal(grads[wanted], everything[wanted])


# The mask, bit for bit: products with 0 and 1 are exact, so that each kernel shows the mask itself.

P, SEED = 0.3, torch.tensor([-987654321012345])
OFFSETS = torch.tensor([13, 13, 70], dtype=torch.int32)


@ARCH_AND_DTYPE
def test_mask_of_s(arch, dtype):
    from peft_kernels.kernels.triton._expert_down_projection import expert_down_projection

    x, one = torch.randn(70, 41).to(dtype), torch.eye(41, dtype=dtype).expand(3, 41, 41)
    assert torch.equal(expert_down_projection(x, one, OFFSETS, P, SEED), philox_dropout.forward(x, P, SEED))


@ARCH_AND_DTYPE
def test_mask_of_dx(arch, dtype):
    from peft_kernels.kernels.triton._expert_gemm import expert_gemm

    grad_y, weight = torch.zeros(70, 8, dtype=dtype), torch.zeros(3, 8, 160, dtype=dtype)
    ones = torch.ones(70, 1, dtype=dtype), torch.ones(3, 1, 160, dtype=dtype)
    mask = philox_dropout.forward(torch.ones(70, 160, dtype=dtype), P, SEED)
    assert torch.equal(expert_gemm(grad_y, weight, *ones, OFFSETS, 1.0, None, P, SEED), mask)


@ARCH_AND_DTYPE
def test_mask_of_da(arch, dtype):
    from peft_kernels.kernels.triton._expert_sum_over_rows import expert_sum_over_rows

    x, one = torch.randn(70, 41).to(dtype), torch.eye(70, dtype=dtype)
    dropped, grad_a = philox_dropout.forward(x, P, SEED), torch.zeros(3, 70, 41, dtype=dtype)
    grad_a[0, :13], grad_a[2, 13:] = dropped[:13], dropped[13:]
    assert torch.equal(expert_sum_over_rows(one, x, OFFSETS, 1.0, dtype, P, SEED), grad_a)


def test_everything_dropped():
    problem = ExpertProblem((11, 9), 33, 26, 5, dropout_p=1.0)
    y, grads = problem.run()
    t = problem.tensors
    base = [torch.nn.functional.linear(t["x"][rows], t["weight"][e], t["bias"][e]).detach()
            for e, rows in enumerate((slice(11), slice(11, 20)))]  # fmt: skip
    torch.testing.assert_close(y, torch.cat(base))
    assert grads["lora_A"].eq(0).all()
    assert grads["lora_B"].eq(0).all()


def _problem(**changes) -> Problem:
    return Problem("cpu", None, F16, F16, 64, 4, 8, 8, 4, False)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 513}, "rank 513 is above 512"),
        ({"dtype": torch.bfloat16}, "interpreter rounds to bfloat16 wrongly"),
        ({"adapter_dtype": torch.float64}, "float64 runs in PyTorch"),
        ({}, None),
    ],
)
def test_unsupported_says_why(changes, reason):
    found = lora_expert_linear.unsupported(_problem(**changes))
    assert found is None if reason is None else reason in found


def test_the_interpreter_is_never_chosen_by_itself():
    problem = ExpertProblem((4, 3))
    args, options = problem.arguments(problem.tensors)
    with use_backend(None):
        assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in explain("lora_expert_linear", *args, **options).rejected
