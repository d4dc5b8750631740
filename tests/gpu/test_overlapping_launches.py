"""Launches that start before their predecessor has ended (programmatic dependent launch) read what it wrote, whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from peft_kernels import tuning, use_backend
from peft_kernels.kernels.triton import _launch
from peft_kernels.tuning.configs import ExtendedGemm
from tests.helpers import LoraProblem, assert_as_accurate_as_eager

pytestmark = pytest.mark.gpu
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SIZES = ((4096, 4096, 4096, 16), (8192, 1024, 4096, 16), (1000, 1032, 2056, 8), (2048, 512, 4096, 64))


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0, the first with programmatic dependent launch")
    with use_backend("triton"):
        yield


def _same(one, other) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_the_bits_of_launches_one_after_another(size, dtype, dropout_p, monkeypatch):
    """Two problems in turn, so that a result of the call before would be a wrong one, beside another stream's work."""
    problems = [
        LoraProblem(*size, dtype=dtype, adapter_dtype=F32, dropout_p=dropout_p, seed=seed, device="cuda")
        for seed in (1, 2)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(_launch, "overlaps", lambda device: False)
        expected = [problem.run() for problem in problems]
    assert _launch.overlaps(torch.device("cuda", torch.cuda.current_device()))
    assert_as_accurate_as_eager(problems[0], expected[0])
    noise, side = torch.randn(1024, 1024, device="cuda"), torch.cuda.Stream()
    for repetition in range(20):
        if repetition % 2:
            with torch.cuda.stream(side):
                torch.mm(noise, noise)
        for problem, truth in zip(problems, expected, strict=True):
            assert _same(problem.run(), truth)


def test_replays_of_a_graph():
    problem = LoraProblem(4096, 2048, 4096, 16, dtype=BF16, device="cuda")
    expected = problem.run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = problem.run()
    for _ in range(20):
        for tensor in (result[0], *result[1].values()):
            tensor.fill_(float("nan"))
        graph.replay()
        assert _same(result, expected)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("size", [(4096, 4096, 4096, 16), (1000, 1032, 2056, 8), (500, 264, 520, 96)], ids=str)
def test_the_experimental_form_with_two_kinds_of_warps(size, overlap, monkeypatch):
    """The form that no rule takes: it has only ever been compiled."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("written for compute capability 9.0 alone")
    config = ExtendedGemm(num_warps=8, block_m=128, block_n=256, block_k=64, block_r=64, group_m=8, num_stages=3)
    choose = tuning.config
    monkeypatch.setattr(
        tuning, "config", lambda arch, k, *a, **s: config if k.endswith("_specialized") else choose(arch, k, *a, **s)
    )
    if not overlap:
        monkeypatch.setattr(_launch, "overlaps", lambda device: False)
    problem = LoraProblem(*size, dtype=BF16, device="cuda")
    first = problem.run()
    assert_as_accurate_as_eager(problem, first)
    for _ in range(10):
        assert _same(problem.run(), first)
