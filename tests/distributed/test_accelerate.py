"""Accelerated PEFT models under DDP, FSDP1, FSDP2 and tensor parallelism: PEFT's gradients, and which code ran."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip("peft", reason="needs Hugging Face PEFT: pip install 'peft-kernels[peft]'")

from peft_kernels import accelerate, check, restore
from tests.distributed.model import full
from tests.integrations import models

ROWS, LAYERS = 8, 2
ADAPTERS = ("lora_A", "lora_B")


def loss(model, x):
    return model(x).square().mean()


def data():
    return models.features(ROWS, 24).detach()


def truth():
    model = models.toy()
    loss(model, data()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def shard(model, targets):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = (model.base_model.model.first, model.base_model.model.second)
    if targets == "layers":
        units = layers
    elif targets == "adapters":  # as PEFT's fsdp_auto_wrap_policy does
        units = [getattr(layer, name)["default"] for layer in layers for name in ADAPTERS]
    else:
        units = ()
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh)
    return model


def wrap(model, engine, targets):
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp1":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        kinds = {type(model.base_model.model.first)} if targets == "layers" else {type(model)}
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy(kinds)
        )
    return shard(model, targets)


def gathered(model, engine):
    if engine != "fsdp1":
        return {n.removeprefix("module."): full(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {n.replace("_fsdp_wrapped_module.", ""): g.clone() for n, g in grads.items()}


def half_batches(rank, engine, targets, first):
    """Gradients and fallbacks of a model that is accelerated before or after it is distributed."""
    model = models.toy()
    if first:
        report = accelerate(model)
    model = wrap(model, engine, targets)
    if not first:
        report = accelerate(model)
    foreseen = report.fused
    loss(model, data().chunk(2)[rank]).backward()
    return {"grads": gathered(model, engine), "foreseen": foreseen, "fallbacks": report.fallbacks}


CASES = [
    ("ddp", "root", True), ("ddp", "root", False),
    ("fsdp1", "layers", True), ("fsdp1", "root", True),
    ("fsdp2", "root", True), ("fsdp2", "root", False), ("fsdp2", "layers", True),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "targets", "first"), CASES)
def test_fused_layers_get_the_gradients_of_one_process(workers, engine, targets, first):
    expected = truth()
    for result in workers.run(half_batches, engine, targets, first):
        assert result["fallbacks"] == {}
        assert result["foreseen"] == LAYERS
        assert result["grads"].keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(result["grads"][name], grad)


def test_adapters_that_are_sharded_one_by_one_run_pefts_code(workers):
    """Their weights are whole only while they are called; reading them gives gradients of a shard (axolotl#2992)."""
    expected = truth()
    for result in workers.run(half_batches, "fsdp2", "adapters", True):
        (reason,) = result["fallbacks"]
        assert "FSDPLinear" in reason
        assert result["fallbacks"][reason] == LAYERS
        for name, grad in expected.items():
            torch.testing.assert_close(result["grads"][name], grad)


def refused(rank, targets):
    model = shard(models.toy(), targets)
    try:
        accelerate(model)
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize(
    ("targets", "reason"),
    [("adapters", "an adapter weight is in a"), ("layers", "call accelerate before fully_shard")],
)
def test_what_is_wrapped_already_is_reported(workers, targets, reason):
    for message in workers.run(refused, targets):
        assert "no layer can be fused" in message
        assert "FSDPLinear" in message
        assert reason in message


def twice(rank):
    model = shard(accelerated(), "layers")
    report = accelerate(model)
    loss(model, data()).backward()
    try:
        restore(model)
    except RuntimeError as error:
        return report.fused, report.fallbacks, str(error)


def test_a_second_call_and_restore_after_sharding(workers):
    for fused, fallbacks, message in workers.run(twice):
        assert (fused, fallbacks) == (LAYERS, {})
        assert "restore before fully_shard" in message


def checked(rank):
    model = shard(accelerated(), "layers")
    try:
        check(model, data())
    except ValueError as error:
        return str(error)


def accelerated():
    model = models.toy()
    accelerate(model)
    return model


def test_check_refuses_a_sharded_model(workers):
    for message in workers.run(checked):
        assert "is sharded; check the model before it is distributed" in message


def tensor_parallel(rank, hooks):
    """Column-parallel as transformers and PEFT do it: lora_B as the base weight, lora_A whole."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = models.toy(target_modules=["first"])
    report = accelerate(model)
    layer, mesh = model.base_model.model.first, init_device_mesh("cpu", (dist.get_world_size(),))
    if hooks:
        plan = {"base_layer": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(layer, mesh, {**plan, "lora_B.default": ColwiseParallel(output_layouts=Replicate())})
        y = layer(data())
    else:
        for child in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            for name, p in list(child.named_parameters()):
                split = Replicate() if child is layer.lora_A["default"] else Shard(0)
                setattr(child, name, nn.Parameter(distribute_tensor(p.data, mesh, [split]), p.requires_grad))
        y = layer(DTensor.from_local(data(), mesh, [Replicate()])).full_tensor()
    y.square().mean().backward()
    grads = {name: full(layer.get_parameter(f"{name}.default.weight").grad) for name in ADAPTERS}
    return {"y": y.detach(), "grads": grads, "fallbacks": report.fallbacks}


@pytest.mark.parametrize(("hooks", "reason"), [(True, "hooks"), (False, "DTensor")])
def test_tensor_parallel_layers_run_pefts_code(workers, hooks, reason):
    model = models.toy(target_modules=["first"])
    layer = model.base_model.model.first
    y = layer(data())
    y.square().mean().backward()
    for result in workers.run(tensor_parallel, hooks):
        assert [reason in text for text in result["fallbacks"]] == [True]
        torch.testing.assert_close(result["y"], y)
        for name in ADAPTERS:
            torch.testing.assert_close(result["grads"][name], layer.get_parameter(f"{name}.default.weight").grad)
