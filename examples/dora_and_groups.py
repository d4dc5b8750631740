"""A transformer block without Hugging Face: q, k and v as one group, a gated MLP as one block, DoRA on the output.

Grouped layers share one pass over x and keep it once for backward; what they compute is that of the layers alone. Runs
in a few seconds on a CPU and shows what is kept, that training works, and that merging changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_kernels
from peft_kernels import FusedLoRAGroup, FusedLoRALinear, FusedLoRASwiGLU

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 64, 4, 2, 160  # grouped-query attention: k and v are half as wide as q


class Block(nn.Module):
    """Attention and MLP, frozen, with adapters."""

    def __init__(self) -> None:
        super().__init__()
        width = HIDDEN * KV_HEADS // HEADS
        q, k, v = (nn.Linear(HIDDEN, n, bias=False) for n in (HIDDEN, width, width))
        gate, up = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        down, out = nn.Linear(INTERMEDIATE, HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        # Ranks may differ, None leaves a projection frozen, and names are those of the layers in a checkpoint.
        self.qkv = FusedLoRAGroup.from_linears([q, k, v], (8, None, 8), names=("q_proj", "k_proj", "v_proj"))
        self.out = FusedLoRALinear.from_linear(out, 8, use_dora=True)
        self.mlp = FusedLoRASwiGLU.from_linears(gate, up, down, 8, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for y in self.qkv(F.rms_norm(x, (HIDDEN,))))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(F.rms_norm(x, (HIDDEN,)))


def kept_bytes(call: Callable[[Tensor], object], x: Tensor, module: nn.Module) -> int:
    """What a forward keeps for backward, parameters aside."""
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(x)
    return sum(sizes)


def separate_mlp(mlp: FusedLoRASwiGLU) -> Callable[[Tensor], Tensor]:
    gate, up, down = mlp.layers
    return lambda x: down(F.silu(gate(x)) * up(x))


def main() -> list[float]:
    torch.manual_seed(0)
    block = Block()
    x, target = torch.randn(4, 32, HIDDEN), torch.randn(4, 32, HIDDEN)

    together = kept_bytes(block.qkv, x, block)
    separately = kept_bytes(lambda x: [layer(x) for layer in block.qkv.layers], x, block)
    print(f"kept for backward by q, k, v: {together:,} bytes as a group, {separately:,} one by one")
    together, separately = kept_bytes(block.mlp, x, block), kept_bytes(separate_mlp(block.mlp), x, block)
    print(f"kept for backward by the MLP: {together:,} bytes as a block, {separately:,} one by one")

    print(peft_kernels.trainable_parameters(block))
    optimizer = torch.optim.AdamW((p for p in block.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for step in range(30):
        loss = F.mse_loss(block(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:2d}  loss {losses[-1]:.4f}")

    block.eval()
    merged = copy.deepcopy(block)
    peft_kernels.merge_adapter(merged)
    print("largest difference after merging:", (merged(x) - block(x)).abs().max().item())
    direction = block.out.lora_magnitude_vector / merged.out.weight.norm(dim=1)
    print(f"rows of the merged DoRA weight have the trained lengths: {torch.allclose(direction, torch.ones(HIDDEN))}")
    return losses


if __name__ == "__main__":
    main()
