"""csrc/bitmap_linear.cu on a GPU: exact products, rows that do not depend on their batch, graphs, streams."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import _native, functional, use_backend
from peft_kernels.formats.bitmap import compress_bitmap
from peft_kernels.formats.mask import pack
from peft_kernels.kernels.cuda import _bitmap, sparse_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_native.why_not("_cuda") is not None, reason=str(_native.why_not("_cuda"))),
]
DTYPES = (torch.float16, torch.bfloat16)
# Of one panel and of several, walked and shared out in clusters; odd sizes; more strips than multiprocessors.
SHAPES = ((1, 1), (16, 256), (33, 700), (40, 65), (300, 9000), (20_000, 160), (512, 3420), (1024, 4096), (4096, 4096))


def drawn(n: int, k: int, density: float, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Small integers, of which sums of 9000 products are exact in float32."""
    draw = torch.Generator("cuda").manual_seed(seed)
    weight = torch.randint(-8, 9, (n, k), device="cuda", generator=draw)
    return (weight * (torch.rand(n, k, device="cuda", generator=draw) < density)).to(dtype)


def signs(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    draw = torch.Generator("cuda").manual_seed(2)
    return torch.randint(-1, 2, (m, k), device="cuda", generator=draw).to(dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ weight.double().t()
    return (y if bias is None else y + bias.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 7, 8])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_exact_products(density, m, dtype):
    for n, k in SHAPES:
        weight, x = drawn(n, k, density, dtype), signs(m, k, dtype)
        bias = torch.arange(n, device="cuda").remainder(7).to(dtype)
        packed = compress_bitmap(weight)
        assert torch.equal(packed.dense(), weight), (n, k)
        assert torch.equal(sparse_linear.forward(x, packed, None), exact(x, weight)), (n, k)
        assert torch.equal(sparse_linear.forward(x, packed, bias), exact(x, weight, bias)), (n, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_one_by_one(dtype):
    """Rows of the identity give W's columns: the bits of every weight, negative zeros apart."""
    draw = torch.Generator("cuda").manual_seed(3)
    for k in (96, 131, 600):
        weight = torch.randn(200, k, device="cuda", generator=draw).to(dtype)
        kept = torch.rand(200, k, device="cuda", generator=draw) < 0.4
        packed = compress_bitmap(weight, pack(kept))
        identity = torch.eye(k, device="cuda", dtype=dtype)
        columns = torch.cat([sparse_linear.forward(rows, packed, None) for rows in identity.split(8)])
        assert torch.equal(columns.t(), torch.where(kept, weight, 0)), k


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (4096, 14336), (512, 3420), (100, 131)], ids=str)
def test_a_row_does_not_depend_on_its_batch(shape):
    draw = torch.Generator("cuda").manual_seed(4)
    weight = torch.randn(*shape, device="cuda", generator=draw).bfloat16()
    packed = compress_bitmap(weight, pack(torch.rand(*shape, device="cuda", generator=draw) < 0.5))
    x = torch.randn(8, shape[1], device="cuda", generator=draw).bfloat16()
    whole = sparse_linear.forward(x, packed, None)
    assert torch.equal(whole, sparse_linear.forward(x, packed, None))
    for rows in (slice(0, 1), slice(5, 7), slice(3, 8)):
        assert torch.equal(sparse_linear.forward(x[rows], packed, None), whole[rows])


def test_uneven_masks_and_divisions():
    """Rows, columns and chunks that keep nothing; any number of panels."""
    weight, x = drawn(80, 2100, 1.0, torch.bfloat16), signs(5, 2100, torch.bfloat16)
    for part in ((slice(None, None, 3), slice(None)), (slice(None), slice(None, None, 2)), (slice(5, 6), slice(0, 4))):
        kept = torch.zeros_like(weight)
        kept[part] = weight[part]
        for panels in (1, 2, 3, 9):
            packed = compress_bitmap(kept, panels=panels)
            assert torch.equal(sparse_linear.forward(x, packed, None), exact(x, kept)), panels


@pytest.mark.parametrize("layout", ["rows", "columns", "offset", "expanded"])
def test_strides(layout):
    dtype = torch.bfloat16
    weight = drawn(70, 96, 0.5, dtype)
    x = {
        "rows": signs(16, 96, dtype)[::2],
        "columns": signs(96, 8, dtype).t(),
        "offset": signs(8, 101, dtype)[:, 3:99],
        "expanded": signs(1, 96, dtype).expand(8, 96),
    }[layout]
    assert torch.equal(sparse_linear.forward(x, compress_bitmap(weight), None), exact(x, weight))


def test_what_is_beside_x_is_not_used():
    """Columns past the weight's last, and rows past the last token, are NaN."""
    weight = drawn(64, 100, 1.0, torch.bfloat16)
    whole = torch.full((8, 128), float("nan"), device="cuda").bfloat16()
    whole[:3, :100] = signs(3, 100, torch.bfloat16)
    x = whole[:3, :100]
    assert torch.equal(sparse_linear.forward(x, compress_bitmap(weight), None), exact(x, weight))


def test_in_a_graph_without_waiting_for_the_host(no_host_sync):
    weight, x = drawn(4096, 4096, 0.3, torch.bfloat16), signs(4, 4096, torch.bfloat16)
    packed = compress_bitmap(weight)

    def call():
        with use_backend("cuda"):
            return functional.sparse_linear(x, packed)

    expected = call()
    assert torch.equal(expected, exact(x, weight))
    no_host_sync()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for _ in range(3):
        graph.replay()
    torch.cuda.set_sync_debug_mode(0)
    assert torch.equal(result, expected)


def test_streams():
    """Launches go to the current stream: work that is queued behind a long sleep sees what the sleep's stream wrote."""
    weight, stream = drawn(64, 128, 0.5, torch.bfloat16), torch.cuda.Stream()
    packed, x = compress_bitmap(weight), torch.zeros(2, 128, device="cuda").bfloat16()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        y = sparse_linear.forward(x, packed, None)
    torch.cuda.synchronize()
    assert torch.equal(y, exact(x, weight))


def test_many_launches_beside_each_other():
    """Blocks that walk panels in turn: a barrier or a range that is late would show as a wrong sum, seldom."""
    weight, x = drawn(4096, 14336, 0.5, torch.bfloat16), signs(1, 14336, torch.bfloat16)
    packed, expected = compress_bitmap(weight), exact(x, weight)
    for _ in range(200):
        assert torch.equal(sparse_linear.forward(x, packed, None), expected)


def test_what_it_cannot_launch_raises():
    packed = compress_bitmap(drawn(16, 64, 0.5, torch.bfloat16))
    x = torch.zeros(9, 64, device="cuda").bfloat16()
    plan = _bitmap._plan(x.device.index, *packed.numbers[:4])
    with pytest.raises(RuntimeError, match="CUDA error"):
        _bitmap.launch(x, packed, None, plan)
    with pytest.raises(RuntimeError, match="CUDA error"):
        _native.load("_cuda").bitmap_gpu(10_000)
    assert _bitmap.launch(x[:8], packed, None, plan).shape == (8, 16)
