"""Both ranks prune the same weights: by magnitude and movement without a word, by inputs of their own after a sum."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_kernels.formats import mask as mask_format
from peft_kernels.pruning import (
    add_movement,
    apply_masks,
    broadcast_masks,
    magnitude_masks,
    masks_of,
    set_sparsity,
    wanda_masks,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8))


def inputs(rank: int) -> torch.Tensor:
    scales = torch.linspace(0.1, 5, 12)
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(rank)) * (scales if rank else scales.flip(0))


def packed(masks):
    return {name: mask.words for name, mask in masks.items()}


def prune_everything(rank):
    model = network()
    by_inputs = wanda_masks(model, [inputs(rank)], 0.5)
    own = mask_format.pack(inputs(rank) > 0)
    sent = broadcast_masks({"w": own}, src=1)

    apply_masks(model, magnitude_masks(model, 0.2))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1, momentum=0.9)
    for sparsity in (0.4, 0.6):
        ddp(inputs(rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        apply_masks(ddp, magnitude_masks(ddp, sparsity, within=masks_of(ddp)))
    gradual = masks_of(ddp)

    moving = network()
    layers = add_movement(moving)
    ddp = DistributedDataParallel(moving)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    for sparsity in (0.0, 0.5):
        set_sparsity(ddp, sparsity)
        ddp(inputs(rank)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    movement = {name: layer.mask for name, layer in layers.items()}
    return [packed(masks) for masks in (by_inputs, gradual, movement, sent)]


def test_both_ranks_have_the_same_masks(workers):
    first, second = workers.run(prune_everything)
    for one, other in zip(first, second, strict=True):
        for name, words in one.items():
            assert torch.equal(words, other[name])
            assert words.any()
    both = wanda_masks(network(), [inputs(0), inputs(1)], 0.5)
    assert all(torch.equal(first[0][name], mask.words) for name, mask in both.items())
    alone = wanda_masks(network(), [inputs(0)], 0.5)
    assert not torch.equal(first[0]["0"], alone["0"].words)
    assert torch.equal(first[3]["w"], mask_format.pack(inputs(1) > 0).words)
