"""csrc/csr_linear.cu on a GPU: exact products, rows that do not depend on their batch, graphs, streams."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import _native, functional, use_backend
from peft_kernels.formats.csr import compress_csr
from peft_kernels.formats.mask import pack
from peft_kernels.kernels.cuda import _csr, sparse_linear
from tests.gpu.test_bitmap_cuda import drawn, exact, signs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_native.why_not("_cuda") is not None, reason=str(_native.why_not("_cuda"))),
]
DTYPES = (torch.float16, torch.bfloat16)
# Rows that share a warp, that have one, that several share; odd sizes; one turn of the blocks and many; rows of x that
# are taken in parts.
SHAPES = ((1, 1), (16, 256), (33, 700), (40, 65), (300, 9000), (40_000, 160), (512, 3420), (4096, 4096), (64, 40_000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 8])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_exact_products(density, m, dtype):
    for n, k in SHAPES:
        weight, x = drawn(n, k, density, dtype), signs(m, k, dtype)
        bias = torch.arange(n, device="cuda").remainder(7).to(dtype)
        packed = compress_csr(weight)
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
        packed = compress_csr(weight, pack(kept))
        identity = torch.eye(k, device="cuda", dtype=dtype)
        columns = torch.cat([sparse_linear.forward(rows, packed, None) for rows in identity.split(8)])
        assert torch.equal(columns.t(), torch.where(kept, weight, 0)), k


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (4096, 14336), (512, 3420), (100, 131)], ids=str)
def test_a_row_does_not_depend_on_its_batch(shape):
    draw = torch.Generator("cuda").manual_seed(4)
    weight = torch.randn(*shape, device="cuda", generator=draw).bfloat16()
    packed = compress_csr(weight, pack(torch.rand(*shape, device="cuda", generator=draw) < 0.1))
    x = torch.randn(8, shape[1], device="cuda", generator=draw).bfloat16()
    whole = sparse_linear.forward(x, packed, None)
    assert torch.equal(whole, sparse_linear.forward(x, packed, None))
    for rows in (slice(0, 1), slice(5, 7), slice(2, 5), slice(3, 8)):
        assert torch.equal(sparse_linear.forward(x[rows], packed, None), whole[rows])


def test_what_is_not_kept_meets_no_infinity():
    """Also where rows end with numbers that pad, and beside x in memory."""
    dtype, weight = torch.bfloat16, torch.zeros(70, 100, device="cuda", dtype=torch.bfloat16)
    weight[:, 40] = torch.arange(70, device="cuda").to(dtype)
    packed = compress_csr(weight, pack(torch.arange(100, device="cuda").eq(40).expand(70, 100)))
    for m in (1, 2, 4, 8):
        whole = torch.full((8, 128), float("nan"), device="cuda", dtype=dtype)
        whole[:m, :100] = torch.inf
        whole[:m, 40] = 2
        y = sparse_linear.forward(whole[:m, :100], packed, None)
        assert torch.equal(y, (2 * weight[:, 40]).expand(m, 70)), m


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
    assert torch.equal(sparse_linear.forward(x, compress_csr(weight), None), exact(x, weight))


def test_in_a_graph_without_waiting_for_the_host(no_host_sync):
    """Forward by this kernel, and what decodes the weight for more rows and for dx."""
    weight, x = drawn(512, 1024, 0.1, torch.bfloat16), signs(4, 1024, torch.bfloat16)
    packed, many = compress_csr(weight), signs(40, 1024, torch.bfloat16).requires_grad_()

    def call():
        with use_backend("cuda"):
            y = functional.sparse_linear(x, packed)
        with use_backend("composed"):
            wide = functional.sparse_linear(many, packed)
            (grad,) = torch.autograd.grad(wide, many, torch.ones_like(wide))
        return y, wide, grad

    expected = call()
    assert torch.equal(expected[0], exact(x, weight))
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
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(results, expected, strict=True))


def test_streams():
    """Launches go to the current stream: work that is queued behind a long sleep sees what the sleep's stream wrote."""
    weight, stream = drawn(64, 128, 0.5, torch.bfloat16), torch.cuda.Stream()
    packed, x = compress_csr(weight), torch.zeros(2, 128, device="cuda").bfloat16()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        y = sparse_linear.forward(x, packed, None)
    torch.cuda.synchronize()
    assert torch.equal(y, exact(x, weight))


def test_what_it_cannot_launch_raises():
    packed = compress_csr(drawn(16, 64, 0.5, torch.bfloat16))
    x = torch.zeros(9, 64, device="cuda").bfloat16()
    plan = _csr._plan(x.device.index, 16, packed.values.shape[0])
    for rows, m in ((8, 9), (3, 3)):
        with pytest.raises(RuntimeError, match="CUDA error"):
            _csr.launch(x[:m], packed, None, plan, rows)
    with pytest.raises(RuntimeError, match="CUDA error"):
        _native.load("_cuda").csr_gpu(10_000)
    assert _csr.launch(x[:8], packed, None, plan, 8).shape == (8, 16)
