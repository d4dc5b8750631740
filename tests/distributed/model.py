"""The model and the single-process truth that every distributed engine is compared with."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import FusedLoRALinear

FEATURES, HIDDEN, CLASSES, BATCH, STEPS = 12, 20, 6, 8, 3


class Block(nn.Module):
    """Two fused layers with a residual connection, recomputed in backward on request ("reentrant" or "not")."""

    def __init__(self, checkpointing: str = "", **options) -> None:
        super().__init__()
        self.up = FusedLoRALinear(FEATURES, HIDDEN, r=3, **options)
        self.down = FusedLoRALinear(HIDDEN, FEATURES, r=4, **options)
        self.checkpointing = checkpointing

    def _forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing:
            return checkpoint(self._forward, x, use_reentrant=self.checkpointing == "reentrant")
        return self._forward(x)


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(2))
        self.reentrant = options.pop("checkpointing", None) == "reentrant"
        self.head = FusedLoRALinear(FEATURES, CLASSES, r=2, bias=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:  # what `enable_input_require_grads` does: reentrant checkpoints need a differentiable input
            x = x.detach().requires_grad_()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(seed: int = 0, **options) -> Model:
    """The same model in every process, with lora_B away from zero so that every gradient is interesting."""
    torch.manual_seed(seed)
    model = Model(**options)
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            nn.init.normal_(module.lora_B, std=0.2)
    return model


def batch(seed: int = 1, rows: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, FEATURES, generator=generator), torch.randn(rows, 5, CLASSES, generator=generator)


def share(tensors: tuple[Tensor, ...], rank: int, world: int = 2) -> tuple[Tensor, ...]:
    """The rank's equal part of a batch."""
    return tuple(tensor.chunk(world)[rank] for tensor in tensors)


def full(tensor: Tensor | None) -> Tensor | None:
    """A plain, whole tensor, also of a sharded one. Collective."""
    if tensor is None:
        return None
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def train(model: nn.Module, parts, steps: int = STEPS) -> dict[str, dict[str, Tensor]]:
    """Steps of AdamW; `parts(step)` gives this process's data. Returns the first gradients and the final parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    dtype = next(iter(model.parameters())).dtype  # of the frozen weights: what x has to be in
    grads: dict[str, Tensor] = {}
    for step in range(steps):
        x, target = parts(step)
        F.mse_loss(model(x.to(dtype)).float(), target).backward()
        if step == 0:
            grads = {name: full(p.grad) for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    return {"grads": grads, "parameters": {name: full(p) for name, p in model.named_parameters()}}


def alone(steps: int = STEPS, **options) -> dict[str, dict[str, Tensor]]:
    """The truth: one process, whole batches."""
    return train(build(**options), lambda step: batch(seed=1 + step), steps)


def _named(name: str, text: str) -> str:
    return f"{name}: {text}"


def assert_same(result, truth, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for kind in ("grads", "parameters"):
        ours = {name.removeprefix("module."): value for name, value in result[kind].items()}
        assert set(ours) == set(truth[kind])
        for name, value in truth[kind].items():
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=functools.partial(_named, name))
    assert all(grad.abs().max() > 1e-4 for grad in truth["grads"].values()), "the comparison would be empty"
