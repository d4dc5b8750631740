"""Faults of others that show in several processes only: F62, F64, F66 and F67."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from peft_kernels import FusedLoRALinear
from tests.distributed.model import alone, assert_same, batch, build, share, train
from tests.distributed.test_tensor_parallel import CLASSES, HIDDEN, ROW, parallelise


def every_layer_sharded(rank):
    model = build()
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, lambda step: share(batch(seed=1 + step), rank))


def test_f62_weights_are_read_unsharded(workers):
    """A fused Function that reads the weight of a child never sees it unsharded: an error, or wrong gradients with
    full_tensor(). The layer owns its parameters, so that FSDP2 unshards what its forward reads."""
    truth = alone()
    for result in workers.run(every_layer_sharded):
        assert_same(result, truth)


def flattened(rank, adapter_dtype):
    torch.manual_seed(0)
    layer, plain = (FusedLoRALinear(12, 8, r=3, dtype=torch.bfloat16, adapter_dtype=adapter_dtype) for _ in range(2))
    torch.nn.init.normal_(layer.lora_B)
    plain.load_state_dict(layer.state_dict())
    try:
        sharded = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=True)
    except ValueError as error:
        return str(error)
    x = torch.ones(2, 12).bfloat16()
    return torch.equal(sharded(x), plain(x))


def test_f64_fsdp1_flattens_one_dtype(workers):
    """FSDP1 refuses float32 adapters beside a bfloat16 base, in its own words; `adapter_dtype` is the remedy, and
    frozen beside trained parameters are no obstacle."""
    for answer in workers.run(flattened, None):
        assert "Must flatten tensors with uniform dtype" in str(answer)
    assert workers.run(flattened, torch.bfloat16) == [True, True]


def reentrant_ddp(rank):
    model = DistributedDataParallel(build(checkpointing="reentrant"))
    return train(model, lambda step: share(batch(seed=1 + step), rank))


def test_f66_ddp_with_reentrant_checkpoints(workers):
    """ "Expected to mark a variable ready only once": every parameter is used once, so it never comes."""
    truth = alone(checkpointing="reentrant")
    for result in workers.run(reentrant_ddp):
        assert_same(result, truth)


def row_parallel(rank):
    torch.manual_seed(0)
    layer = FusedLoRALinear(HIDDEN, CLASSES, r=4)
    layer.bias.requires_grad_(True)
    torch.nn.init.constant_(layer.bias, 3.0)
    torch.nn.init.normal_(layer.lora_B)
    plain = FusedLoRALinear(HIDDEN, CLASSES, r=4)
    plain.load_state_dict(layer.state_dict())
    plain.bias.requires_grad_(True)
    parallelise(layer, ROW, Shard(-1), Replicate())
    results = []
    for module in (layer, plain):
        torch.manual_seed(1)
        y = module(torch.randn(3, HIDDEN))
        y = y.to_local() if hasattr(y, "to_local") else y
        F.mse_loss(y, torch.zeros_like(y)).backward()
        grads = [getattr(module, name).grad for name in ("bias", "lora_A", "lora_B")]
        results.append([y.detach(), *[g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]])
    return results


def test_f67_row_parallel_bias_and_replicated_factor(workers):
    """The bias counts once, not once per process; gradients of the replicated lora_B are summed, not halved or zero."""
    for ours, truth in workers.run(row_parallel):
        assert float(truth[1].abs().max()) > 0.1
        for value, expected in zip(ours, truth, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
