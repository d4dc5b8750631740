"""Operands of a LoRA layer over a `bitsandbytes.nn.Linear4bit`, whose weight stays in its 4 bits.

bitsandbytes casts x to the layer's compute dtype and the result back to x's; PEFT computes the adapters in their own
dtype and casts to x's. Here the whole layer is computed in the compute dtype (under autocast in autocast's).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels import functional
from peft_kernels.checks import MAX_RANK
from peft_kernels.formats.nf4 import NF4Weight, from_bitsandbytes
from peft_kernels.integrations._peft_objections import (
    DROPOUTS,
    PLAIN,
    dropout_probability,
    full_name,
    has_global_hook,
    has_hooks,
    hook_objection,
    in_transform,
    surroundings_objection,
    tensor_objection,
    tensor_of,
    type_objection,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Quantised(NamedTuple):
    """Operands of one plain adapter over a 4-bit weight, in the order of the dense layers' tuple. `weight.dtype` is
    the compute dtype."""

    weight: NF4Weight
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None
    scaling: float
    dropout_p: float

    def output(self, x: Tensor) -> Tensor:
        weight, bias, lora_A, lora_B, lora_bias, scaling, dropout_p = self
        y = functional.lora_linear(
            x.to(weight.dtype), weight, lora_A, lora_B, scaling=scaling, bias=bias, lora_bias=lora_bias,
            dropout_p=dropout_p,
        )  # fmt: skip
        return y.to(x.dtype)


def input_of(weight: Tensor | NF4Weight, x: Tensor) -> Tensor:
    """x as the weight is multiplied with."""
    return x.to(weight.dtype) if type(weight) is NF4Weight else x


def output_for(x: Tensor, weight: Tensor | NF4Weight, y: Tensor) -> Tensor:
    """The product as a layer returns it that was called with x."""
    return y.to(x.dtype) if type(weight) is NF4Weight else y


def changes(weight: Tensor | NF4Weight) -> int:
    """How often the weight was written to."""
    return weight.packed._version + weight.absmax._version if isinstance(weight, NF4Weight) else weight._version


class Stored:
    """The `NF4Weight` over the memory of a layer's weight, made anew when that is another. Copies start empty."""

    def __init__(self) -> None:
        self._source: tuple[Tensor, Any, Tensor, int] | None = None
        self._made: NF4Weight | None = None

    def __reduce__(self) -> tuple:
        return Stored, ()

    def forget(self) -> None:
        """So that a weight that was replaced is not kept alive until the next call."""
        self._source = self._made = None

    def get(self, weight: Tensor, state: Any, dtype: torch.dtype) -> NF4Weight:
        """The weight with `dtype`: the same object as long as nothing has changed, which groups rely on."""
        made = self._made
        if made is None or not self._is_of(weight, state):
            made = from_bitsandbytes(_with_state(weight, state))
            if torch.compiler.is_compiling():
                return made._replace(dtype=dtype)
            self._source = (weight, state, state.absmax, _address(weight))
        if made.dtype is not dtype:
            made = made._replace(dtype=dtype)
        self._made = made
        return made

    def _is_of(self, weight: Tensor, state: Any) -> bool:
        if self._source is None:
            return False
        old_weight, old_state, absmax, address = self._source
        same = old_weight is weight and old_state is state and absmax is state.absmax
        return same and (torch.compiler.is_compiling() or address == _address(weight))


def _address(weight: Tensor) -> int:
    """Where the bytes lie: whoever assigns to `.data` leaves the object the same."""
    with torch._C.DisableTorchFunctionSubclass():  # a Params4bit would spend 4 µs in Python
        return weight.data_ptr()


def _with_state(weight: Tensor, state: Any) -> Tensor:
    """The parameter as bitsandbytes makes it where FSDP has put a plain tensor in its place."""
    if type(weight) not in PLAIN:
        return weight
    from bitsandbytes.nn import Params4bit

    return Params4bit(weight, quant_state=state, quant_storage=weight.dtype, bnb_quantized=True)


def quantised(layer: Any, x: Tensor | None, name: str) -> Quantised | str:
    """The operands of a call with x, with one adapter, or why PEFT's own code has to run. x = None asks about the layer
    alone."""
    children = layer._modules
    base, a, b = children["base_layer"], children["lora_A"]._modules[name], children["lora_B"]._modules[name]
    dropout = children["lora_dropout"]._modules[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or type(dropout) not in DROPOUTS:
        return type_objection(base, a, b, dropout)
    if has_hooks(base) or has_hooks(a) or has_hooks(b) or has_hooks(dropout):
        return hook_objection(base, a, b, dropout)
    if not layer.cast_input_dtype_enabled or has_global_hook() or in_transform():
        return surroundings_objection(layer)
    weight = _weight(layer, base, x)
    if isinstance(weight, str):
        return weight
    bias, lora_A, lora_B, lora_bias = base.bias, tensor_of(a, "weight"), tensor_of(b, "weight"), tensor_of(b, "bias")
    scaling = layer.scaling[name]
    if (
        type(lora_A) not in PLAIN
        or type(lora_B) not in PLAIN
        or lora_A.dtype != lora_B.dtype
        or (lora_bias is not None and (lora_bias.dtype != lora_B.dtype or type(lora_bias) not in PLAIN))
        or layer.r[name] > MAX_RANK
        or type(scaling) is not float
        or not -math.inf < scaling < math.inf
    ):
        return tensor_objection(weight, bias, lora_A, lora_B, lora_bias, scaling)
    if bias is not None and bias.requires_grad and bias.dtype != weight.dtype:
        return f"the bias is trained in {bias.dtype}, and bitsandbytes turns it into {weight.dtype} in its forward"
    dropout_p = dropout_probability(dropout)
    if isinstance(dropout_p, str):
        return dropout_p
    return Quantised(weight, bias, lora_A, lora_B, lora_bias, scaling, dropout_p)


def _weight(layer: Any, base: Any, x: Tensor | None) -> NF4Weight | str:
    """The base weight, its `dtype` that of the computation with x."""
    weight = tensor_of(base, "weight")
    state = getattr(weight, "quant_state", None)
    if state is None and type(weight) in PLAIN:
        state = base.quant_state  # as bitsandbytes does after FSDP or DataParallel have lost the parameter's class
    if state is None:
        if type(weight) not in PLAIN and not hasattr(weight, "quant_state"):
            return f"a weight is a {full_name(weight)}, not a Params4bit"
        return "the base weight is not quantised yet (bitsandbytes does that when the layer moves to its device)"
    if "packing_format_for_cpu" in state.__dict__ and state.packing_format_for_cpu:
        return "bitsandbytes has repacked the base weight for a CPU, which evaluating its own forward does"
    dtype = _compute_dtype(base, x)
    if isinstance(dtype, str):
        return dtype
    if state.quant_type != "nf4":
        return f"the base weight is quantised as {state.quant_type}, not nf4"
    if tuple(state.shape) != (base.out_features, base.in_features):
        return f"the base weight was quantised with the shape {tuple(state.shape)}, not (out_features, in_features)"
    stored = layer.__dict__.get("_peft_kernels_stored")
    if stored is None:
        stored = layer.__dict__["_peft_kernels_stored"] = Stored()
    try:
        return stored.get(weight, state, dtype)
    except (ValueError, TypeError) as error:
        return f"the base weight is no NF4 weight of a kind known here: {error}"


def _compute_dtype(base: Any, x: Tensor | None) -> torch.dtype | str:
    """What the layer computes in, decided as `Linear4bit.forward` does, whose first call also fixes it."""
    if x is None:
        return base.compute_dtype or torch.float32
    if type(x) not in PLAIN or x.dtype not in _FLOATS:
        return f"x is a {full_name(x)} of {x.dtype}"
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    dtype = base.compute_dtype or x.dtype
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        if dtype not in _FLOATS or (dtype == torch.float16 and x.dtype != torch.float16):
            # PEFT's adapters would see the range of x, and their gradients would not vanish.
            return f"x is {x.dtype}, the compute dtype {dtype}"
        return dtype
    autocast = torch.get_autocast_dtype(device)
    for kind, what in ((x.dtype, "x"), (dtype, "the compute dtype")):
        if kind not in (torch.float32, autocast):
            return f"{what} is {kind}, that of autocast {autocast}"
    return dtype
