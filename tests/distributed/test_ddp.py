"""DistributedDataParallel over gloo: two processes with half batches train what one trains with whole batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from peft_kernels import FusedLoRALinear
from tests.distributed.model import CLASSES, FEATURES, alone, assert_same, batch, build, share, train


def half_batches(rank, options, ddp_options):
    model = DistributedDataParallel(build(**options), **ddp_options)
    return train(model, lambda step: share(batch(seed=1 + step), rank))


@pytest.mark.parametrize(
    ("options", "ddp_options"),
    [
        ({}, {}),
        ({}, {"gradient_as_bucket_view": True, "static_graph": True}),
        ({"checkpointing": "not"}, {}),
        ({"checkpointing": "reentrant"}, {"static_graph": True}),
        ({"dtype": torch.bfloat16}, {}),
    ],
    ids=["plain", "static-graph", "checkpoint", "checkpoint-reentrant", "bfloat16-base"],
)
def test_gradients_and_three_steps(workers, options, ddp_options):
    results = workers.run(half_batches, options, ddp_options)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if options.get("dtype") == torch.bfloat16 else {}
    for result in results:
        assert_same(result, alone(**options), **tolerance)


class TwoBranches(torch.nn.Module):
    """Each step uses one of two adapters; the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (FusedLoRALinear(FEATURES, CLASSES, r=2) for _ in range(2))

    def forward(self, x, use_first: bool):
        return self.first(x) if use_first else self.second(x)


def unused_adapter(rank):
    torch.manual_seed(0)
    model = DistributedDataParallel(TwoBranches(), find_unused_parameters=True)
    x, target = share(batch(), rank)
    seen = []
    for use_first in (True, False):
        F.mse_loss(model(x, use_first), target).backward()
        layers = (model.module.first, model.module.second)
        seen.append([layer.lora_B.grad is not None and bool(layer.lora_B.grad.any()) for layer in layers])
        model.zero_grad()
    return seen


def test_unused_adapter(workers):
    assert workers.run(unused_adapter) == [[[True, False], [False, True]]] * 2


def zero_rows(rank):
    """The last batch of an epoch has left nothing for rank 1."""
    model = DistributedDataParallel(build())
    x, target = batch()
    if rank == 1:
        x, target = x[:0], target[:0]
    (model(x) - target).square().sum().backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_a_rank_without_rows(workers):
    model = build()
    x, target = batch()
    (model(x) - target).square().sum().backward()
    for result in workers.run(zero_rows):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(2 * result[name], parameter.grad, rtol=1e-4, atol=1e-5)


def dropout_of_rank(rank):
    model = DistributedDataParallel(build(lora_dropout=0.5, checkpointing="not"))
    torch.manual_seed(100 + rank)
    x = torch.ones(4, 5, FEATURES)
    y = model(x)
    y.sum().backward()
    return y.detach(), {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_each_rank_drops_its_own_elements(workers):
    """Masks follow each rank's generator; the averaged gradient is that of both masks, checkpointed or not."""
    (first, grads), (second, _) = workers.run(dropout_of_rank)
    assert not torch.equal(first, second)
    total: dict[str, torch.Tensor] = {}
    for rank, y in enumerate((first, second)):
        model = build(lora_dropout=0.5)
        torch.manual_seed(100 + rank)
        again = model(torch.ones(4, 5, FEATURES))
        assert torch.equal(again, y)
        again.sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                total[name] = total.get(name, 0) + parameter.grad / 2
    for name, grad in grads.items():
        torch.testing.assert_close(grad, total[name], rtol=1e-4, atol=1e-5)
