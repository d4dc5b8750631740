"""The CUDA C++ kernels of csrc on a GPU: the bits of the specification."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import _native, functional, use_backend
from peft_kernels.kernels.cuda import philox_dropout, splitk_reduce
from peft_kernels.kernels.reference import philox_dropout as dropout_reference
from peft_kernels.kernels.reference import splitk_reduce as reduce_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_native.why_not("_cuda") is not None, reason=str(_native.why_not("_cuda"))),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def seed_tensor(seed: int) -> torch.Tensor:
    return torch.tensor([seed], dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_bits(dtype, p):
    """Whole rows of 8 (one long row), whole rows of 8 with a stride, and rows that end inside a group."""
    for m, k in ((1, 1), (3, 5), (64, 4096), (33, 1001), (257, 24), (1000, 1032)):
        x = torch.randn(m, k, device="cuda").to(dtype)
        for seed in (7, -5, 2**40 + 3):
            got = philox_dropout.forward(x, p, seed_tensor(seed))
            assert torch.equal(got, dropout_reference.forward(x, p, seed_tensor(seed))), (m, k, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", range(9))
def test_dropout_alignment(dtype, offset):
    """Every offset from a 16-byte boundary, and strided rows; the elements around the result stay as they are."""
    storage = torch.randn(40 * 80 + 16, device="cuda").to(dtype)
    for x in (
        storage[offset : offset + 40 * 80].view(40, 80),
        storage[: 40 * 80].view(40, 80)[:, offset : offset + 64],
    ):
        got = philox_dropout.forward(x, 0.3, seed_tensor(1))
        assert torch.equal(got, dropout_reference.forward(x, 0.3, seed_tensor(1)))


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
def test_dropout_strides(layout):
    x = {
        "rows": torch.randn(48, 64, device="cuda")[::3],
        "columns": torch.randn(64, 48, device="cuda").t(),
        "expanded": torch.randn(1, 64, device="cuda").expand(48, 64),
    }[layout]
    assert torch.equal(
        philox_dropout.forward(x, 0.5, seed_tensor(2)), dropout_reference.forward(x, 0.5, seed_tensor(2))
    )


@pytest.mark.parametrize("row_offset", [1, 1000, 2**33, 2**50])
def test_dropout_row_offset(row_offset):
    x = torch.randn(5, 77, device="cuda")
    got = philox_dropout.forward(x, 0.3, seed_tensor(3), row_offset)
    assert torch.equal(got, dropout_reference.forward(x, 0.3, seed_tensor(3), row_offset))


def test_dropout_of_more_than_two_billion_elements():
    rows, columns = 2**17 + 1, 2**14  # 4.3 GB in, 4.3 GB out
    free, _ = torch.cuda.mem_get_info()
    if free < 10 * 2**30:
        pytest.skip(f"needs 10 GiB of GPU memory, {free / 2**30:.0f} GiB are free")
    x = torch.ones(rows, columns, device="cuda", dtype=torch.bfloat16)
    got = philox_dropout.forward(x, 0.5, seed_tensor(4))
    for first in (0, rows - 3):
        expected = dropout_reference.forward(x[first : first + 3], 0.5, seed_tensor(4), first)
        assert torch.equal(got[first : first + 3], expected)


def test_dropout_agrees_with_triton_and_the_cpu():
    x = torch.randn(100, 1000)
    results = []
    for backend, device in (("cuda", "cuda"), ("triton", "cuda"), ("reference", "cpu")):
        with use_backend(backend):
            results.append(functional.philox_dropout(x.to(device), 0.3, seed=99).cpu())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_dropout_in_a_graph_follows_its_seed():
    """The seed is read on the device: a captured graph replays with whatever the seed tensor holds then."""
    x, seed = torch.randn(64, 512, device="cuda"), seed_tensor(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        philox_dropout.forward(x, 0.5, seed)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = philox_dropout.forward(x, 0.5, seed)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(out, dropout_reference.forward(x, 0.5, seed_tensor(value)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 3), (16, 4096), (1025,), (1 << 20,), (1 << 20, 3), (0, 4)], ids=str)
@pytest.mark.parametrize("parts", [0, 1, 2, 9, 33])
def test_reduce_bits(parts, shape, dtype):
    # Magnitudes far apart: another order of additions gives other bits.
    partials = torch.randn(parts, *shape, device="cuda") * 10 ** torch.empty(parts, *shape, device="cuda").uniform_(
        -4, 4
    )
    out = splitk_reduce.forward(partials, 0.3, dtype)
    assert out.shape == shape
    assert torch.equal(out, reduce_reference.forward(partials, 0.3, dtype))


def test_streams():
    """Launches go to the current stream: work that is queued behind a long sleep sees what the sleep's stream wrote."""
    x, stream = torch.zeros(256, 1024, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(2.0)
        out = philox_dropout.forward(x, 0.0, seed_tensor(0))
        total = splitk_reduce.forward(out.view(2, 128, 1024), 1.0, torch.float32)
    torch.cuda.synchronize()
    assert bool((total == 4.0).all())


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(10, 64, device="cuda:1")
    seed = torch.tensor([3], device="cuda:1")
    assert torch.equal(philox_dropout.forward(x, 0.5, seed), dropout_reference.forward(x, 0.5, seed))
    assert torch.cuda.current_device() == 0


def test_a_failed_launch_raises():
    module = _native.load("_cuda")
    out = torch.empty(8, device="cuda")
    with pytest.raises(RuntimeError, match="CUDA error"):
        module.splitk_reduce(10_000, 0, out.data_ptr(), 1, 8, 1.0, out.data_ptr(), 0)
    with pytest.raises(RuntimeError, match="CUDA error"):
        module.splitk_reduce(0, 0, out.data_ptr(), 1, 8, 1.0, out.data_ptr(), 99)
    partials = torch.ones(2, 8, device="cuda")
    assert torch.equal(splitk_reduce.forward(partials, 1.0, torch.float32), torch.full((8,), 2.0, device="cuda"))
