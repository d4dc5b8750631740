"""What the fault tests share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import FusedLoRALinear, functional
from tests.backends import everywhere

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("lora_linear"), indirect=True)
ON_GPU = pytest.mark.parametrize(
    "backend", [p for p in everywhere("lora_linear") if p.values[0].device == "cuda"], indirect=True
)


def operands(m, k, n, r, device="cpu", dtype=torch.float32, adapter_dtype=None, seed=0):
    """x [m, k], W [n, k], A [r, k], B [n, r] with outputs of about unit size."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape, dtype=dtype):
        values = torch.randn(*shape, generator=generator, device=device)
        return (values / max(1, shape[-1]) ** 0.5).to(dtype)

    x = torch.randn(m, k, generator=generator, device=device).to(dtype)
    adapter_dtype = adapter_dtype or dtype
    return x, draw(n, k), draw(r, k, dtype=adapter_dtype), draw(n, r, dtype=adapter_dtype)


def plain(x, weight, lora_A, lora_B, scaling=1.0):
    """PyTorch's own composition."""
    low_rank = F.linear(F.linear(x, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return F.linear(x, weight) + scaling * low_rank


def gradients(function, tensors, weights=None):
    """Gradients of sum(function(*tensors) * weights) with respect to each tensor."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return torch.autograd.grad((y if weights is None else y * weights).sum(), leaves)


def assert_close(result, expected, factor: float = 1.0) -> None:
    """Equal to float32 rounding of sums of this library's test sizes."""
    for value, truth in zip(result, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4 * factor, atol=2e-5 * factor)


def layer(k=24, n=16, r=4, seed=0, **options) -> FusedLoRALinear:
    """A layer whose update is not zero."""
    torch.manual_seed(seed)
    made = FusedLoRALinear(k, n, r=r, **options)
    torch.nn.init.normal_(made.lora_B, std=0.5)
    return made


def lora(x, weight, lora_A, lora_B, **options):
    return functional.lora_linear(x, weight, lora_A, lora_B, **options)
