"""DoRA in a `lora.Linear` of PEFT: its operands and the row norms of the base weight, kept while it is frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora
from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.nn.parameter import Parameter
from transformers.pytorch_utils import Conv1D

from peft_kernels import functional
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.integrations._peft_nf4 import changes, input_of, output_for
from peft_kernels.integrations._peft_objections import PLAIN, full_name, has_hooks

_CACHE = "peft_kernels-weight-norm"


class Dora(NamedTuple):
    """Operands of DoRA: those of LoRA, the magnitude [N], who keeps norms, and the layer's class."""

    plain: tuple
    magnitude: Tensor
    norms: Norms
    dora_layer: Any
    name: str
    kind: type

    def output(self, x: Tensor) -> Tensor:
        weight, bias, lora_A, lora_B, _, scaling, dropout_p = self.plain
        y = functional.dora_linear(
            input_of(weight, x), weight, lora_A, lora_B, self.magnitude, scaling=scaling, bias=bias,
            dropout_p=dropout_p, weight_norm=self._weight_norm(),
        )  # fmt: skip
        if issubclass(self.kind, Linear) or not torch.is_autocast_enabled():
            return output_for(x, weight, y)
        # Under CUDA's autocast PEFT's 4-bit layer leaves its result as wide as the magnitude.
        return y.to(torch.promote_types(x.dtype, self.magnitude.dtype))

    def _weight_norm(self) -> Tensor:
        weight, _, lora_A, lora_B, _, scaling, _ = self.plain
        # PEFT's own switch: it keeps norms from one call to the next until the layer is trained again.
        kept = dora.ENABLE_DORA_CACHING and not self.dora_layer.training and not torch.is_inference_mode_enabled()
        norm = self.dora_layer._cache_get(f"{_CACHE}-{self.name}", None) if kept else None
        if norm is None:
            squared = self.norms.squared(weight)
            norm = functional.dora_weight_norm(weight, lora_A, lora_B, scaling=scaling, weight_norm_squared=squared)
            if kept:
                self.dora_layer._cache_store(f"{_CACHE}-{self.name}", norm)
        return norm


class Norms:
    """‖W‖² of each row of a frozen W. Copies start empty."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._squared: Tensor | None = None

    def __reduce__(self) -> tuple:
        return Norms, ()

    def forget(self) -> None:
        """For changes that tensors do not count: those through `.data`, as merging makes them."""
        self._key = self._squared = None

    def squared(self, weight: Tensor | NF4Weight) -> Tensor | None:
        """[N], or None where it has to be computed with the norm itself."""
        if torch.compiler.is_compiling():
            return None
        if isinstance(weight, NF4Weight):
            memory = weight.packed
        else:
            memory = weight
            frozen = type(weight) is Parameter or type(weight._base) is Parameter  # also the transposed one of a Conv1D
            if not frozen or weight.requires_grad:
                return None
        if _is_transient(memory):
            return None
        key = (memory.data_ptr(), changes(weight), weight.shape, weight.dtype, weight.device, _stream(memory))
        if key != self._key:
            n, k = weight.shape
            nothing = memory.new_zeros(1, k, dtype=weight.dtype), memory.new_zeros(n, 1, dtype=weight.dtype)
            self._squared, self._key = functional.dora_weight_norm(weight, *nothing).square_(), key
        return self._squared


def _is_transient(weight: Tensor) -> bool:
    """Whether what is computed now may not be read later, or a change of the weight would not be counted."""
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    return torch.is_inference_mode_enabled() or weight.is_inference()


def _stream(weight: Tensor) -> int:
    return torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0


def dora_operands(layer: Any, x: Tensor | None, plain: tuple | str, name: str) -> Dora | str:
    """What PEFT's DoraLinearVariant computes with these operands of plain LoRA."""
    if isinstance(plain, str):
        return plain
    if x is not None and x.ndim == 1:
        return "x has one dimension, and PEFT's DoRA gives a result of two"
    *first, lora_bias, scaling, dropout_p = plain
    module = layer._modules["lora_magnitude_vector"]._modules.get(name)
    if type(module) is not dora.DoraLinearLayer or has_hooks(module):
        return f"the magnitude is in a {full_name(module)} that does more than PEFT's DoraLinearLayer"
    magnitude = module.weight
    if lora_bias is not None:
        return "DoRA with a bias of the adapter (lora_bias)"
    if module.fan_in_fan_out != (type(layer._modules["base_layer"]) is Conv1D):
        return f"DoRA with fan_in_fan_out={module.fan_in_fan_out} on a {full_name(layer._modules['base_layer'])}"
    if type(magnitude) not in PLAIN:
        return f"the magnitude is a {full_name(magnitude)}, not a plain tensor"
    if magnitude.dtype != first[2].dtype or magnitude.device != first[0].device:
        return f"the magnitude is {magnitude.dtype} on {magnitude.device}, unlike the adapter or the base weight"
    norms = layer.__dict__.setdefault("_peft_kernels_norms", Norms())
    # PEFT asks the layer whether to drop at all, and its dropout module how.
    return Dora(
        (*first, None, scaling, dropout_p if layer.training else 0.0), magnitude, norms, module, name, type(layer)
    )
