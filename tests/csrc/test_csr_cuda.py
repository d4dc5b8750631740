"""csrc/csr_linear.cu on the host: whole products, block by block and thread by thread, by the functions that the device
compiles. Integers times 16-bit weights are summed exactly in float64 in any order."""

from __future__ import annotations

import contextlib
import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from peft_kernels.formats.csr import compress_csr
from peft_kernels.kernels.cuda import _csr, sparse_linear
from peft_kernels.ops.sparse_linear import Problem
from tests.csrc import csr_lanes
from tests.csrc.csr_lanes import Gpu, Lanes
from tests.csrc.test_bitmap_cuda import exact, pruned, signs

H200, A100, SMALL = Gpu(132, 232_448), Gpu(108, 166_912), Gpu(2, 101_376)
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    if csr_lanes.COMPILER is None:
        pytest.skip("no C++ compiler")
    return Lanes(tmp_path_factory.mktemp("csr_lanes"))


@pytest.mark.parametrize("gpu", [H200, SMALL], ids=["H200", "small"])
@pytest.mark.parametrize(
    ("n", "k", "density"),
    [(1, 1, 1), (16, 256, 0.5), (33, 700, 0.3), (70, 2501, 0.6), (600, 70, 0.05), (5, 3000, 0.01)],
)  # fmt: skip
def test_products(lanes, n, k, density, gpu):
    for m, dtype in ((1, BF16), (2, BF16), (3, F16), (8, BF16), (7, F16), (1, F16)):
        weight, x = pruned(n, k, density, dtype), signs(m, k, dtype)
        y, _ = lanes.linear(x, compress_csr(weight), gpu)
        assert torch.equal(y, exact(x, weight)), (m, dtype)


def test_every_division(lanes):
    """Rows that share a warp, that have one, that several share; one turn and many; rows of x in parts."""
    seen = set()
    for n, k, density, gpu in (
        (300, 40, 0.1, Gpu(1, 50_000)), (300, 100, 0.1, Gpu(1, 50_000)), (300, 300, 0.3, Gpu(1, 50_000)),
        (9, 2100, 0.5, Gpu(4, 50_000)), (5, 2600, 0.9, Gpu(1, 50_000)), (90, 900, 0.4, A100),
        (1, 4200, 1.0, Gpu(132, 50_000)), (50, 400, 0.5, Gpu(1, 50_000)),
    ):  # fmt: skip
        weight = pruned(n, k, density)
        for m in (1, 8):
            x = signs(m, k)
            y, plan = lanes.linear(x, compress_csr(weight), gpu)
            seen.add(plan)
            assert torch.equal(y, exact(x, weight)), plan
    assert {plan.lanes for plan in seen} == {8, 16, 32}
    assert {plan.parts for plan in seen} >= {1, 2, 4, 8}
    assert {plan.at_once for plan in seen} == {1, 4, 8}
    assert {min(3, -(-plan.tiles // plan.blocks)) for plan in seen} >= {1, 2, 3}


@pytest.mark.parametrize("kind", ["one row", "columns", "nothing", "last column", "alternate"])
def test_masks_that_are_uneven(lanes, kind):
    """A row that is far longer than the others, rows of nothing, a single column."""
    weight = pruned(48, 1100, 1.0)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    match kind:
        case "one row":
            kept[7] = True
        case "columns":
            kept[:, ::9] = True
        case "last column":
            kept[:, -1] = True
        case "alternate":
            kept[::3, :17] = True
    weight, x = weight * kept, signs(5, 1100)
    assert torch.equal(lanes.linear(x, compress_csr(weight), H200)[0], exact(x, weight))


def test_numbers_that_pad_meet_a_zero(lanes):
    """Whatever x holds in columns that a row does not keep, and whether its last column ends a pair, or 8, or not."""
    for k in (8, 15, 16, 17, 22):
        weight = torch.zeros(4, k, dtype=BF16)
        weight[0, 2], weight[2, k - 1] = 3, 1
        for m in (1, 3, 8):
            x = torch.full((m, k), torch.inf, dtype=BF16)
            x[:, 2], x[:, k - 1] = 1, 2
            y, _ = lanes.linear(x, compress_csr(weight), H200)
            assert torch.equal(y, torch.tensor([3.0, 0, 2, 0], dtype=torch.float64).expand(m, 4)), (k, m)


def test_columns_past_15_bits(lanes):
    weight = torch.zeros(3, 50_001, dtype=BF16)
    weight[0, [1, 32_767, 32_768, 50_000]] = torch.tensor([1.0, 2, 4, 8], dtype=BF16)
    for m in (1, 2):
        x = signs(m, 50_001)
        assert torch.equal(lanes.linear(x, compress_csr(weight), H200)[0], exact(x, weight))


def test_a_row_is_summed_in_the_same_order_whatever_its_batch(lanes):
    """Sums that rounding shows: of terms of all magnitudes."""
    draw = torch.Generator().manual_seed(1)
    weight = (torch.randn(6, 999, generator=draw) * 2.0 ** torch.randint(-30, 30, (6, 999), generator=draw)).bfloat16()
    x = torch.randn(8, 999, generator=draw).bfloat16()
    packed = compress_csr(weight)
    for gpu in (H200, Gpu(1, 232_448)):
        whole, _ = lanes.linear(x, packed, gpu)
        assert not torch.equal(whole, exact(x, weight))
        for rows in (slice(0, 1), slice(5, 7), slice(3, 8)):
            assert torch.equal(lanes.linear(x[rows], packed, gpu)[0], whole[rows])


def test_plans(lanes):
    """A plan covers the weight and fits the kernel; a large weight keeps every multiprocessor busy."""
    draw = random.Random(3)
    sizes = [(4096, 210_000), (14336, 735_000), (1024, 52_000), (128_256, 10**7), (1, 0), (17, 2**31 - 1)]
    sizes += [(draw.randint(1, 40_000), draw.randint(0, 10**6)) for _ in range(200)]
    for gpu in (H200, A100, SMALL):
        for n, groups in sizes:
            plan = lanes.plan(n, groups, gpu)
            assert plan.lanes in (8, 16, 32)
            assert plan.parts in (1, 2, 4, 8)
            assert plan.parts == 1 or plan.lanes == 32
            assert 4 <= plan.warps <= 32
            assert plan.warps % plan.parts == 0
            assert plan.rows == plan.warps // plan.parts * 32 // plan.lanes
            assert (plan.tiles - 1) * plan.rows < n <= plan.tiles * plan.rows
            assert plan.blocks == min(plan.tiles, gpu.multiprocessors)
            if gpu is H200 and n >= 1024:
                assert plan.blocks >= 120, (n, groups, plan)
    assert lanes.plan(4096, 210_000, H200)[:6] == (32, 1, 32, 32, 128, 128)


def test_blocks_ask_for_all_that_the_first_turn_reads(lanes):
    for n, groups in ((4096, 210_000), (14336, 735_000), (100, 6), (5, 10**6), (3, 0)):
        plan, spans = lanes.plan(n, groups, H200), lanes.ahead(n, groups, H200)
        first_turn = min(groups, plan.blocks * plan.rows * groups // n)
        assert all(0 <= begin <= end <= groups for begin, end in spans)
        asked = sum(end - begin for begin, end in spans)
        assert asked == first_turn or max(end - begin for begin, end in spans) == 4096
        assert all(mine[1] <= theirs[0] for mine, theirs in itertools.pairwise(spans))


def wanted(**changes) -> Problem:
    return Problem("cuda", 0, BF16, BF16, "csr", 0.1, 0, 1, 64, 64)._replace(**changes)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (wanted(device="cpu"), "for CUDA tensors"), (wanted(m=16), "at most 8 rows"), (wanted(n=0), "nothing to"),
        (wanted(k=65_536), "at most 65535 input features"), (wanted(dtype=torch.float32), "not in torch.float32"),
        (wanted(weight_dtype=F16), "of x's dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_it_says_what_it_cannot_compute(problem, reason):
    assert reason in sparse_linear.unsupported(problem)


def test_a_launch_takes_the_arguments_that_it_is_given(cuda, monkeypatch):
    """As far as the driver: a device that does not exist. What a block's shared memory does not hold is composed."""
    weight, calls, gpu = pruned(40, 90, 0.5), [], [cuda.CsrGpu(132, 232_448)]
    native = SimpleNamespace(
        csr_gpu=lambda device: gpu[0], csr_plan=cuda.csr_plan, csr_rows_at_once=cuda.csr_rows_at_once,
        csr_linear=lambda _, *rest: calls.append(rest),
    )  # fmt: skip
    monkeypatch.setattr(_csr._native, "load", lambda part: native)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))

    def forget() -> None:
        for cached in (_csr._plan, _csr._rows_at_once, _csr._gpu):
            cached.cache_clear()

    forget()
    packed, x = compress_csr(weight), signs(3, 90)
    assert sparse_linear.forward(x, packed, torch.zeros(40, dtype=BF16)).shape == (3, 40)
    assert len(calls) == 1
    assert calls[0][9:11] == (3, 4)
    with pytest.raises(RuntimeError, match="CUDA error"):
        cuda.csr_linear(10_000, *calls[0])
    gpu[0] = cuda.CsrGpu(132, 300)
    forget()
    assert torch.equal(sparse_linear.forward(x, packed, None), torch.nn.functional.linear(x, weight))
    assert len(calls) == 1
    forget()
