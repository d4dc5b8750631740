"""`MultiLoRALinear`: a frozen linear layer each row of which runs its own adapter of an `AdapterPool`, and how a whole
model gets them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_kernels.checks import check_floating
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.peft_adapter import PREFIX
from peft_kernels.formats.pool import AdapterPool, PoolLayer
from peft_kernels.functional import multi_lora_linear
from peft_kernels.nn._layers import flags_kept
from peft_kernels.nn._quantised import Quantised
from peft_kernels.nn._sites import (
    all_sites,
    check_open,
    compiled_modules,
    put_layers,
    put_linears_back,
    replacement_objection,
    unwrap,
)
from peft_kernels.nn.lora import dense_weight_of, is_linear, plain_linear
from peft_kernels.nn.nf4 import NF4Linear, is_quantised_linear, weight_of


class MultiLoRALinear(Quantised):
    """y[m] = x[m] Wᵀ + b + Σ_i w[m, i] s_a (x[m] A_aᵀ) B_aᵀ, a = adapter_ids[m, i], with frozen W and b and a pool's
    adapters, computed by `functional.multi_lora_linear`. Made by `from_linear` or `attach_pool`.

    The state dict is that of the layer it stands for: adapters are the pool's. `.to()` and copies concern W and b, and
    leave the pool where it is; a copy shares it. Gradients reach x and `adapter_weights`, not the adapters.

    Attributes:
        weight: [out_features, in_features], frozen; an `NF4Weight` where the layer is in 4 bits.
        bias: [out_features], frozen, or None.
        pool_layer: the layer of the pool.
    """

    weight: NF4Weight | nn.Parameter
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    pool_layer: PoolLayer
    _kind: Any  # the type of the layer that this one stands for
    _trained: list[bool]  # whether its weight and bias required gradients

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("MultiLoRALinear stands for a layer that exists; use from_linear or attach_pool")

    @classmethod
    def from_linear(cls, linear: nn.Module, pool: AdapterPool, name: str | None = None) -> MultiLoRALinear:
        """Puts a pool's adapters beside an existing layer, sharing and freezing its weight and bias.

        Args:
            linear: an `nn.Linear`; a transformers `Conv1D`, whose [in, out] weight is shared as a transposed view; or
                one in 4 bits, an `NF4Linear` or bitsandbytes' `Linear4bit`, whose weight is shared.
            pool: where the adapters are, on the device of the layer.
            name: of the pool's layer; may be None where the pool has a single one.

        Returns:
            A layer in the same training mode as `linear`.

        Raises:
            TypeError: `linear` is none of these (a subclass may compute something else), its weight is not
                floating-point, or `pool` is no `AdapterPool`.
            ValueError: the pool has no such layer, or one of another size.
        """
        where = f"{cls.__name__}.from_linear"
        if not isinstance(pool, AdapterPool):
            raise TypeError(f"{where}: pool is {type(pool).__name__}; expected an AdapterPool")
        quantised = is_quantised_linear(linear)
        weight: Any = weight_of(cls.__name__, linear, 64, True) if quantised else dense_weight_of(cls.__name__, linear)
        if not quantised:
            check_floating(where, "the weight", weight)
        if name is None:
            if len(pool.sizes) != 1:
                raise ValueError(f"{where}: name is None, but the pool has {len(pool.sizes)} layers; say which")
            (name,) = pool.sizes
        pool_layer = pool.layer(name)
        if pool.sizes[name] != tuple(weight.shape):
            raise ValueError(
                f"{where}: the pool's layer {name} is for {pool.sizes[name]} (out, in); got a weight of "
                f"{tuple(weight.shape)}"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.pool_layer, layer._kind = pool_layer, NF4Linear if quantised else type(linear)
        parameters = [linear.weight, linear.bias]
        layer._trained = [isinstance(p, nn.Parameter) and p.requires_grad for p in parameters]
        linear.requires_grad_(False)
        layer.weight = weight
        layer.register_parameter("bias", linear.bias)  # type: ignore[arg-type]
        return layer.train(linear.training)

    def forward(self, x: Tensor, adapter_ids: Tensor | None = None, adapter_weights: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features].
            adapter_ids: int32 or int64, one for each row of x or for each sample, shape x.shape[:-1] or x.shape[:1]
                (with weights [..., k]), as the pool's `ids` gives them; -1 for none. None takes the `active_ids` of
                the pool: there must be some, as the base model alone is never meant by leaving them out. For the base
                model alone say so: `pool.use(["__base__"] * samples)`.
            adapter_weights: w, in the shape of `adapter_ids`, or None for one adapter a row.

        Returns:
            y: [..., out_features] in x's dtype.

        Raises:
            RuntimeError: no ids are given, and this thread has no block of `pool.use` open.
            ValueError, TypeError: as `functional.multi_lora_linear`.
        """
        if adapter_ids is None:
            adapter_ids = self.pool_layer.pool.active_ids
            if adapter_ids is None:
                raise RuntimeError(
                    f"MultiLoRALinear: {self.pool_layer.name} is called without adapter_ids, and outside of "
                    'pool.use(names); for the base model alone: with pool.use(["__base__"] * samples)'
                )
        return multi_lora_linear(
            x, self.weight, self.pool_layer, None, adapter_ids, bias=self.bias, adapter_weights=adapter_weights
        )

    def to_linear(self) -> nn.Module:
        """The layer without adapters, sharing weight and bias, which require gradients again where they did: of the
        type that `from_linear` took (an `NF4Linear` in the place of bitsandbytes' `Linear4bit`)."""
        weight, bias = self.weight, self.bias
        linear: Any
        if isinstance(weight, NF4Weight):
            linear = NF4Linear.__new__(NF4Linear)
            nn.Module.__init__(linear)
            linear._set_up(weight, bias)
        else:
            linear = plain_linear(self._kind, weight, bias)
        for parameter, trained in zip((linear.weight, linear.bias), self._trained, strict=True):
            if isinstance(parameter, nn.Parameter):
                parameter.requires_grad_(trained)
        return linear.train(self.training)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        if isinstance(self.weight, nn.Parameter):
            nn.Module._load_from_state_dict(self, *args, **kwargs)
        else:
            super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"pool_layer={self.pool_layer.name}" + self._quantised_repr()
        )


_ATTACH = "attach_pool"


def attach_pool(model: nn.Module, pool: AdapterPool) -> tuple[str, ...]:
    """Replaces the linear layers that a pool has layers for by `MultiLoRALinear`, in place. The model then runs inside
    of `pool.use(names)`, with a name for each sample:

        pool = AdapterPool.for_model(model, budget=4 * 2**30, target_modules=["q_proj", "v_proj"])
        attach_pool(model, pool)
        pool.load("anna", "adapters/anna")
        with pool.use(["anna", "__base__"]):
            logits = model(input_ids).logits

    Args:
        model: with `nn.Linear`, transformers `Conv1D`, `NF4Linear` or bitsandbytes `Linear4bit` layers; not yet wrapped
            by DDP or FSDP.
        pool: on the model's device. Its layers have the model's names (`AdapterPool.for_model`).

    Returns:
        The names of the layers, in the model's order.

    Raises:
        ValueError: a layer of the pool is not in the model, has another size or cannot be replaced. The model is
            unchanged.
        TypeError: an argument of the wrong type, or a layer that is not linear, or a subclass.
    """
    if not isinstance(pool, AdapterPool):
        raise TypeError(f"{_ATTACH}: pool is {type(pool).__name__}; expected an AdapterPool")
    wrapped, model = model, unwrap(model)
    if is_linear(model) or is_quantised_linear(model):
        raise ValueError(f"{_ATTACH}: the model is itself a linear layer; use MultiLoRALinear.from_linear")
    check_open(wrapped, _ATTACH)
    chosen: dict[str, Any] = {}
    for site in all_sites(model):
        names = [name for name in (name.removeprefix(PREFIX) for name in site.names) if name in pool.sizes]
        if names:
            chosen[names[0]] = site.module
    missing = [name for name in pool.sizes if name not in chosen]
    if missing:
        raise ValueError(f"{_ATTACH}: the model has no layer {missing[0]}, which the pool is for")
    compiled = compiled_modules(model)
    layers: dict[nn.Module, nn.Module] = {}
    with flags_kept(chosen.values()):
        for name, module in chosen.items():
            reason = _objection(module, id(module) in compiled)
            if reason is not None:
                raise ValueError(f"{_ATTACH}: {name} {reason}")
            layers[module] = MultiLoRALinear.from_linear(module, pool, name)
    put_layers(model, layers)
    return tuple(chosen)


def _objection(module: Any, compiled: bool) -> str | None:
    if isinstance(module, MultiLoRALinear):
        return "has a pool already; detach_pool takes it away"
    return replacement_objection(module, compiled) if hasattr(module, "weight") else None


def detach_pool(model: nn.Module) -> tuple[str, ...]:
    """Undoes `attach_pool`: layers without adapters stand in the places of all `MultiLoRALinear` again, with the same
    weights and biases (`MultiLoRALinear.to_linear`).

    Returns:
        The names of the layers, in the model's order.

    Raises:
        ValueError: the model is itself a `MultiLoRALinear`.
        TypeError: `model` is no module.
    """
    return put_linears_back(model, MultiLoRALinear, "detach_pool")
