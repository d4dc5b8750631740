"""Low-rank adapters without Hugging Face: replace linear layers, train a few steps, save, load."""

import tempfile

import torch
from torch import nn

import peft_kernels

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))

# One layer by hand: it shares and freezes the weight of the layer it takes over ...
model[0] = peft_kernels.FusedLoRALinear.from_linear(model[0], r=4, lora_alpha=8)
# ... or all that are named. The report says what was replaced and what trains.
print(peft_kernels.add_lora(model, r=4, target_modules=["2"], lora_alpha=8))

x, target = torch.randn(256, 32), torch.randn(256, 8)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for step in range(50):
    loss = nn.functional.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step:2d}  loss {loss.item():.4f}")

with tempfile.TemporaryDirectory() as folder:
    peft_kernels.save_adapter(model, folder)  # adapter_config.json and adapter_model.safetensors, as `peft` reads them
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
    peft_kernels.load_adapter(fresh, folder)

peft_kernels.merge_adapter(fresh)  # inference now costs what the frozen model costs
print("largest difference after loading and merging:", (fresh(x) - model(x)).abs().max().item())
