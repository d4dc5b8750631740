"""FullyShardedDataParallel (FSDP1) over gloo, with use_orig_params so that frozen and trained parameters may mix."""

from __future__ import annotations

import functools

import torch
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from tests.distributed.model import Block, alone, batch, build, share, train


def half_batches(rank):
    model = FullyShardedDataParallel(
        build(), device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({Block})
    )
    train(model, lambda step: share(batch(seed=1 + step), rank))
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_three_steps(workers):
    """The gathered state dict after three steps of AdamW is that of one process with whole batches."""
    truth = alone()["parameters"]
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
    for state in workers.run(half_batches):
        assert set(state) == set(truth)
        for name, value in truth.items():
            close(state[name], value)
