"""The dropout masks of `multi_lora_linear` in the Triton kernels, and rows that no adapter has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels.formats.adapter_table import AdapterLists
from peft_kernels.kernels.reference import philox_dropout
from peft_kernels.kernels.triton import multi_lora_linear
from tests.triton.test_multi_lora_linear import _gemms_take_the_step_along  # noqa: F401  (a fixture)

triton = pytest.importorskip("triton", reason="triton is not installed")

F16, F32 = torch.float16, torch.float32

# The mask, bit for bit: products with 0 and 1 are exact, so that each kernel shows the mask itself.

P, SEED = (0.3, 0.0, 0.7), torch.tensor([-987654321012345])
IDS = torch.tensor([0, 2, 1, -1, 2]).repeat(5).unsqueeze(1)


def _call(like: Tensor, lora_As, lora_Bs):
    adapters = AdapterLists(lora_As, lora_Bs, [0] * 3, [0, 1, 2], [1.0] * 3, [lora_As[0].shape[0]], 3)
    return multi_lora_linear._Call(like, adapters, IDS, None, P, SEED)


def _dropped(x: Tensor) -> Tensor:
    """Each row with the mask of its adapter, 0 without one."""
    masked = [philox_dropout.forward(x, p, SEED) if p else x for p in P]
    return torch.stack([masked[a][m] if a >= 0 else x[m] * 0 for m, a in enumerate(IDS.squeeze(1).tolist())])


@pytest.mark.parametrize("dtype", [F16, F32], ids=["float16", "float32"])
def test_mask_of_s(dtype):
    x = torch.randn(25, 41).to(dtype)
    call = _call(x, [torch.eye(41, dtype=dtype)] * 3, [torch.zeros(8, 41, dtype=dtype)] * 3)
    assert torch.equal(call.s(x, 0).squeeze(1), _dropped(x))


@pytest.mark.parametrize("base", ["gemm", "update"])
@pytest.mark.parametrize("dtype", [F16, F32], ids=["float16", "float32"])
def test_mask_of_dx(dtype, base, monkeypatch):
    """16-bit factors too: the mask has their scale in float32."""
    if base == "update":
        monkeypatch.setattr(multi_lora_linear._Call, "fused", lambda *args, **options: None)
    grad_y, weight = torch.zeros(25, 8, dtype=dtype), torch.zeros(8, 160, dtype=dtype)
    call = _call(grad_y, [torch.ones(1, 160, dtype=dtype)] * 3, [torch.zeros(8, 1, dtype=dtype)] * 3)
    grad_x = multi_lora_linear._grad_x(call, 0, None, grad_y, torch.ones(25, 1, 1, dtype=dtype), weight)
    assert torch.equal(grad_x, _dropped(torch.ones(25, 160, dtype=dtype)))


@pytest.mark.parametrize("dtype", [F16, F32], ids=["float16", "float32"])
def test_mask_of_da(dtype):
    x, one = torch.randn(25, 41).to(dtype), torch.eye(25, dtype=dtype).unsqueeze(1)
    call = _call(x, [torch.zeros(25, 41, dtype=dtype)] * 3, [torch.zeros(8, 25, dtype=dtype)] * 3)
    flat = multi_lora_linear._sum(call, 0, one, x, lora_b=False).view(3, 25, 41)
    dropped = _dropped(x)
    for adapter in range(3):
        assert torch.equal(flat[adapter], dropped * (adapter == IDS))


def test_places_without_an_adapter_are_zero():
    """Whatever their weights and rows."""
    x, grad_y = torch.full((25, 8), float("nan")), torch.full((25, 6), float("nan"))
    call = _call(x, [torch.ones(2, 8)] * 3, [torch.ones(6, 2)] * 3)
    call.mix = torch.full((25, 1), float("nan"))
    grad_s, grad_mix = call.grad_s(grad_y, 0, call.s(x, 0))
    for result in (call.s(x, 0), grad_s, grad_mix):
        assert result[IDS.squeeze(1) < 0].eq(0).all()
