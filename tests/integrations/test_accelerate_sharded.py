"""Groups and whole blocks under DDP and FSDP2: PEFT's gradients, whatever is a unit of its own. One process, gloo."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from peft_kernels import accelerate
from tests.integrations import models
from tests.integrations.models import llama, tokens, transformer

TOGETHER = {"lora_linear_group": 2, "lora_linear": 2, "lora_swiglu_mlp": 2}


def blocks(model):
    return model.base_model.model.model.layers


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def ddp_that_looks_for_unused(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model, *units):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh)
    return model


def fsdp_of_blocks(model):
    return fsdp(model, *blocks(model))


def fsdp_of_mlps(model):
    return fsdp(model, *(block.mlp for block in blocks(model)))


def fsdp_of_layers(model):
    projections = [getattr(block.self_attn, name) for block in blocks(model) for name in ("q_proj", "k_proj", "v_proj")]
    return fsdp(model, *projections, *(block.mlp.up_proj for block in blocks(model)))


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in named.items()}


@pytest.mark.parametrize(
    ("wrap", "ops", "checkpointing"),
    [
        (ddp, TOGETHER, True),
        (ddp_that_looks_for_unused, TOGETHER, False),
        (fsdp_of_blocks, TOGETHER, False),
        (fsdp_of_blocks, TOGETHER, True),
        (fsdp_of_mlps, TOGETHER, True),
        (fsdp_of_layers, {"lora_linear": 14}, False),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_gradients_are_pefts(wrap, ops, checkpointing, world, fused):
    model = transformer(llama)
    stock = models.twin(model)
    batch = tokens(model)
    expected = gradients(stock, batch)
    report = accelerate(model, strict=True)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = wrap(model.train())
    for _ in range(2):
        grads = gradients(model, batch)
        counts = fused.ops()
        assert counts == {name: (2 if checkpointing else 1) * count for name, count in ops.items()}
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert report.calls.ended == {}
    assert report.fallbacks == {}
