"""`torch.compile(fullgraph=True)` of every module: no break, no recompile over batch sizes, the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import FusedLoRAEmbedding, FusedLoRAExperts, FusedLoRAGroup, FusedLoRALinear, FusedLoRASwiGLU
from tests.helpers import relative_error


def disturbed(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def rows(m: int) -> Tensor:
    return torch.randn(m, 12, requires_grad=True)


def ids(m: int) -> Tensor:
    return torch.arange(m) % 7


def qkv(**options) -> nn.Module:
    return FusedLoRAGroup.from_linears([nn.Linear(12, n) for n in (16, 4, 4)], (3, None, 2), **options)


def pair(**options) -> nn.Module:
    return FusedLoRAGroup.from_linears([nn.Linear(12, n) for n in (16, 4)], (3, None), **options)


def mlp(**options) -> nn.Module:
    return FusedLoRASwiGLU.from_linears(nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12), 3, **options)


class Routed(nn.Module):
    """Experts whose rows are shared out as the batch grows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = FusedLoRAExperts(3, 12, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        m = x.shape[0]
        return self.experts(x, torch.tensor([m // 4, m // 2, m], dtype=torch.int32))


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "plain": (lambda: FusedLoRALinear(12, 10, 3), rows),
    "both biases": (lambda: FusedLoRALinear(12, 10, 3, lora_bias=True, train_bias=True), rows),
    "frozen A": (lambda: FusedLoRALinear(12, 10, 3, freeze_A=True), rows),
    "DoRA": (lambda: FusedLoRALinear(12, 10, 3, use_dora=True), rows),
    "group": (qkv, rows),
    "group, DoRA": (lambda: pair(use_dora=True), rows),
    "SwiGLU": (mlp, rows),
    "embedding": (lambda: FusedLoRAEmbedding(7, 12, 3, padding_idx=2), ids),
    "experts": (Routed, rows),
}


def outputs_and_gradients(module: nn.Module, call: Callable, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    y = call(x)
    ys = list(y) if isinstance(y, tuple) else [y]
    sum(one.square().sum() for one in ys).backward()
    grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    if x.grad is not None:
        grads.append(x.grad.clone())
        x.grad = None
    return [*(one.detach() for one in ys), *grads]


# In evaluation DoRA keeps its norm; a group goes the same way as in training.
CASES = [(name, True) for name in MODULES] + [(name, False) for name in ("DoRA", "embedding")]


@pytest.mark.parametrize(("name", "training"), CASES)
def test_same_in_one_graph(name, training):
    torch._dynamo.reset()
    make, batch = MODULES[name]
    module = disturbed(make()).train(training)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 9, 64):
            x = batch(m)
            expected = outputs_and_gradients(module, module, x)
            got = outputs_and_gradients(module, compiled, x)
            assert len(got) == len(expected)
            assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["DoRA", "group", "embedding"])
def test_merged(name):
    """Merging is seen by compiled code: a new graph, of plain layers."""
    torch._dynamo.reset()
    make, batch = MODULES[name]
    module, x = disturbed(make()), batch(9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for change in (lambda: None, module.merge, module.unmerge):
        change()
        got, expected = compiled(x), module(x)
        pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
        assert all(relative_error(a.detach(), b.detach()) < 1e-5 for a, b in pairs)
