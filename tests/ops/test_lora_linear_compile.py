"""`lora_linear` under torch.compile: one graph, no recompilation, the same numbers, with dropout and checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft_kernels import FusedLoRALinear, functional
from tests.helpers import LoraProblem

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def layer(x, weight, lora_A, lora_B, bias, scaling=1.5, dropout_p=0.0):
    """The op between other ops that a compiler may fuse."""
    y = functional.lora_linear(
        x.sin(), weight, lora_A, lora_B, bias=bias, scaling=scaling, dropout_p=dropout_p, seed=7 if dropout_p else None
    )
    return y.cos() + 1


def check(compiled, problem: LoraProblem, **options) -> None:
    """Compiled and eager agree in the output and all gradients."""
    arguments = [problem.tensors[name] for name in NAMES]
    for run in (compiled, layer):
        y = run(*arguments, **options)
        grads = torch.autograd.grad(y, arguments, problem.grad_y)
        if run is compiled:
            first = (y, *grads)
    for name, a, b in zip(("y", *NAMES), first, (y, *grads), strict=True):
        assert a.stride() == b.stride(), name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_one_graph_for_every_batch_size():
    """With dropout; without it in three dimensions, below."""
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (6, 11, 300):
        check(compiled, LoraProblem(m, 31, 17, 3), dropout_p=0.25)


def test_one_graph_in_three_dimensions():
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in ((2, 5), (3, 9), (7, 4)):
        check(compiled, LoraProblem(batch, 31, 17, 3))


def test_static_shapes_and_two_dtypes():
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    problem = LoraProblem((2, 6), 31, 17, 3, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    check(compiled, problem)
    check(compiled, problem)


def test_frozen_weights_and_strided_input():
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    problem = LoraProblem((6, 5), 31, 17, 3)
    for name in ("weight", "bias"):
        problem.tensors[name].requires_grad_(False)
    x = problem.tensors["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    wanted = [x, problem.tensors["lora_A"], problem.tensors["lora_B"]]
    arguments = [x, *(problem.tensors[name] for name in NAMES[1:])]
    grads = torch.autograd.grad(compiled(*arguments), wanted, problem.grad_y)
    plain = torch.autograd.grad(layer(*arguments), wanted, problem.grad_y)
    torch.testing.assert_close(grads, plain, rtol=1e-5, atol=1e-5)


def test_compiled_checkpointing():
    """Checkpointing inside the graph recomputes with the same mask, drawn from torch's generator."""
    # In float64, because a graph scales B where eager mode scales the result.
    module = FusedLoRALinear(31, 17, r=3, lora_dropout=0.25, dtype=torch.float64)
    torch.nn.init.normal_(module.lora_B)
    x = torch.randn(6, 31, dtype=torch.float64, requires_grad=True)
    wanted = [x, module.lora_A, module.lora_B]

    def forward(x):
        return checkpoint(lambda t: module(t).sin(), x, use_reentrant=False)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    results = []
    for run in (forward, compiled, compiled):
        torch.manual_seed(5)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.sum(), wanted)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


def test_compiled_dropout_draws_a_new_mask_each_call():
    """The seed must not be baked into the graph as a constant."""
    module = FusedLoRALinear(64, 32, r=3, lora_dropout=0.5)
    torch.nn.init.normal_(module.lora_B)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(16, 64)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    again = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), again)


def test_a_changed_rank_or_scaling_gives_right_numbers():
    """Adapters are hot-swapped: another rank and another scaling through the same compiled function."""
    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for r, scaling in ((3, 1.5), (8, 1.5), (8, 0.25), (5, 2.0)):
            check(compiled, LoraProblem(6, 31, 17, r), scaling=scaling)


def test_modules_of_many_layers_share_one_graph():
    """Layers of one shape differ in weights only: the second must not compile anew."""
    first, second = (FusedLoRALinear(31, 17, r=3) for _ in range(2))
    for module in (first, second):
        torch.nn.init.normal_(module.lora_B)

    def forward(x, weight, bias, lora_A, lora_B):
        return functional.lora_linear(x, weight, lora_A, lora_B, bias=bias, scaling=2.0)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 31)
    for module in (first, second):
        arguments = (module.weight, module.bias, module.lora_A, module.lora_B)
        torch.testing.assert_close(compiled(x, *arguments), forward(x, *arguments))


def test_under_autocast():
    def forward(x, weight, lora_A, lora_B, bias):
        with torch.autocast("cpu", torch.bfloat16):
            return functional.lora_linear(x, weight, lora_A, lora_B, bias=bias, scaling=1.5)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    problem = LoraProblem(6, 31, 17, 3)
    arguments = [problem.tensors[name] for name in NAMES]
    results = []
    for run in (compiled, forward):
        y = run(*arguments)
        assert y.dtype == torch.bfloat16
        results.append((y, *torch.autograd.grad(y.float().sum(), arguments)))
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_inductor():
    """The default compiler, forward and backward, twice with different batch sizes."""
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (6, 11):
        check(compiled, LoraProblem(m, 31, 17, 3), dropout_p=0.25)
