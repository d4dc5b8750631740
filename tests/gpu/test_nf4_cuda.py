"""csrc/nf4_linear.cu on a GPU: exact products, rows that do not depend on their batch, graphs, streams."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import _native, functional, use_backend
from peft_kernels.kernels.cuda import nf4_linear, nf4_lora_linear
from peft_kernels.kernels.reference import lora_linear, nf4_dequantize
from tests.helpers import relative_error
from tests.problems.nf4 import PARTS, part_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_native.why_not("_cuda") is not None, reason=str(_native.why_not("_cuda"))),
]
DTYPES = (torch.float16, torch.bfloat16)
# The last two are divided over clusters; 20,000 rows are more tiles than multiprocessors.
SHAPES = ((1, 1), (16, 64), (33, 96), (40, 65), (300, 257), (20_000, 160), (512, 3420), (4096, 1024))


def signs(m: int, k: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(-1, 2, (m, k), device="cuda", generator=draw).to(dtype)


def of_units(part: str, n: int, k: int, **options):
    """A weight whose absmax are all 1: sums of up to 4096 of its numbers times -1, 0 and 1 are exact in float32."""
    q = part_of(part, n, k, nested=False, device="cuda", **options)
    return q._replace(absmax=torch.ones_like(q.absmax))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("part", PARTS)
def test_exact_products(part, m, dtype):
    for n, k in SHAPES:
        q, x = of_units(part, n, k)._replace(dtype=dtype), signs(m, k, dtype)
        bias = torch.arange(n, device="cuda").remainder(7).to(dtype)
        weight = nf4_dequantize.forward(q).double()
        assert torch.equal(nf4_linear.forward(x, q, None), (x.double() @ weight.t()).to(dtype)), (n, k)
        expected = (x.double() @ weight.t() + bias.double()).to(dtype)
        assert torch.equal(nf4_linear.forward(x, q, bias), expected), (n, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
def test_weights_one_by_one(blocksize, nested, dtype):
    """Rows of the identity give W's columns: the bits of every weight, negative zeros apart."""
    for k in (96, 100, 131, 512):
        q = part_of("rows", 200, k, blocksize=blocksize, nested=nested, dtype=dtype, device="cuda")
        identity = torch.eye(k, device="cuda", dtype=dtype)
        columns = torch.cat([nf4_linear.forward(rows, q, None) for rows in identity.split(16)])
        assert torch.equal(columns.t(), nf4_dequantize.forward(q)), k


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096), (512, 3420), (100, 131)], ids=str)
def test_a_row_does_not_depend_on_its_batch(shape):
    q = part_of("whole", *shape, device="cuda")
    x = torch.randn(16, shape[1], device="cuda").bfloat16()
    whole = nf4_linear.forward(x, q, None)
    assert torch.equal(whole, nf4_linear.forward(x, q, None))
    for rows in (slice(0, 1), slice(5, 7), slice(3, 11), slice(2, 15)):
        assert torch.equal(nf4_linear.forward(x[rows], q, None), whole[rows])


@pytest.mark.parametrize("layout", ["rows", "columns", "offset", "expanded"])
def test_strides(layout):
    q = of_units("whole", 70, 96)
    x = {
        "rows": signs(16, 96, torch.bfloat16)[::2],
        "columns": signs(96, 8, torch.bfloat16).t(),
        "offset": signs(8, 101, torch.bfloat16)[:, 3:99],
        "expanded": signs(1, 96, torch.bfloat16).expand(8, 96),
    }[layout]
    weight = nf4_dequantize.forward(q._replace(dtype=torch.bfloat16)).double()
    assert torch.equal(nf4_linear.forward(x, q, None), (x.double() @ weight.t()).bfloat16())


def test_more_elements_than_32_bits_count(needs_memory):
    needs_memory(6 << 30)
    n, k = 2**33 // 4096 + 8, 4096
    q = part_of("whole", 64, k, device="cuda")
    packed = torch.zeros(n * k // 2, dtype=torch.uint8, device="cuda")
    absmax = torch.zeros(n * k // 64, dtype=torch.uint8, device="cuda")
    groups = torch.ones(-(-absmax.numel() // 256), device="cuda")
    packed[-q.packed.numel() :], absmax[-q.absmax.numel() :] = q.packed, q.absmax
    whole = q._replace(packed=packed, absmax=absmax, nested_absmax=groups, shape=torch.Size((n, k)))
    last, x = whole.rows(n - 64, n), torch.randn(4, k, device="cuda").bfloat16()
    alone = q._replace(nested_absmax=torch.ones_like(q.nested_absmax))
    assert torch.equal(nf4_linear.forward(x, last, None), nf4_linear.forward(x, alone, None))


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("r", [1, 16, 65])
@pytest.mark.parametrize("m", [1, 5, 16])
def test_low_rank(m, r, adapter_dtype):
    for n, k in ((300, 257), (1024, 4096), (70, 96)):
        q, x = part_of("whole", n, k, device="cuda"), torch.randn(m, k, device="cuda").bfloat16()
        a, b = (torch.randn(shape, device="cuda").to(adapter_dtype) / 8 for shape in ((r, k), (n, r)))
        bias = torch.randn(n, device="cuda").bfloat16()
        y, s = nf4_lora_linear.forward(x, q, bias, a, b, 0.7, 0.0, None)
        weight = nf4_dequantize.forward(q._replace(dtype=torch.bfloat16))
        low, high = (t.bfloat16() for t in (a, b))
        truth = lora_linear.forward(*(t.double() for t in (x, weight, bias, low, high)), 0.7, 0.0, None)
        eager = lora_linear.forward(x, weight, bias, low, high, 0.7, 0.0, None)
        for got, exact, other in zip((y, s), truth, eager, strict=True):
            assert relative_error(got, exact) <= max(1.2 * relative_error(other, exact), 2**-9), (n, k)
        alone = [nf4_lora_linear.forward(row, q, bias, a, b, 0.7, 0.0, None)[0] for row in x.split(1)]
        assert torch.equal(torch.cat(alone), y)


def test_in_a_graph_without_waiting_for_the_host(no_host_sync):
    q, x = part_of("whole", 4096, 1024, device="cuda"), torch.randn(4, 1024, device="cuda").bfloat16()
    a, b = torch.randn(16, 1024, device="cuda").bfloat16(), torch.randn(4096, 16, device="cuda").bfloat16()

    def call():
        with use_backend("cuda"):
            return functional.nf4_linear(x, q), functional.nf4_lora_linear(x, q, a, b)

    expected = call()
    no_host_sync()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(3):
        graph.replay()
    torch.cuda.set_sync_debug_mode(0)
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)


def test_the_low_rank_launches_follow_each_other():
    """The second launch starts beside the first, and still finds all of S: a first that takes long (many rows of A), in
    a loop in which memory is taken again at once."""
    q, x = part_of("whole", 512, 4096, device="cuda"), torch.randn(16, 4096, device="cuda").bfloat16()
    a, b = torch.randn(512, 4096, device="cuda").bfloat16(), torch.randn(512, 512, device="cuda").bfloat16()
    expected = nf4_lora_linear.forward(x, q, None, a, b, 1.0, 0.0, None)[0].clone()
    for _ in range(200):
        assert torch.equal(nf4_lora_linear.forward(x, q, None, a, b, 1.0, 0.0, None)[0], expected)


def test_streams():
    """Launches go to the current stream: work that is queued behind a long sleep sees what the sleep's stream wrote."""
    q, x, stream = of_units("whole", 64, 128), torch.zeros(2, 128, device="cuda").bfloat16(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        y = nf4_linear.forward(x, q, None)
    torch.cuda.synchronize()
    weight = nf4_dequantize.forward(q._replace(dtype=torch.bfloat16)).double()
    assert torch.equal(y, (x.double() @ weight.t()).bfloat16())


def test_what_it_cannot_launch_raises():
    module, q = _native.load("_cuda"), of_units("whole", 16, 64)
    x = torch.zeros(17, 64, device="cuda").bfloat16()
    with pytest.raises(RuntimeError, match="CUDA error"):
        nf4_linear.launch(x, q, None)
    with pytest.raises(RuntimeError, match="CUDA error"):
        module.nf4_clusters(10_000)
    assert nf4_linear.launch(x[:16], q, None).shape == (16, 16)
