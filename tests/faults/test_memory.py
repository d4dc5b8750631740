"""Faults of others in memory state, races and order: F16 to F25."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import peft_kernels
from tests.faults.problems import EVERYWHERE, ON_GPU, assert_close, gradients, layer, lora, operands, plain


@EVERYWHERE
def test_f16_rank_padding_holds_anything(backend):
    """Adapters of rank 5 in buffers for rank 8 whose other rows hold NaN; fresh memory holds NaN too (conftest)."""
    x, weight, a, b = operands(7, 24, 18, 5, backend.device)
    padded_a = torch.full((8, 24), float("nan"), device=backend.device)
    padded_b = torch.full((18, 8), float("nan"), device=backend.device)
    padded_a[:5], padded_b[:, :5] = a, b
    views = (x, weight, padded_a[:5], padded_b[:, :5])
    assert_close([lora(*views)], [plain(x, weight, a, b)])
    assert_close(gradients(lora, views), gradients(plain, (x, weight, a, b)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@EVERYWHERE
def test_f17_first_call_equals_second(backend, dropout_p):
    """Autotuning that re-runs a kernel on the caller's buffers makes exactly the first call of a shape wrong."""
    for m, k, n, r in ((19, 41, 23, 6), (21, 43, 29, 10)):  # shapes that no other test uses
        tensors = operands(m, k, n, r, backend.device)

        def call(*t):
            return lora(*t, dropout_p=dropout_p, seed=2 if dropout_p else None)

        first, second = (
            [call(*tensors), *gradients(call, tensors)],
            [call(*tensors), *gradients(call, tensors)],
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        if not dropout_p:
            assert_close(first, [plain(*tensors), *gradients(plain, tensors)])


@pytest.mark.gpu
@ON_GPU
def test_f18_runs_on_the_current_stream(backend):
    """A producer that is slow on a side stream: a kernel on the legacy default stream would read x too early."""
    tensors = operands(512, 512, 512, 16, "cuda")
    lora(*tensors)
    expected = plain(*tensors)
    stream = torch.cuda.Stream()
    late = torch.full_like(tensors[0], float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(tensors[0])
        y = lora(late, *tensors[1:])
    stream.synchronize()
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@ON_GPU
def test_f19_two_streams_share_no_scratch(backend):
    """Two streams run at the same time with different inputs; shared scratch would mix them up."""
    problems = [operands(700, 512, 384, 16, "cuda", seed=seed) for seed in range(2)]
    expected = [gradients(lora, tensors) for tensors in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(gradients(lora, problems[i]))
    torch.cuda.synchronize()
    for result, truth in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for grads in result for a, b in zip(grads, truth, strict=True))


def test_f19_no_module_holds_tensors():
    """Scratch kept at module level is what streams, models and dtypes then share. There is none, also after use."""
    loaded = [peft_kernels]
    for info in pkgutil.walk_packages(peft_kernels.__path__, "peft_kernels."):
        if info.name.startswith(
            ("peft_kernels.ops", "peft_kernels.kernels.reference", "peft_kernels.kernels.composed")
        ):
            loaded.append(importlib.import_module(info.name))
    gradients(lambda *t: lora(*t, dropout_p=0.5), operands(7, 24, 18, 5))
    modules = [m for name, m in list(sys.modules.items()) if name.split(".")[0] == "peft_kernels" and m is not None]
    assert set(loaded) <= set(modules)

    def tensors_in(value, depth=3):
        if isinstance(value, torch.Tensor):
            return [value]
        children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        return [t for child in list(children) for t in tensors_in(child, depth - 1)] if depth else []

    for module in modules:
        for name, value in list(vars(module).items()):
            # The ids of a batch of names, by names, device and stream: never written to, so no scratch.
            if (module.__name__, name) != ("peft_kernels.integrations._peft_multi", "_choices"):
                assert not tensors_in(value), f"{module.__name__}.{name} holds a tensor"


def test_f19_threads():
    """Threads with their own inputs at once, forward and backward, give what each gives alone."""
    problems = [operands(60 + i, 40, 24, 4, seed=i) for i in range(4)]
    expected = [gradients(lora, tensors) for tensors in problems]
    failures = []

    def work(i):
        for _ in range(20):
            grads = gradients(lora, problems[i])
            if not all(torch.equal(a, b) for a, b in zip(grads, expected[i], strict=True)):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


@EVERYWHERE
def test_f20_models_of_different_dtype_in_turn(backend):
    """float32, bfloat16, float16 and autocast in turn: none leaves a buffer or a dtype behind for the next."""
    problems = [
        operands(9, 24, 18, 4, backend.device, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    fresh = [gradients(lora, tensors) for tensors in problems]
    for order in ((2, 0, 1), (1, 2, 0)):
        for i in order:
            with torch.autocast(backend.device, torch.bfloat16):
                assert lora(*problems[0]).dtype == torch.bfloat16
            again = gradients(lora, problems[i])
            assert [g.dtype for g in again] == [t.dtype for t in problems[i]]
            assert all(torch.equal(a, b) for a, b in zip(again, fresh[i], strict=True))


@pytest.mark.gpu
@ON_GPU
def test_f21_graph_capture_and_replay(backend):
    """Capture without tuning or synchronisation inside, and 200 replays with new inputs that equal eager runs."""
    x, weight, a, b = operands(128, 256, 192, 16, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            lora(x, weight, a, b)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora(x, weight, a, b)
    for i in range(200):
        x.copy_(torch.randn_like(x))
        graph.replay()
        if i % 50 == 49:
            torch.testing.assert_close(y, lora(x, weight, a, b), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_f22_no_data_race(tool):
    """NVIDIA's compute-sanitizer finds no invalid access, no race and no read of uninitialised memory."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on this machine")
    code = (
        "import torch, peft_kernels; from tests.helpers import LoraProblem\n"
        "with peft_kernels.use_backend('triton'):\n"
        "    for m in (1, 130): LoraProblem(m, 130, 70, 5, dropout_p=0.3, dtype=torch.float16, device='cuda').run()\n"
        "torch.cuda.synchronize()"
    )
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--kernel-name-exclude", "regex:.*at::.*"]
    result = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-3000:]


class Residual(nn.Module):
    """x is used three times, and the gradient of the sum reaches all three as one tensor."""

    def __init__(self, first, second) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return x + self.first(x) + self.second(x)


@EVERYWHERE
def test_f23_shared_activations_and_gradients_are_not_overwritten(backend):
    """dX written into grad_output or into the saved x would corrupt the layer's neighbours, or a second backward."""
    first, second = (layer(24, 24, seed=i).to(backend.device) for i in range(2))
    model = Residual(first, second)
    x = torch.randn(9, 24, device=backend.device, requires_grad=True)
    kept = x.detach().clone()
    y = model(x)
    grad_y = torch.randn_like(y)
    shared = grad_y.clone()
    wanted = [x, first.lora_A, first.lora_B, second.lora_A, second.lora_B]
    grads = torch.autograd.grad(y, wanted, shared, retain_graph=True)
    again = torch.autograd.grad(y, wanted, shared)
    assert torch.equal(x, kept)
    assert torch.equal(shared, grad_y)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))

    def composition(x, a1, b1, a2, b2):
        branches = [x @ m.weight.t() + m.bias + m.scaling * (x @ a.t()) @ b.t()
                    for m, a, b in ((first, a1, b1), (second, a2, b2))]  # fmt: skip
        return x + branches[0] + branches[1]

    assert_close(grads, gradients(composition, wanted, grad_y))


@pytest.mark.parametrize("batch", [(6,), (2, 3)])
@EVERYWHERE
def test_f24_result_is_no_view(backend, batch):
    """`y += 1`, `h[mask] = 0`, `loss *= n` on the result: a view made in a custom Function would refuse or be wrong."""
    module = layer().to(backend.device)
    x = torch.randn(*batch, 24, device=backend.device)
    base = module(x).detach()
    for change in (
        lambda y: y.add_(1),
        lambda y: y.__setitem__(y.detach() > 0, 0.0),
        lambda y: y.mul_(3).relu_(),
    ):
        y, expected = module(x), base.clone()
        assert not y._is_view()
        change(y)
        change(expected)
        assert torch.equal(y.detach(), expected)
        y.sum().backward()
    assert module.lora_B.grad.isfinite().all()


@EVERYWHERE
def test_f25_accumulating_into_the_result(backend):
    """`result += delta` must not meet a leaf: with everything frozen, and with a leaf as input."""
    module = layer().to(backend.device)
    delta = torch.ones(5, 16, device=backend.device)
    x = torch.randn(5, 24, device=backend.device)
    expected = module(x).detach() + 1
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for leaf in (x, x.clone().requires_grad_()):
        result = module(leaf)
        result += delta
        torch.testing.assert_close(result.detach(), expected)
    gc.collect()
