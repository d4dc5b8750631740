"""csrc/bitmap_linear.cu on the host: whole products, block by block and lane by lane, by the functions that the device
compiles. Integers times 16-bit weights are summed exactly in float64 in any order."""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace

import pytest
import torch

from peft_kernels.formats.bitmap import chunks_of_panel, compress_bitmap, panels_of
from peft_kernels.kernels.cuda import _bitmap, _operands, sparse_linear
from peft_kernels.ops.sparse_linear import Problem
from tests.csrc import bitmap_lanes
from tests.csrc.bitmap_lanes import Gpu, Lanes

H200, A100, SMALL, SINGLE = (
    Gpu(132, 229_888, True),
    Gpu(108, 163_840, False),
    Gpu(2, 98_304, True),
    Gpu(1, 98_304, False),
)


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    if bitmap_lanes.COMPILER is None:
        pytest.skip("no C++ compiler")
    return Lanes(tmp_path_factory.mktemp("bitmap_lanes"))


def pruned(n: int, k: int, density: float, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=draw)
    return (weight * (torch.rand(n, k, generator=draw) < density)).to(dtype)


def signs(m: int, k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randint(-8, 9, (m, k), generator=torch.Generator().manual_seed(2)).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().t()


@pytest.mark.parametrize("gpu", [H200, A100, SMALL, SINGLE], ids=["H200", "A100", "small", "single"])
@pytest.mark.parametrize(
    ("n", "k", "density"), [(1, 1, 1), (16, 256, 0.5), (33, 700, 0.3), (70, 4500, 0.1), (40, 515, 1), (5, 3000, 0.01)]
)
def test_products(lanes, n, k, density, gpu):
    for m, dtype in ((1, torch.bfloat16), (8, torch.float16)):
        weight, x = pruned(n, k, density, dtype), signs(m, k, dtype)
        assert torch.equal(lanes.linear(x, compress_bitmap(weight), gpu), exact(x, weight)), (m, dtype)


def test_every_division(lanes):
    """Panels of any width, walked by a block or shared out in a cluster, one strip in a block or several."""
    weight, seen = pruned(50, 4 * 256 + 3, 0.4), set()
    x = signs(3, weight.shape[1])
    expected = exact(x, weight)
    for panels in (1, 2, 3, 5):
        bitmap = compress_bitmap(weight, panels=panels)
        for gpu in (H200, Gpu(1, 98_304, True), Gpu(2, 98_304, True), SINGLE):
            plan = lanes.plan(bitmap.numbers, gpu)
            seen.add(tuple(plan[2:6]))
            assert torch.equal(lanes.linear(x, bitmap, gpu), expected), plan
    turns, widths, groups, splits = (set(column) for column in zip(*seen, strict=True))
    assert turns == {1, 2}
    assert widths >= {1, 2, 3, 5}
    assert groups >= {1, 2, 4}
    assert splits >= {1, 2, 4}


@pytest.mark.parametrize("kind", ["rows", "columns", "one lane", "nothing", "first chunk", "last chunk"])
def test_masks_that_are_uneven(lanes, kind):
    """A panel as long as its longest stream, or without slots; strips without weights."""
    weight = pruned(48, 1100, 1.0)
    kept = torch.zeros_like(weight, dtype=torch.bool)
    match kind:
        case "rows":
            kept[::3] = True
        case "columns":
            kept[:, ::2] = True
        case "one lane":
            kept[3, :].view(-1, 4)[::8] = True
        case "first chunk":
            kept[:, :256] = True
        case "last chunk":
            kept[:, 1024:] = True
    weight, x = weight * kept, signs(2, 1100)
    assert torch.equal(lanes.linear(x, compress_bitmap(weight), H200), exact(x, weight))


def test_plans(lanes):
    """A plan covers the weight and fits the kernel; a large weight keeps every multiprocessor busy."""
    draw = random.Random(3)
    sizes = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (128_256, 4096), (1, 1), (17, 100_000)]
    sizes += [(draw.randint(1, 40_000), draw.randint(1, 40_000)) for _ in range(200)]
    for gpu in (H200, A100, SMALL, SINGLE):
        for n, k in sizes:
            panels = panels_of(n, k)
            plan = lanes.plan([n, k, panels, 500], gpu)
            assert (plan.strips, plan.chunks) == (-(-n // 16), -(-k // 256))
            in_panel = chunks_of_panel(plan.chunks, panels)
            assert (plan.width - 1) * plan.turns < in_panel <= plan.width * plan.turns
            assert (panels - 1) * in_panel < plan.chunks <= panels * in_panel
            assert plan.groups * plan.width <= 8
            assert plan.threads == 32 * plan.groups * plan.width
            assert plan.splits <= min(8, panels)
            assert plan.splits == 1 or gpu.clusters
            assert (plan.tiles - 1) * plan.groups < plan.strips <= plan.tiles * plan.groups
            assert plan.shared_bytes >= plan.groups * 500 * 128
            if gpu is H200 and n * k >= 2**22:
                assert plan.tiles * plan.splits >= 100, (n, k)


def test_a_plan_needs_no_more_shared_memory_than_a_dense_weight(lanes):
    """The most that a panel can have: four weights in 16 columns for each stream."""
    weight = pruned(16, 4096, 1.0)
    bitmap = compress_bitmap(weight, panels=1)
    assert bitmap.most_slots == 1024
    assert lanes.plan(bitmap.numbers, H200).shared_bytes == 131_072
    assert torch.equal(lanes.linear(signs(1, 4096), bitmap, H200), exact(signs(1, 4096), weight))


def test_weights_that_the_kernel_does_not_hold(lanes):
    for numbers in ([2**31, 64, 1, 1], [64, 2**31, 2**19, 1], [16, 8192, 1, 1], [16, 512, 3, 1], [16, 256, 1, 1025]):
        assert lanes.plan(numbers, H200) is None, numbers


def wanted(**changes) -> Problem:
    return Problem("cuda", 0, torch.bfloat16, torch.bfloat16, "bitmap", 0.5, 0, 1, 64, 64)._replace(**changes)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (wanted(device="cpu"), "for CUDA tensors"), (wanted(layout="block"), "for layouts 'bitmap' and 'csr'"),
        (wanted(m=16), "at most 8 rows"), (wanted(m=0), "nothing to compute"),
        (wanted(n=2**31), "a side of the weight"),
        (wanted(dtype=torch.float32), "not in torch.float32"), (wanted(weight_dtype=torch.float16), "of x's dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_it_says_what_it_cannot_compute(problem, reason):
    assert reason in sparse_linear.unsupported(problem)


def test_rows_end_with_zeros_at_a_multiple_of_8_columns():
    for x in (torch.randn(4, 3420), torch.randn(5, 97)[:, 1:], torch.randn(8, 3).t(), torch.randn(1, 64).expand(3, 64)):
        x = x.bfloat16()
        got = _operands.padded_rows(x)
        assert torch.equal(got[:, : x.shape[1]], x)
        assert not got[:, x.shape[1] :].any()
        assert got.shape[1] % 8 == got.stride(0) % 8 == got.data_ptr() % 16 == 0


def test_a_launch_takes_the_arguments_that_it_is_given(cuda, monkeypatch):
    """As far as the driver: a device that does not exist. What a block's shared memory does not hold is composed."""
    x, weight, calls = torch.zeros(3, 90, dtype=torch.bfloat16), pruned(40, 90, 0.5), []
    gpu = [cuda.BitmapGpu(132, 229_888, True)]
    native = SimpleNamespace(
        bitmap_gpu=lambda device: gpu[0], bitmap_plan=cuda.bitmap_plan,
        bitmap_linear=lambda _, *rest: calls.append(rest),
    )  # fmt: skip
    monkeypatch.setattr(_bitmap._native, "load", lambda part: native)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    for cached in (_bitmap._plan, _bitmap._gpu):
        cached.cache_clear()
    bitmap = compress_bitmap(weight)
    assert sparse_linear.forward(x, bitmap, torch.zeros(40, dtype=torch.bfloat16)).shape == (3, 40)
    assert len(calls) == 1
    with pytest.raises(RuntimeError, match="CUDA error"):
        cuda.bitmap_linear(10_000, *calls[0])
    gpu[0] = cuda.BitmapGpu(132, 1000, True)
    for cached in (_bitmap._plan, _bitmap._gpu):
        cached.cache_clear()
    x = signs(3, 90)
    assert torch.equal(sparse_linear.forward(x, bitmap, None), torch.nn.functional.linear(x, weight))
    assert len(calls) == 1
    for cached in (_bitmap._plan, _bitmap._gpu):
        cached.cache_clear()
