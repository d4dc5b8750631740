"""`lora_linear` and CUDA's machinery: streams, graphs, devices, autocast, compile, and never waiting for the GPU."""

from __future__ import annotations

import pytest
import torch

import peft_kernels
from peft_kernels import functional
from tests.gpu.conftest import on_gpu
from tests.helpers import GRADS, LoraProblem, assert_as_accurate_as_eager

pytestmark = pytest.mark.gpu
EVERY = pytest.mark.parametrize("backend", on_gpu("lora_linear"), indirect=True)
BF16, F32 = torch.bfloat16, torch.float32
DELAY = 200_000_000  # GPU clock cycles, about 0.1 s: longer than any host code below


def make(backend, **changes) -> LoraProblem:
    settings = {"dtype": BF16, "adapter_dtype": F32, "device": backend.device} | changes
    problem = LoraProblem(256, 512, 384, 16, **settings)
    backend.skip_unless_lora_linear(problem)
    return problem


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@EVERY
def test_runs_on_the_current_stream(backend, dropout_p):
    """F18: inside torch.cuda.stream(side) everything waits for the side stream's producer. Launched elsewhere, the op
    would read the NaN that x holds until the producer has run."""
    problem = make(backend, dropout_p=dropout_p)
    expected_y, expected = problem.run()
    values = {name: tensor.detach().clone() for name, tensor in problem.tensors.items()}
    late = {name: torch.full_like(tensor, float("nan")).requires_grad_() for name, tensor in values.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(DELAY)
        with torch.no_grad():
            for name, tensor in late.items():
                tensor.copy_(values[name])
        y, grads = problem.run(**late)
    side.synchronize()
    assert torch.equal(y, expected_y)
    for name in GRADS:
        assert torch.equal(grads[name], expected[name]), name


@EVERY
def test_two_streams_at_once(backend):
    """F19: no scratch is shared, so two streams that overlap give each its own result."""
    problems = [make(backend, seed=seed, dropout_p=0.2) for seed in (1, 2)]
    expected = [problem.run() for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(problem.run())
        torch.cuda.synchronize()
        for (y, grads), (expected_y, expected_grads) in zip(results, expected, strict=True):
            assert torch.equal(y, expected_y)
            assert all(torch.equal(grads[name], expected_grads[name]) for name in GRADS)


@EVERY
def test_never_waits_for_the_gpu(backend, no_host_sync):
    problem = make(backend, dropout_p=0.2)
    t = problem.tensors
    wanted = [t[name] for name in ("x", "lora_A", "lora_B")]

    def step():
        y = functional.lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], dropout_p=0.2)
        torch.autograd.grad(y, wanted, problem.grad_y)

    step()  # compiling and loading kernels may wait
    torch.cuda.synchronize()
    no_host_sync()
    step()


@EVERY
def test_graph_replays_with_new_masks(backend):
    """A captured step draws a new dropout mask at each replay, the same one in its forward and its backward.

    With W = 0 and A = B = I, y = s·mask·x and dx = s·mask·dY, so both masks can be read off."""
    size, p, scaling = 64, 0.25, 2.0
    eye = torch.eye(size, device="cuda")
    x = torch.rand(512, size, device="cuda").add_(0.5).requires_grad_()
    weight, grad_y = torch.zeros(size, size, device="cuda"), torch.rand(512, size, device="cuda").add_(0.5)
    lora_A, lora_B = eye.clone().requires_grad_(), eye.clone().requires_grad_()

    def step():
        y = functional.lora_linear(x, weight, lora_A, lora_B, scaling=scaling, dropout_p=p)
        return y, *torch.autograd.grad(y, (x, lora_A, lora_B), grad_y)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grad_x, grad_a, _ = step()
    masks = []
    for _ in range(3):
        graph.replay()
        forward_mask = y.detach() / (scaling * x.detach())
        torch.testing.assert_close(grad_x / (scaling * grad_y), forward_mask, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad_a, scaling * grad_y.t() @ (forward_mask * x.detach()), rtol=1e-4, atol=1e-3)
        masks.append(forward_mask > 0)
        assert abs(masks[-1].float().mean().item() - (1 - p)) < 0.02
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@EVERY
def test_graph_reads_what_is_there_at_replay(backend):
    """F18, F21: every kernel of the step is in the graph; new values in the captured tensors give their results."""
    problem, other = make(backend), make(backend, seed=77)
    problem.run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads = problem.run()
    with torch.no_grad():
        for name, tensor in problem.tensors.items():
            tensor.copy_(other.tensors[name])
        problem.grad_y.copy_(other.grad_y)
    graph.replay()
    expected_y, expected = other.run()
    assert torch.equal(y, expected_y)
    for name in GRADS:
        assert torch.equal(grads[name], expected[name]), name


@EVERY
def test_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs; the guard itself is tested below")
    problem = make(backend, dropout_p=0.2)
    problem.device = "cuda:1"
    problem.__post_init__()
    assert torch.cuda.current_device() == 0
    assert_as_accurate_as_eager(problem, problem.run())


def test_triton_launches_enter_the_tensors_device(monkeypatch):
    """With one GPU: what a launch enters is the device of its tensors, not whatever is current."""
    from peft_kernels.kernels.triton import _launch

    entered = []
    guard = torch.cuda.device

    def record(device):
        entered.append(torch.device(device))
        return guard(device)

    monkeypatch.setattr(_launch.torch.cuda, "device", record)
    problem = LoraProblem(256, 512, 384, 16, dtype=BF16, device="cuda")
    with peft_kernels.use_backend("triton"):
        problem.run()
    assert entered
    assert set(entered) == {problem.tensors["x"].device}


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@EVERY
def test_autocast(backend, dtype):
    """float32 modules under autocast compute as if x, W and b had been cast, and give float32 gradients."""
    problem = make(backend, dtype=F32)
    t = problem.tensors
    with torch.autocast("cuda", dtype=dtype):
        y = functional.lora_linear(
            t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"], scaling=problem.scaling
        )
    grads = torch.autograd.grad(y, [t[name] for name in GRADS], problem.grad_y.to(dtype))
    grads = dict(zip(GRADS, grads, strict=True))
    cast = {name: problem.tensors[name].detach().to(dtype) for name in ("x", "weight", "bias")}
    expected_y, expected = problem.run(**{name: tensor.requires_grad_() for name, tensor in cast.items()})
    assert y.dtype == dtype
    assert torch.equal(y, expected_y)
    for name in GRADS:
        assert grads[name].dtype == F32, name
        assert torch.equal(grads[name], expected[name].float()), name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@EVERY
def test_compiled(backend, mode):
    """One graph without a break, and with CUDA graphs around it; results as accurate as eager PyTorch's."""
    problem = make(backend)
    run = torch.compile(functional.lora_linear, fullgraph=True, mode=mode)
    t = problem.tensors
    for _ in range(3):  # the third call replays the CUDA graph
        y = run(t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"], scaling=problem.scaling)
        grads = torch.autograd.grad(y, [t[name] for name in GRADS], problem.grad_y)
        result = y.detach().clone(), dict(zip(GRADS, (grad.clone() for grad in grads), strict=True))
        assert_as_accurate_as_eager(problem, result)
