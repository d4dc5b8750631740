"""Layers in 4 bits under DDP, FSDP1 and FSDP2 over gloo: the packed weights stay whole and the same everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from peft_kernels import FusedQLoRALinear, NF4Linear
from tests.distributed.model import CLASSES, FEATURES, assert_same, batch, full, share
from tests.nn.quantised import bits


class QModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = FusedQLoRALinear(FEATURES, 20, 3, train_bias=True)
        self.frozen = NF4Linear(20, 20)
        self.down = FusedQLoRALinear(20, CLASSES, 3, bias=False, use_dora=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.frozen(F.gelu(self.up(x)))))


def build() -> QModel:
    torch.manual_seed(0)
    model = QModel()
    for layer in (model.up, model.down):
        nn.init.normal_(layer.lora_B, std=0.2)
    model.frozen.bias.requires_grad_(False)
    return model


def packed(model: nn.Module) -> list[list[bytes]]:
    return [bits(module.weight) for module in model.modules() if isinstance(module, (FusedQLoRALinear, NF4Linear))]


def train(model: nn.Module, parts) -> dict:
    """Two forwards before each backward: a broadcast of what the first one kept would make its backward fail."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    grads = {}
    for step in range(2):
        x, target = parts(step)
        losses = [F.mse_loss(model(x[i::2]), target[i::2]) for i in range(2)]
        sum(losses).backward()
        if step == 0:
            grads = {name: full(p.grad) for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: full(p) for name, p in model.named_parameters()}
    return {"grads": grads, "parameters": parameters, "packed": packed(model)}


def alone() -> dict:
    return train(build(), lambda step: batch(seed=1 + step))


def half(rank: int):
    """The rank's part of a batch, so that both forwards of the two ranks together see all of its rows."""
    return lambda step: share(batch(seed=1 + step), rank)


def ddp(rank):
    model = DistributedDataParallel(build())
    assert not model.modules_buffers
    return train(model, half(rank))


def fsdp2(rank):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build()
    for layer in (model.up, model.frozen, model.down):
        fully_shard(layer, mesh=mesh)
    return train(fully_shard(model, mesh=mesh), half(rank))


@pytest.mark.parametrize("engine", [ddp, fsdp2])
def test_f63_gradients_and_two_steps(workers, engine):
    truth = alone()
    for result in workers.run(engine):
        assert_same(result, truth)
        assert result["packed"] == truth["packed"]


def fsdp1(rank, low: bool):
    model = build()
    precision = MixedPrecision(param_dtype=torch.bfloat16, buffer_dtype=torch.bfloat16) if low else None
    sharded = FullyShardedDataParallel(
        copy.deepcopy(model), device_id=torch.device("cpu"), use_orig_params=True, mixed_precision=precision,
        auto_wrap_policy=ModuleWrapPolicy({FusedQLoRALinear}),
    )  # fmt: skip
    loss = sum(F.mse_loss(sharded(x).float(), target) for x, target in [half(rank)(0)])
    loss.backward()
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT):
        state = sharded.state_dict()
        build().load_state_dict(state, strict=True)
    return packed(sharded) == packed(model), sorted(state)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_fsdp1_casts_no_absmax_and_its_state_dict_is_whole(workers, low):
    for same, keys in workers.run(fsdp1, low):
        assert same
        assert keys == sorted(build().state_dict())
