"""Gated feed-forward blocks, down(act(gate(x)) * up(x)), computed by `lora_swiglu_mlp` where nothing else would happen.

The block's class changes, in place, to a subclass with another `forward`. That reads the three layers' operands past
the layers, so any hook on one of them, or on the activation, sends the call to the block's own forward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

from peft_kernels import functional
from peft_kernels.integrations._peft_groups import SINGLE, is_small
from peft_kernels.integrations._peft_linear import LINEARS
from peft_kernels.integrations._peft_nf4 import input_of, output_for
from peft_kernels.integrations._peft_objections import PLAIN, QUANTISED, full_name, has_hooks, is_fsdp
from peft_kernels.integrations._peft_operands import Several, operands
from peft_kernels.integrations._peft_source import Gated, gated_mlp, plain_class
from peft_kernels.integrations.report import Block


class FusedGatedMLP(nn.Module):
    """Mixed into the class of a block, before it: see `fused_class`."""

    _peft_kernels_plain: type[nn.Module]
    _peft_kernels_roles: Gated

    def forward(self, *args, **kwargs) -> Tensor:
        """As the block's own."""
        found = None if len(args) != 1 or kwargs else _operands(self, args[0])
        if found is None:
            return super().forward(*args, **kwargs)
        activation, parts = found
        (x,) = args
        weights, biases, lora_As, lora_Bs, scalings, dropout_ps = zip(*parts, strict=True)
        y = functional.lora_swiglu_mlp(
            input_of(weights[0], x), weights, lora_As, lora_Bs, scalings=scalings, biases=biases,
            activation=activation, dropout_p=dropout_ps,
        )  # fmt: skip
        return output_for(x, weights[0], y)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # This class has no name by which it could be found again.
        reduced: Any = super().__reduce_ex__(protocol)
        _, (_, *arguments), *others = reduced
        return _new, (self._peft_kernels_plain, *arguments), *others


@functools.cache
def fused_class(plain: Any) -> Any:
    """The subclass of a block's class; None when its forward is not known to be that of a gated MLP."""
    roles = gated_mlp(plain.forward)
    if roles is None:
        return None
    names = {name: getattr(plain, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(plain.__name__, (FusedGatedMLP, plain), {
        **names, "_peft_kernels_plain": plain, "_peft_kernels_roles": roles,
    })  # fmt: skip


def _new(plain: Any, *arguments: Any) -> nn.Module:
    kind = fused_class(plain)
    return kind.__new__(kind, *arguments)


def fuse_mlps(model: nn.Module) -> list[Block]:
    """Changes the class of the blocks that can be computed whole, as their layers and hooks are now or may become."""
    blocks = []
    for name, module in model.named_modules():
        if "forward" in module.__dict__ or is_fsdp(module):
            continue
        kind = fused_class(plain_class(module))
        if kind is not None and _lasting(module, kind._peft_kernels_roles):
            module.__class__ = kind
            roles = kind._peft_kernels_roles
            blocks.append(Block(name, (roles.gate, roles.up, roles.down), "lora_swiglu_mlp"))
    return blocks


def restore_mlps(model: nn.Module) -> None:
    """Undoes `fuse_mlps`.

    Raises:
        RuntimeError: FSDP2 has wrapped a block since. The model is unchanged.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, FusedGatedMLP)}
    for name, module in fused.items():
        if is_fsdp(module):
            raise RuntimeError(
                f"restore: {name} has become a {full_name(module)} since; restore before fully_shard or the like. "
                "The model is unchanged"
            )
    for module in fused.values():
        module.__class__ = plain_class(module)


def _lasting(module: nn.Module, roles: Gated) -> bool:
    layers: list[Any] = [module._modules.get(role) for role in (roles.gate, roles.up, roles.down)]
    fits = [
        type(layer.base_layer) in (nn.Linear, *QUANTISED) if type(layer) in LINEARS else type(layer) is nn.Linear
        for layer in layers
    ]
    adapted = any(type(layer) in LINEARS for layer in layers)
    return adapted and all(fits) and _activation(module, roles) is not None


def _activation(module: nn.Module, roles: Gated) -> str | None:
    """Its name in `gated_activation`."""
    act: Any = module._modules.get(roles.activation)
    kind = type(act)
    if kind in (nn.SiLU, activations.SiLUActivation):
        return "silu"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    if kind is activations.GELUActivation:
        return "gelu" if act.act is nn.functional.gelu else None
    return "gelu_tanh" if kind in (activations.GELUTanh, activations.NewGELUActivation) else None


def _operands(module: FusedGatedMLP, x: Tensor) -> tuple[str, list[tuple]] | None:
    """The activation and (weight, bias, lora_A, lora_B, scaling, dropout_p) of gate, up and down; None when calling
    them would do anything else."""
    roles, children = module._peft_kernels_roles, module._modules
    activation = _activation(module, roles)
    if activation is None or has_hooks(children[roles.activation]):  # type: ignore[arg-type]
        return None
    parts = []
    for role in (roles.gate, roles.up, roles.down):
        part = _part(children[role], x)
        if part is None:
            return None
        parts.append(part)
    weights = [part[0] for part in parts]
    lora_As = [lora_A[0] if type(lora_A) is tuple else lora_A for _, _, lora_A, *_ in parts]
    if len({lora_A.dtype for lora_A in lora_As if lora_A is not None}) != 1:
        return None  # no adapter, or of several dtypes
    if any(weight.dtype != weights[0].dtype or weight.device != x.device for weight in weights):
        return None
    if not torch.compiler.is_compiling() and is_small(x, weights[0]):
        return None
    return activation, parts


def _part(layer: Any, x: Tensor) -> tuple | None:
    """Of one layer. Those of down follow from x too: its input has x's dtype, whatever its shape."""
    if has_hooks(layer):
        return None
    if type(layer) is nn.Linear:
        weight, bias = layer.weight, layer.bias
        fits = type(weight) in PLAIN and (x.dtype == weight.dtype or _autocast(x))
        return (weight, bias, None, None, None, None) if fits else None
    if type(layer) not in LINEARS:
        return None
    found = operands(layer, x)
    if type(found) is Several:
        return tuple(found)
    if type(found) not in SINGLE or found[4] is not None:  # an adapter with a bias
        return None
    weight, bias, lora_A, lora_B, _, scaling, dropout_p = found
    return weight, bias, lora_A, lora_B, scaling, dropout_p


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)
