"""One layer of PEFT and one of ours with the same values, and what both compute with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import FusedLoRALinear

# PEFT's names within a layer, by ours.
NAMES = {
    "weight": "base_layer.weight",
    "bias": "base_layer.bias",
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "lora_bias": "lora_B.default.bias",
    "lora_magnitude_vector": "lora_magnitude_vector.default.weight",
}


def pair(
    base: nn.Module, config: dict[str, Any], options: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, FusedLoRALinear]:
    """PEFT's layer and ours over `base`, with random values everywhere, equal in both.

    Args:
        base: an `nn.Linear` or `Conv1D`.
        config: of PEFT's `LoraConfig`.
        options: of `FusedLoRALinear.from_linear`.
    """
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("layer", base.to(dtype))
    settings = peft.LoraConfig(target_modules=["layer"], **config)
    theirs = peft.get_peft_model(model, settings, autocast_adapter_dtype=False).base_model.model.layer.to(dtype)
    # Ours takes over the layer that PEFT has wrapped; freezing is per layer, so the bias becomes one of its own.
    trains_bias = theirs.base_layer.bias is not None and theirs.base_layer.bias.requires_grad
    ours = FusedLoRALinear.from_linear(theirs.base_layer, settings.r, adapter_dtype=dtype, **options)
    generator, named = torch.Generator().manual_seed(11), dict(theirs.named_parameters())
    with torch.no_grad():
        for parameter in named.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for name, parameter in ours.adapter_parameters.items():
            parameter.copy_(named[NAMES[name]])
    if ours.bias is not None:
        ours.bias = nn.Parameter(ours.bias.detach().clone(), requires_grad=ours.bias.requires_grad)
        theirs.base_layer.bias.requires_grad_(trains_bias)
    return theirs, ours


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(y, dx, gradients of the layer's trained parameters under our names)."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    ours = {theirs: name for name, theirs in NAMES.items()}
    grads = {ours.get(name, name): p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, grads
