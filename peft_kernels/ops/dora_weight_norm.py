"""The op `dora_weight_norm`: row norms of W + s B A. It has no gradient: DoRA treats the norm as a constant."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._tracing import fold_scaling
from peft_kernels.ops._weights import Weight, all_dense, joined, split

SCHEMAS = {
    # weight and layout: a dense weight and nothing, or what `_weights.split` makes of one of 4 bits, taken in `dtype`.
    "dora_weight_norm": (
        "(Tensor[] weight, int[] layout, ScalarType dtype, Tensor lora_A, Tensor lora_B, float scaling,"
        " Tensor? weight_norm_squared) -> Tensor"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `nf4`: whether the weight is of 4 bits."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    n: int
    k: int
    r: int
    known_square: bool
    nf4: bool = False


def problem(weight: Weight, lora_A: Tensor, lora_B: Tensor, *, weight_norm_squared=None, **_) -> Problem:
    (n, k), device = weight.shape, weight.device
    known, nf4 = weight_norm_squared is not None, not all_dense((weight,))
    return Problem(device.type, device.index, weight.dtype, lora_A.dtype, n, k, lora_A.shape[0], known, nf4)


def _norm(weight, lora_A, lora_B, scaling, weight_norm_squared):
    chosen = dispatch.select(
        "dora_weight_norm", problem(weight, lora_A, lora_B, weight_norm_squared=weight_norm_squared)
    )
    return chosen.forward(weight, lora_A, lora_B, scaling, weight_norm_squared)


def kernel(weight, layout, dtype, lora_A, lora_B, scaling, weight_norm_squared):
    return _norm(*joined(weight, layout, dtype), lora_A, lora_B, scaling, weight_norm_squared)


def fake(weight, layout, dtype, lora_A, lora_B, scaling, weight_norm_squared):
    return lora_B.new_empty(lora_B.shape[0], dtype=torch.promote_types(torch.float32, dtype))


KERNELS = {"dora_weight_norm": (kernel, fake)}


def dora_weight_norm(weight, lora_A, lora_B, scaling, weight_norm_squared):
    with torch.no_grad():
        lora_B, scaling = fold_scaling(lora_B, scaling)
        (first,), others, layout = split((weight,))
        if is_plain(first) and not first.is_meta and not torch._C._is_any_autocast_enabled():
            return _norm(weight, lora_A, lora_B, scaling, weight_norm_squared)
        tensors, a, b = [first.detach(), *others], lora_A.detach(), lora_B.detach()
        return torch.ops.peft_kernels.dora_weight_norm(
            tensors, layout, weight.dtype, a, b, scaling, weight_norm_squared
        )
