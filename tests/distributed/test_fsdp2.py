"""FSDP2 (`fully_shard`) over gloo: sharded at the root, per block and per layer, against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from peft_kernels import FusedLoRALinear
from tests.distributed.model import Block, alone, assert_same, batch, build, share, train

UNITS = {"root": (), "block": (Block,), "layer": (FusedLoRALinear,), "block-and-layer": (FusedLoRALinear, Block)}


def shard(model, unit: str, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules())[::-1]:  # children first
        if isinstance(module, UNITS[unit]):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def half_batches(rank, unit, options, fsdp_options):
    model = shard(build(**options), unit, **fsdp_options)
    result = train(model, lambda step: share(batch(seed=1 + step), rank))
    result["sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    return result


@pytest.mark.parametrize(
    ("unit", "options", "fsdp_options"),
    [
        ("root", {}, {}),
        ("block", {}, {}),
        ("layer", {}, {}),
        ("block-and-layer", {"checkpointing": "not"}, {}),
        ("layer", {"checkpointing": "not"}, {"reshard_after_forward": False}),
        ("layer", {"dtype": torch.bfloat16}, {}),
        ("block", {}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    ],
    ids=["root", "block", "layer", "nested-checkpoint", "layer-kept", "layer-bfloat16-base", "offload"],
)
def test_gradients_and_three_steps(workers, unit, options, fsdp_options):
    results = workers.run(half_batches, unit, options, fsdp_options)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if options.get("dtype") == torch.bfloat16 else {}
    for result in results:
        assert result["sharded"]
        assert_same(result, alone(**options), **tolerance)


def mixed_precision(rank, unit):
    model = shard(build(), unit, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    x, target = share(batch(), rank)
    y = model(x)
    (y.float() - target).square().mean().backward()
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    return y.dtype, grads


@pytest.mark.parametrize("unit", ["root", "layer"])
def test_mixed_precision(workers, unit):
    """Parameters are gathered in bfloat16, gradients reduced in float32: within bfloat16's rounding of the truth."""
    truth = alone(steps=1)["grads"]
    for dtype, grads in workers.run(mixed_precision, unit):
        assert dtype == torch.bfloat16
        for name, grad in grads.items():
            assert grad.dtype == torch.float32
            error = float((grad - truth[name]).norm() / truth[name].norm())
            assert 0 < error < 0.05, f"{name}: {error}"


def saved_and_loaded(rank, unit):
    model = shard(build(), unit)
    options = StateDictOptions(full_state_dict=True)
    state = {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=options).items()}
    other = shard(build(seed=9), unit)
    set_model_state_dict(other, dict(state), options=options)  # it replaces the values of the dict by shards
    return state, other(batch()[0])


@pytest.mark.parametrize("unit", ["root", "layer"])
def test_full_state_dict(workers, unit):
    """Gathered: keys, shapes and values of the unsharded model; loading them into another sharded model restores it."""
    plain = build()
    expected = plain.state_dict()
    for state, y in workers.run(saved_and_loaded, unit):
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        torch.testing.assert_close(y, plain(batch()[0]))


def masks(rank):
    model = shard(build(lora_dropout=0.5), "layer")
    torch.manual_seed(rank)
    x = batch()[0]
    return model(x).detach(), model(x).detach(), model.eval()(x).detach()


def test_each_rank_drops_its_own_elements(workers):
    first, second = workers.run(masks)
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[2], second[2])
