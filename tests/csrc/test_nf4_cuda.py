"""csrc/nf4_linear.cu on the host: every byte decoded, where each lane finds its elements, and whole products.

The functions are those that the device compiles; a warp's lanes run one after another (nf4_lanes.cpp)."""

from __future__ import annotations

import contextlib
import mmap
import random
from types import SimpleNamespace

import pytest
import torch

from peft_kernels.formats.nf4 import BLOCKSIZES, CODE, NF4Weight, dynamic_map
from peft_kernels.kernels.cuda import nf4_linear, nf4_lora_linear
from peft_kernels.kernels.reference import nf4_dequantize
from peft_kernels.ops.nf4_linear import Problem
from tests.csrc import nf4_lanes
from tests.csrc.nf4_lanes import ANY, FORMS, NESTED, PLAIN, Lanes
from tests.problems.nf4 import PARTS, part_of

DTYPES = (torch.bfloat16, torch.float16)

# Clusters of 1, 2, 4 and 8 blocks at once: an H200, an A100 without any, GPUs so small that blocks walk several tiles.
GPUS = {"H200": (132, 66, 33, 16), "A100": (108, 0, 0, 0), "small": (4, 2, 1, 0), "single": (1, 0, 0, 0)}


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    if nf4_lanes.COMPILER is None:
        pytest.skip("no C++ compiler")
    return Lanes(tmp_path_factory.mktemp("lanes"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, except that any NaN equals any other."""
    return bool(((a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_byte_at_every_kind_of_absmax(lanes, dtype, form):
    special = [0.0, -0.0, 1.0, -1.0, 1e-45, -3e-39, 1.2e-38, 6e-8, 7e-5, 65504.0, 65519.9, 65520.0, 1e30, 3.4e38]
    special += [float("inf"), float("-inf"), float("nan")]
    random = torch.randn(83, generator=torch.Generator().manual_seed(1)).exp().tolist()
    absmax = torch.tensor(special + random)
    rows = torch.arange(256, dtype=torch.uint8).repeat(len(absmax))
    q = NF4Weight(rows, absmax, None, None, None, torch.Size((len(absmax), 512)), dtype, 512)
    got, kind = lanes.weights(q, dtype, form)
    assert kind == (ANY if form == "any" else PLAIN)
    codes = torch.tensor(CODE)[torch.stack((rows >> 4, rows & 15), 1).long()].view(len(absmax), 512)
    expected = (codes * absmax.unsqueeze(1)).to(dtype)
    assert same_bits(got, expected)
    assert got.unique().numel() > 500


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_double_quantisation_rounds_twice(lanes, dtype):
    """Every index of the map under groups and offsets for which one rounding gives another absmax; weights of an absmax
    that is off by a bit differ in float32, and in a 16-bit type seldom: many are compared."""
    draw = torch.Generator().manual_seed(2)
    n, k, blocksize = 2048, 512, 32
    blocks = n * k // blocksize
    packed = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, generator=draw)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=draw)
    groups = torch.rand(blocks // 256, generator=draw) * 3
    q = NF4Weight(packed, absmax, groups, dynamic_map(), torch.tensor(0.7311), torch.Size((n, k)), dtype, blocksize)
    got, kind = lanes.weights(q, dtype)
    assert kind == NESTED
    assert same_bits(got, nf4_dequantize.forward(q))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("k", [1, 7, 32, 65, 96, 100, 128, 160, 3420])
def test_where_elements_are(lanes, k, part, nested):
    for blocksize, n in ((32, 40), (64, 17), (128, 33), (4096, 5)):
        q = part_of(part, n, k, blocksize=blocksize, nested=nested, dtype=torch.bfloat16)
        expected = nf4_dequantize.forward(q)
        got, kind = lanes.weights(q, torch.bfloat16, "planes")
        assert same_bits(got, expected), (n, blocksize)
        if part in ("whole", "rows"):
            assert (kind != ANY) == (k % 32 == 0)
        assert same_bits(lanes.weights(q, torch.bfloat16, "any")[0], expected), (n, blocksize)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(lanes, blocksize):
    for k in (96, 3424, 131):
        q = part_of("rows", 50, k, blocksize=blocksize, dtype=torch.float16)
        assert same_bits(lanes.weights(q, torch.float16)[0], nf4_dequantize.forward(q)), k


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_packed_bytes_at_any_address(lanes, offset):
    """Bytes that begin anywhere; the words at both ends are there in part."""
    q = part_of("whole", 9, 77, dtype=torch.bfloat16)
    storage = torch.zeros(q.packed.numel() + 8, dtype=torch.uint8)
    storage[offset : offset + q.packed.numel()] = q.packed
    moved = q._replace(packed=storage[offset : offset + q.packed.numel()])
    assert same_bits(lanes.weights(moved, torch.bfloat16)[0], nf4_dequantize.forward(q))


@pytest.mark.parametrize(
    ("blocksize", "first", "zeros", "absmax"),
    [(64, 0, (0, 50), (1e30, 1e30)), (64, 14, (0, 0), (1.0, 1e30)), (32, 0, (32, 50), (1.0, 1e30, 1e30, 1e30))],
    ids=["in-its-block", "in-the-next", "in-its-second-block"],
)
def test_what_follows_a_row_does_not_reach_it(lanes, blocksize, first, zeros, absmax):
    """Past a row's end x counts as 0, but 0 times infinity would be NaN: here weights that overflow float16 follow the
    row, whose own weights in their block are 0."""
    codes = torch.full((128,), 15, dtype=torch.uint8)
    codes[slice(*zeros)] = 7
    packed, shape = codes[::2] << 4 | codes[1::2], torch.Size((1, 50))
    q = NF4Weight(packed, torch.tensor(absmax), None, None, None, shape, torch.float16, blocksize, first)
    weight = nf4_dequantize.forward(q)
    assert weight.isfinite().all()
    assert nf4_dequantize.forward(q._replace(shape=torch.Size((1, 64)))).isinf().any()
    y = lanes.linear(torch.ones(1, 50, dtype=torch.float16), q, lanes.plan(1, 50, GPUS["H200"]))
    assert float(y) == float(weight.double().sum())


def anonymous(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of which only what is touched takes memory."""
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)


@pytest.mark.parametrize("k", [4096, 4100, 4099], ids=["aligned", "bytes", "odd"])
def test_more_elements_than_32_bits_count(lanes, k):
    """The last rows of 2**33 elements and more."""
    n = 2**33 // k + 9
    draw = torch.Generator().manual_seed(3)
    packed, absmax = anonymous((n * k + 1) // 2, torch.uint8), anonymous(-(-n * k // 64), torch.uint8)
    groups = anonymous(-(-absmax.numel() // 256), torch.float32)
    packed[-20 * k :] = torch.randint(0, 256, (20 * k,), dtype=torch.uint8, generator=draw)
    absmax[-k:] = torch.randint(0, 256, (k,), dtype=torch.uint8, generator=draw)
    groups[-64:] = torch.rand(64, generator=draw) + 0.5
    q = NF4Weight(packed, absmax, groups, dynamic_map(), torch.tensor(0.25), torch.Size((n, k)), torch.bfloat16, 64)
    last = q.rows(n - 35, n)
    expected = nf4_dequantize.forward(last)
    assert expected.unique().numel() > 1000
    got, kind = lanes.weights(last, torch.bfloat16)
    assert (kind == NESTED) == (k == 4096)
    assert same_bits(got, expected)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    ("n", "k", "blocksize", "part"),
    [
        (16, 64, 64, "whole"), (33, 96, 64, "whole"), (200, 128, 32, "rows"), (65, 512, 64, "expert"),
        (3, 20, 64, "whole"), (40, 1055, 128, "columns"), (300, 257, 4096, "corner"), (130, 1152, 64, "whole"),
    ],
)  # fmt: skip
def test_products(lanes, n, k, blocksize, part, gpu):
    """Exactly the product: sums of small integers times 16-bit weights are exact in float64 in any order."""
    plan = lanes.plan(n, k, GPUS[gpu])
    q = part_of(part, n, k, blocksize=blocksize, dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(4)
    for m, dtype in ((1, torch.bfloat16), (5, torch.float16), (16, torch.bfloat16)):
        x = torch.randint(-8, 9, (m, k), generator=draw).to(dtype)
        weight = nf4_dequantize.forward(q._replace(dtype=dtype))
        expected = x.double() @ weight.double().t()
        assert torch.equal(lanes.linear(x, q, plan), expected), (m, plan)
    assert torch.equal(lanes.linear(x, q, plan, "any"), expected)


def test_every_division(lanes):
    """Whatever the plan, each product is taken once: groups, units and splits in all combinations."""
    n, k, m = 150, 1100, 3
    q = part_of("whole", n, k, dtype=torch.bfloat16)
    x = torch.randint(-8, 9, (m, k), generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = x.double() @ nf4_dequantize.forward(q).double().t()
    for groups in (1, 2, 4, 8):
        for units in {groups, groups + 1, 2 * groups + 1, 4 * groups}:
            for splits in (1, 2, 4, 8):
                if units > min(16, 4 * groups):
                    continue
                steps, tiles = -(-k // 128), -(-n // (16 * units))
                for clusters in {1, 2, tiles}:
                    blocks = splits * min(clusters, tiles)
                    plan = [units, groups, splits, steps, -(-steps // splits), tiles, blocks]
                    assert torch.equal(lanes.linear(x, q, plan), expected), plan


def test_plans(lanes):
    """A plan covers the weight and fits the kernel's limits; the multiprocessors have not much more to do than their
    share of a large weight."""
    draw = random.Random(6)
    sizes = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (128256, 4096), (1, 1), (17, 100000)]
    sizes += [(draw.randint(1, 40000), draw.randint(1, 40000)) for _ in range(200)]
    for gpu, clusters in GPUS.items():
        for n, k in sizes:
            units, groups, splits, steps, steps_per_split, tiles, blocks = lanes.plan(n, k, clusters)
            at_once = clusters[splits.bit_length() - 1]
            assert groups <= units <= min(16, 4 * groups)
            assert 8 % groups == 0
            assert at_once > 0
            assert steps == -(-k // 128)
            assert (splits - 1) * steps_per_split < steps <= splits * steps_per_split
            assert (tiles - 1) * units * 16 < n <= tiles * units * 16
            assert blocks == splits * min(tiles, at_once)
            if gpu in ("H200", "A100") and n * k >= 2**24:
                share = -(-tiles // at_once) * units * steps_per_split * 2048
                assert share * clusters[0] < (1.5 if gpu == "H200" else 2) * n * k, (n, k)


def test_sizes_that_the_indices_do_not_hold(lanes):
    q = part_of("whole", 4, 64, dtype=torch.bfloat16)
    for changed in (q._replace(row_stride=2**31), q._replace(first=2**37)):
        code = lanes.library.nf4_weights(1, nf4_lanes.layout(changed), nf4_lanes.tensors(changed), 0, 0, None)
        assert code == -1


def wanted(m: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Problem:
    return Problem(device, 0, dtype, m, n, k, 64, True)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (wanted(1, 64, 64, device="cpu"), "for CUDA tensors"), (wanted(32, 64, 64), "at most 16 rows"),
        (wanted(1, 64, 64, torch.float32), "not in torch.float32"), (wanted(0, 64, 64), "nothing to compute"),
        (wanted(1, 2**31, 64), "a side of the weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_it_says_what_it_cannot_compute(problem, reason):
    assert reason in nf4_linear.unsupported(problem)


def test_rows_that_begin_at_multiples_of_16_bytes():
    for x in (torch.randn(4, 3420), torch.randn(5, 97)[:, 1:], torch.randn(8, 3).t(), torch.randn(1, 64).expand(3, 64)):
        x = x.bfloat16()
        got = nf4_linear.aligned_rows(x)
        assert torch.equal(got, x)
        assert got.data_ptr() % 16 == 0
        assert got.stride(0) % 8 == 0
        assert nf4_linear.aligned_rows(got) is got


def test_launches_take_the_arguments_that_they_are_given(cuda, monkeypatch):
    """As far as the driver: a device that does not exist."""
    x, q = torch.zeros(3, 96, dtype=torch.bfloat16), part_of("whole", 40, 96)
    calls = []
    native = SimpleNamespace(
        nf4_clusters=lambda device: [132, 66, 33, 16],
        nf4_plan=cuda.nf4_plan,
        nf4_linear=lambda _, *rest: calls.append((cuda.nf4_linear, rest)),
        lora_down=lambda _, *rest: calls.append((cuda.lora_down, rest)),
    )
    monkeypatch.setattr(nf4_linear._native, "load", lambda part: native)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(nf4_linear, "plan", lambda device, n, k: cuda.nf4_plan(n, k, [132, 66, 33, 16]))
    nf4_linear.forward(x, q, torch.zeros(40, dtype=torch.bfloat16))
    a, b = torch.zeros(16, 96, dtype=torch.bfloat16), torch.zeros(40, 16, dtype=torch.bfloat16)
    y, s = nf4_lora_linear.forward(x, q, None, a, b, 1.0, 0.0, None)
    assert (y.shape, s.shape) == ((3, 40), (3, 16))
    assert [function.__name__ for function, _ in calls] == ["nf4_linear", "lora_down", "nf4_linear"]
    for function, arguments in calls:
        with pytest.raises(RuntimeError, match="CUDA error"):
            function(10_000, *arguments)
