"""Prune a model to half of its weights, fine-tune it with LoRA inside the masks, merge: the zeros are still there."""

import torch
from torch import nn

import peft_kernels
from peft_kernels.pruning import magnitude_masks, masks_of, sparsity_report

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
x, target = torch.randn(256, 32), torch.randn(256, 8)

# Which weights stay: the largest half of all layers together. (`wanda_masks` asks calibration data as well;
# `add_movement` trains the choice; `LotteryTicket` trains, prunes and rewinds in rounds.)
masks = magnitude_masks(model, 0.5)

# Layers that have a mask get adapters whose update has it too: y = x ((W + scaling · B A) ⊙ M)ᵀ + b.
peft_kernels.add_lora(model, r=4, lora_alpha=8, masks=masks)
print(sparsity_report(model))

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for step in range(50):
    loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step:2d}  loss {loss.item():.4f}")

peft_kernels.merge_adapter(model)
layers = {name: model.get_submodule(name) for name in masks_of(model)}
outside = sum(int(layer.weight[~layer.mask.unpack()].count_nonzero()) for layer in layers.values())
print("weights outside the masks that are not 0 after merging:", outside)
