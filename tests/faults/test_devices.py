"""Faults of others in devices, compilation and the surroundings: F59 to F77 (F62 to F67: tests/distributed)."""

from __future__ import annotations

import ast
import inspect
import logging
import pkgutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import peft_kernels
from peft_kernels import FusedLoRALinear, dispatch, functional
from peft_kernels.ops import lora_linear
from tests.faults.problems import EVERYWHERE, ON_GPU, assert_close, gradients, layer, lora, operands, plain
from tests.helpers import LoraProblem, assert_as_accurate_as_eager, assert_within_rounding

PACKAGE = Path(peft_kernels.__file__).parent


@pytest.mark.gpu
@ON_GPU
def test_f59_tensor_on_another_device_than_the_current(backend):
    """Tensors on cuda:1 while cuda:0 is current: others launch on the wrong device, with garbage or an error."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs; with one, the test below checks which device a launch enters")
    tensors = operands(65, 128, 96, 16, "cuda:1")
    torch.cuda.set_device(0)
    assert_close([lora(*tensors)], [plain(*tensors)], factor=100)
    assert_close(gradients(lora, tensors), gradients(plain, tensors), factor=100)
    assert torch.cuda.current_device() == 0


def test_f59_a_launch_enters_the_device_of_its_tensors(monkeypatch):
    """Which device is current while a kernel is launched, by a stand-in for torch.cuda.device. On a CPU: none."""
    from peft_kernels.kernels.triton import _launch

    inside, launched = [], []

    class Guard:
        def __init__(self, device):
            self.device = torch.device(device)

        def __enter__(self):
            inside.append(self.device)

        def __exit__(self, *exception):
            inside.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(list(inside))

    monkeypatch.setattr(torch.cuda, "device", Guard)
    _launch.launch(Kernel(), (1,), torch.device("cuda", 1), 1, 2)
    _launch.launch(Kernel(), (1,), torch.device("cpu"), 1, 2)
    assert launched == [[torch.device("cuda", 1)], []]
    assert inside == []


@EVERYWHERE
def test_f60_results_are_where_the_inputs_are(backend):
    """Scratch, seeds and results follow x, not the default device."""
    tensors = operands(5, 24, 16, 4, backend.device)
    with torch.device("meta"):
        results = [lora(*tensors, dropout_p=0.5), *gradients(lambda *t: lora(*t, dropout_p=0.5, seed=1), tensors)]
    assert {t.device.type for t in results} == {torch.device(backend.device).type}
    assert all(t.isfinite().all() for t in results)


def test_f61_layers_on_the_meta_device():
    """Deferred initialisation and the other stages of a pipeline: shapes flow through, gradients stay on meta, and a
    layer that is materialised afterwards is the layer that it would have been."""
    module = FusedLoRALinear(24, 16, r=4, device="meta", dtype=torch.bfloat16)
    x = torch.empty(2, 5, 24, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = module(x)
    assert (y.shape, y.device.type, y.dtype) == ((2, 5, 16), "meta", torch.bfloat16)
    y.sum().backward()
    for tensor in (x, module.lora_A, module.lora_B):
        assert (tensor.grad.shape, tensor.grad.device.type, tensor.grad.dtype) == (tensor.shape, "meta", tensor.dtype)
    with pytest.raises(ValueError, match="weight is on meta, but x is on cpu"):
        module(torch.randn(2, 5, 24).bfloat16())
    real = module.to_empty(device="cpu")
    real.load_state_dict(layer(dtype=torch.bfloat16).state_dict())
    x = torch.randn(3, 24).bfloat16()
    assert torch.equal(real(x), layer(dtype=torch.bfloat16)(x))


def test_f65_parameters_that_are_not_there(tmp_path):
    """ZeRO-3 leaves empty parameters outside its forward: a clear error, and no adapter file full of nothing."""
    module = torch.nn.Sequential(layer())
    x = torch.randn(3, 24)
    for name in ("weight", "lora_A", "lora_B"):
        parameter = getattr(module[0], name)
        whole, parameter.data = parameter.data, torch.empty(0)
        with pytest.raises(ValueError, match=rf"lora_linear: {name} has shape \(0,\)"):
            module(x)
        if name != "weight":
            with pytest.raises(ValueError, match="gather the parameters first"):
                peft_kernels.save_adapter(module, tmp_path / "adapter")
        parameter.data = whole
    assert not (tmp_path / "adapter").exists()
    peft_kernels.save_adapter(module, tmp_path / "adapter")


def test_f68_one_graph_with_checkpointing_and_dynamic_shapes():
    """fullgraph x checkpointing x changing batch size x dropout, without a break or a recompilation."""
    torch._dynamo.reset()
    module = layer(lora_dropout=0.3)
    compiled = torch.compile(
        lambda x: checkpoint(module, x.sin(), use_reentrant=False), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 12, 40):
            x = torch.randn(rows, 24, requires_grad=True)
            results = []
            for run in (compiled, lambda x: module(x.sin())):
                torch.manual_seed(rows)
                y = run(x)
                results.append([y, *torch.autograd.grad(y.square().sum(), [x, module.lora_A, module.lora_B])])
            assert_close(*results, factor=5)
    torch._dynamo.reset()


def _compiled_and_counted():
    torch._dynamo.reset()
    compilations = []

    def count(graph, inputs):
        compilations.append(1)
        return graph.forward

    return torch.compile(functional.lora_linear, backend=count), compilations


def test_f69_many_ranks_share_one_graph():
    """Adapters of seven ranks, hot-swapped through one compiled function, cost at most three compilations."""
    compiled, compilations = _compiled_and_counted()
    for r in range(5, 12):
        tensors = operands(6, 24, 16, r)
        torch.testing.assert_close(compiled(*tensors, scaling=0.3), plain(*tensors, 0.3))
    assert len(compilations) <= 3
    torch._dynamo.reset()


def test_f69_a_scaling_is_compiled_once():
    """PyTorch makes a Python float a constant of the graph: one compilation per value, none when a value returns."""
    compiled, compilations = _compiled_and_counted()
    tensors = operands(6, 24, 16, 4)
    for scaling in (0.5, 2.0, 0.5, 1.0, 2.0, 0.5):
        torch.testing.assert_close(compiled(*tensors, scaling=scaling), plain(*tensors, scaling))
    assert len(compilations) <= 3
    torch._dynamo.reset()


def test_f70_selective_checkpointing_finds_the_op_by_name():
    """Policies list ops by name; an op that hides in plain Python is recomputed against the user's wish."""
    module, seen = layer(), []

    def policy(context, op, *args, **kwargs):
        seen.append(str(op))
        ours = op is torch.ops.peft_kernels.lora_linear.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    x = torch.randn(5, 24, requires_grad=True)
    expected = torch.autograd.grad(module(x).sin().sum(), [x, module.lora_A, module.lora_B])
    y = checkpoint(
        lambda t: module(t).sin(), x, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    grads = torch.autograd.grad(y.sum(), [x, module.lora_A, module.lora_B])
    assert "peft_kernels.lora_linear.default" in seen
    assert_close(grads, expected)


def _calls(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_f71_no_executable_cache():
    """The library keeps no cache that processes could corrupt for each other and unpickles nothing: the only files it
    reads as data are JSON and safetensors."""
    for path in PACKAGE.rglob("*.py"):
        forbidden = {"pickle.load", "pickle.loads", "torch.load", "marshal.loads", "eval", "exec", "os.system"}
        assert not forbidden & _calls(path), path.name


def test_f72_every_kernel_module_without_triton():
    """Decorators that touch the driver at import, or a missing Triton: each implementation of each op gives a reason
    instead of an exception, in a process without GPU and Triton."""
    code = """
        import sys
        for name in ("triton", "transformers", "peft", "bitsandbytes"):
            sys.modules[name] = None
        import torch
        from peft_kernels import dispatch
        from tests.backends import Placement
        for op, order in dispatch.ORDER.items():
            for backend in order:
                print(op, backend, Placement(op, backend, "cpu").objection(), sep="|")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    answers = dict(tuple(line.rsplit("|", 1)) for line in result.stdout.split("\n") if line)
    for op, order in dispatch.ORDER.items():
        assert answers[f"{op}|reference"] == "None"
        for backend in set(order) & {"triton", "cuda"}:
            assert answers[f"{op}|{backend}"] not in ("", "None")


def test_f73_a_triton_that_does_not_work(monkeypatch, caplog):
    """Another Triton version breaks at import with something other than ImportError: reported, and composed runs."""
    real = dispatch._implementation

    def broken(op, backend):
        if backend == "triton":
            raise AttributeError("module 'triton.language' has no attribute 'make_tensor_descriptor'")
        return real(op, backend)

    monkeypatch.setattr(dispatch, "_implementation", broken)
    dispatch._warn_once.cache_clear()
    dispatch.forget()
    tensors = operands(5, 24, 16, 4)
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        choice = peft_kernels.explain("lora_linear", *tensors)
        assert_close([lora(*tensors)], [plain(*tensors)])
    assert "has no attribute 'make_tensor_descriptor'" in dict(choice.rejected)["triton"]
    assert caplog.text.count("breaks when imported") == 1
    dispatch.forget()


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9), (10, 0), (12, 1), (15, 3)])
def test_f74_gpus_nobody_has_seen(monkeypatch, capability):
    """Old, new and future architectures: a choice with reasons, and never the unmeasured kernel by default."""
    from peft_kernels.kernels.triton import _launch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    _launch.gpu_architecture.cache_clear()
    dispatch.forget()
    problem = lora_linear.Problem("cuda", 0, torch.bfloat16, torch.float32, 8192, 4096, 4096, 16, False)
    choice = dispatch.choose("lora_linear", problem)
    arch = f"sm_{capability[0]}{capability[1]}"
    if capability < (8, 0):
        assert "compute capability" in dict(choice.rejected)["triton"]
    elif choice.backend != "triton":
        assert arch in dict(choice.rejected)["triton"]
    assert choice.backend in ("triton", "composed")
    _launch.gpu_architecture.cache_clear()
    dispatch.forget()


def test_f75_tiny_problems_cost_less_than_peft(monkeypatch):
    """Where there is nothing to compute the host's time decides: forward and backward of 4 x 16 at rank 4. The least of
    many rounds, taken in turn, so that a busy machine cannot decide the result."""
    monkeypatch.undo()  # poisoning what the package allocates takes longer than the layer
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.layer import Linear

    ours = FusedLoRALinear(16, 16, r=4, lora_alpha=8)
    config = peft.LoraConfig(r=4, lora_alpha=8)
    theirs = Linear(torch.nn.Linear(16, 16).requires_grad_(False), "default", config, r=4, lora_alpha=8)
    x = torch.randn(4, 16, requires_grad=True)

    def seconds(module) -> float:
        start = time.perf_counter()
        module(x).sum().backward()
        return time.perf_counter() - start

    rounds = [(seconds(ours), seconds(theirs)) for _ in range(1000)]
    assert min(a for a, _ in rounds) < min(b for _, b in rounds)


def test_f77_the_accuracy_rule_is_sharp():
    """Thresholds come from PyTorch's own error on this machine, not from a constant. They reject a result rounded once
    too often, one that lost its tail, and one wrong element."""
    problem = LoraProblem(257, 129, 101, 24)
    y, grads = problem.run()
    assert_as_accurate_as_eager(problem, (y, grads))
    assert_within_rounding(problem, (y, grads))

    def spoiled(name, change):
        copies = {"y": y.clone(), **{key: grad.clone() for key, grad in grads.items()}}
        copies[name] = change(copies[name])
        return copies.pop("y"), copies

    def rounded(value):
        return value.half().float()

    def one_element(value):
        value.view(-1)[value.abs().argmax()] *= 1.001
        return value

    def no_tail(value):
        value[-1] = 0
        return value

    for name in ("y", *grads):
        for change in (rounded, no_tail):
            with pytest.raises(AssertionError, match=name):
                assert_as_accurate_as_eager(problem, spoiled(name, change))
        for change in (rounded, no_tail, one_element):
            with pytest.raises(AssertionError, match=name):
                assert_within_rounding(problem, spoiled(name, change))


def test_f77_batch_sizes_around_every_block():
    """One batch size in a test hides bugs of the others: every M from 0 to 70 and the edges of larger blocks."""
    x, weight, a, b = operands(257, 24, 16, 4)
    expected = plain(x, weight, a, b)
    for m in (*range(71), 127, 128, 129, 255, 256, 257):
        torch.testing.assert_close(lora(x[:m], weight, a, b), expected[:m], rtol=1e-4, atol=1e-5)


def test_public_functions_have_no_hidden_defaults():
    """F32's lesson: a default that silently makes things slow or wrong. Every default here is the mathematical one."""
    neutral = {
        "scaling": 1.0, "dropout_p": 0.0, "training": True, "activation": "silu", "scale": 1.0, "bias": None,
        "scalings": None, "adapter_weights": None, "biases": None, "lora_bias": None, "seed": None,
        "token_mask": None, "weight_norm": None, "weight_norm_squared": None, "padding_idx": None, "dtype": None,
        "blocksize": 64, "double_quant": True,  # QLoRA's
        "threshold": None, "magnitude": False, "weight_is_masked": False, "grad_layout": "dense", "values": None,
        "places": None, "update_masked": False, "delta_ids": None,
    }  # fmt: skip
    for op in functional.__all__:
        for name, parameter in inspect.signature(getattr(functional, op)).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                assert parameter.default == neutral[name], (op, name)
    folders = [m.name for m in pkgutil.iter_modules([str(PACKAGE / "kernels")]) if m.ispkg]
    assert folders == sorted(dispatch.BACKENDS)
    assert F.linear is torch.nn.functional.linear, "nothing of PyTorch is patched"
