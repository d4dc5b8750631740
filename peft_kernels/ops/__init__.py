"""The library's ops: every schema, kernel and fake kernel, registered in one place.

`<op>.SCHEMAS` maps an op's name to its schema, `<op>.KERNELS` to (kernel, fake kernel). The kernel asks
`dispatch` which implementation runs. Autograd stays outside, in `<op>.py`: a Function around the registered op costs
the host less than `register_autograd`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from peft_kernels.ops import (
    dora_linear,
    dora_weight_norm,
    gated_activation,
    lora_embedding,
    lora_expert_linear,
    lora_linear,
    lora_linear_group,
    lora_swiglu_mlp,
    mask_apply,
    mask_pack,
    mask_unpack,
    masked_linear,
    masked_lora_linear,
    multi_lora_expert_linear,
    multi_lora_linear,
    multi_mask_linear,
    nf4_dequantize,
    nf4_linear,
    nf4_lora_linear,
    nf4_quantize,
    philox_dropout,
    sparse_delta_linear,
    sparse_linear,
    splitk_reduce,
)

NAMESPACE = "peft_kernels"

MODULES = (
    lora_linear,
    lora_linear_group,
    dora_linear,
    dora_weight_norm,
    gated_activation,
    lora_swiglu_mlp,
    lora_embedding,
    lora_expert_linear,
    multi_lora_linear,
    multi_lora_expert_linear,
    nf4_linear,
    nf4_lora_linear,
    nf4_dequantize,
    nf4_quantize,
    mask_pack,
    mask_unpack,
    mask_apply,
    masked_linear,
    masked_lora_linear,
    multi_mask_linear,
    sparse_delta_linear,
    sparse_linear,
    philox_dropout,
    splitk_reduce,
)

SCHEMAS = {name: schema for module in MODULES for name, schema in module.SCHEMAS.items()}

_library = torch.library.Library(NAMESPACE, "DEF")


def _without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A registered op computes in the dtypes that it is given, as its fake kernel says: which those are under autocast
    was decided before. Called directly, PyTorch's matmuls inside would otherwise change dtypes halfway."""

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return kernel(*args, **kwargs)
        with torch._C._DisableAutocast():
            return kernel(*args, **kwargs)

    return call


def _register() -> None:
    for module in MODULES:
        for name, schema in module.SCHEMAS.items():
            kernel, fake = module.KERNELS[name]
            _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
            _library.impl(name, _without_autocast(kernel), "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


_register()
