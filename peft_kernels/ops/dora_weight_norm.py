"""The op `dora_weight_norm`: row norms of W + s B A. It has no gradient: DoRA treats the norm as a constant."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._tracing import fold_scaling

SCHEMAS = {
    "dora_weight_norm": (
        "(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, Tensor? weight_norm_squared) -> Tensor"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    n: int
    k: int
    r: int
    known_square: bool


def problem(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, weight_norm_squared=None, **_) -> Problem:
    (n, k), device = weight.shape, weight.device
    return Problem(
        device.type, device.index, weight.dtype, lora_A.dtype, n, k, lora_A.shape[0], weight_norm_squared is not None
    )


def kernel(weight, lora_A, lora_B, scaling, weight_norm_squared):
    chosen = dispatch.select(
        "dora_weight_norm", problem(weight, lora_A, lora_B, weight_norm_squared=weight_norm_squared)
    )
    return chosen.forward(weight, lora_A, lora_B, scaling, weight_norm_squared)


def fake(weight, lora_A, lora_B, scaling, weight_norm_squared):
    return weight.new_empty(weight.shape[0], dtype=torch.promote_types(torch.float32, weight.dtype))


KERNELS = {"dora_weight_norm": (kernel, fake)}


def dora_weight_norm(weight, lora_A, lora_B, scaling, weight_norm_squared):
    with torch.no_grad():
        lora_B, scaling = fold_scaling(lora_B, scaling)
        if is_plain(weight) and not weight.is_meta and not torch._C._is_any_autocast_enabled():
            return kernel(weight, lora_A, lora_B, scaling, weight_norm_squared)
        return torch.ops.peft_kernels.dora_weight_norm(
            weight.detach(), lora_A.detach(), lora_B.detach(), scaling, weight_norm_squared
        )
