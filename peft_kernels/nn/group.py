"""`FusedLoRAGroup` and `FusedLoRASwiGLU`: linear layers that are computed together and stay layers of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from peft_kernels.checks import check_rank
from peft_kernels.functional import gated_activation, lora_linear_group, lora_swiglu_mlp
from peft_kernels.functional.gated_activation import check_activation
from peft_kernels.nn._layers import flags_kept, is_hooked
from peft_kernels.nn._merge import merge_all
from peft_kernels.nn.lora import FusedLoRALinear
from peft_kernels.nn.nf4 import NF4Linear, is_quantised_linear
from peft_kernels.nn.qlora import FusedQLoRALinear

_FROZEN = (nn.Linear, NF4Linear)
_ADAPTED = (FusedLoRALinear, FusedQLoRALinear)


class LinearGroup(nn.Module):
    """Named children, `FusedLoRALinear`, `FusedQLoRALinear`, or frozen `nn.Linear` and `NF4Linear`, that one function
    computes.

    Names and parameters are those of the children: checkpoints, `save_adapter`, `merge_adapter` and the like see
    layers. A child that is more than plain LoRA (DoRA, an adapter bias), merged, hooked (FSDP, offloading, a user's
    hooks) or of another type by now (compiled, a subclass) is called itself; then all of them are, one by one, with the
    same meaning.
    """

    def __init__(self, layers: Sequence[nn.Module], names: Sequence[str]) -> None:
        super().__init__()
        kind = type(self).__name__
        if len(names) != len(layers) or len(set(names)) != len(names):
            raise ValueError(f"{kind}: names is {list(names)}; expected {len(layers)} different names")
        for name, layer in zip(names, layers, strict=True):
            if not isinstance(layer, FusedLoRALinear) and type(layer) not in _FROZEN:
                given = f"{type(layer).__module__}.{type(layer).__qualname__}"
                raise TypeError(
                    f"{kind}: {name} is {given}; expected FusedLoRALinear, or exactly torch.nn.Linear or NF4Linear"
                )
        self.names = tuple(names)
        for name, layer in zip(names, layers, strict=True):
            self.add_module(name, layer)

    @property
    def layers(self) -> tuple[Any, ...]:
        """The children in their order."""
        modules = self._modules
        return tuple([modules[name] for name in self.names])

    @property
    def merged(self) -> bool:
        """Whether the weights of all children with an update include it."""
        return all(layer.merged for layer in self._adapted().values())

    def merge(self) -> None:
        """Folds each child's update into its weight.

        Raises:
            ValueError: a merged weight would not be finite; no child is changed.
        """
        merge_all(self._adapted(), type(self).__name__)

    def unmerge(self) -> None:
        """Puts back the weights that `merge` set aside."""
        for layer in self._adapted().values():
            layer.unmerge()

    def to_linears(self) -> tuple[nn.Linear, ...]:
        """For each child a plain `nn.Linear` with the merged weight; a frozen one is returned itself, and one in 4 bits
        in full.

        Raises:
            ValueError: a merged weight is not finite.
        """
        return tuple(layer if type(layer) is nn.Linear else layer.to_linear() for layer in self.layers)

    def _adapted(self) -> dict[str, FusedLoRALinear]:
        named = zip(self.names, self.layers, strict=True)
        return {name: layer for name, layer in named if isinstance(layer, FusedLoRALinear)}


class FusedLoRAGroup(LinearGroup):
    """Linear layers over one x, such as q, k and v, with one pass over x for all updates.

    y_j = x W_jᵀ + b_j + scaling_j · (dropout_j(x) A_jᵀ) B_jᵀ, computed by `functional.lora_linear_group`: x is kept for
    backward once, and widths (grouped-query attention) and ranks may differ.

    Args:
        layers: `FusedLoRALinear` or, for projections without update, `nn.Linear`, all with the same in_features; each
            dense or in 4 bits (`FusedQLoRALinear`, `NF4Linear`).
        names: theirs as children; "0", "1", ... when None.

    Raises:
        ValueError: no layers, other in_features, other dtypes of adapters, or names that do not fit.
        TypeError: a layer of another type (a subclass may compute something else).
    """

    def __init__(self, layers: Sequence[nn.Module], names: Sequence[str] | None = None) -> None:
        super().__init__(layers, _names(names, len(layers)))
        if not layers:
            raise ValueError("FusedLoRAGroup: layers is empty; expected at least one")
        _check_same("FusedLoRAGroup", "in_features", self.names, [layer.in_features for layer in self.layers])
        adapted = self._adapted()
        _check_same("FusedLoRAGroup", "adapter dtype", tuple(adapted), [a.lora_A.dtype for a in adapted.values()])

    @classmethod
    def from_linears(
        cls, linears: Sequence[nn.Module], r: int | Sequence[int | None] = 8, *, names: Sequence[str] | None = None,
        **options: Any,
    ) -> FusedLoRAGroup:  # fmt: skip
        """Puts updates beside existing layers, sharing and freezing their weights and biases.

        Args:
            linears: `nn.Linear` or transformers' `Conv1D`, or layers in 4 bits (`NF4Linear`, bitsandbytes'
                `Linear4bit`), which stay in them; what is a `FusedLoRALinear` already stays as it is.
            r: rank of all, or of each; None for a layer that gets no update.
            names: of the children; "0", "1", ... when None.
            options: of `FusedLoRALinear.from_linear`, for all.

        Returns:
            The group, in the training mode of the first layer.

        Raises:
            ValueError, TypeError: as for the class and for `FusedLoRALinear.from_linear`; nothing is frozen then.
        """
        with flags_kept(linears):
            return cls(_adapt(cls.__name__, linears, r, options), names).train(linears[0].training)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """All outputs.

        Args:
            x: [..., in_features].
            token_mask: boolean [...] or None: rows where it is False get no update.

        Returns:
            A tuple with y_j [..., out_features_j] in the order of the children.

        Raises:
            ValueError: as `functional.lora_linear_group`, and `token_mask` for children that are merged or have DoRA.
        """
        layers = self.layers
        if not all(map(_is_plain, layers)):
            return tuple(_call(layer, x, token_mask) for layer in layers)
        weights, biases, lora_As, lora_Bs, scalings, dropouts = zip(*map(_operands, layers), strict=True)
        return lora_linear_group(
            x, weights, lora_As, lora_Bs, scalings=scalings, biases=biases, dropout_p=dropouts, token_mask=token_mask
        )


class FusedLoRASwiGLU(LinearGroup):
    """A gated feed-forward block, y = down(act(gate(x)) ⊙ up(x)), whose linear layers have low-rank updates.

    Computed by `functional.lora_swiglu_mlp`: x, gate(x), up(x) and the products of rank r are kept for backward, the
    activation is computed again.

    Args:
        gate, up: `FusedLoRALinear` or, without update, `nn.Linear`, from hidden to intermediate; dense or in 4 bits
            (`FusedQLoRALinear`, `NF4Linear`).
        down: the same, from intermediate to out.
        activation: "silu" (SwiGLU), "gelu" (GeGLU with the error function) or "gelu_tanh".
        names: of the three children.

    Raises:
        ValueError: sizes, dtypes of adapters or names do not fit, or no such activation.
        TypeError: a layer of another type (a subclass may compute something else).
    """

    def __init__(
        self,
        gate: nn.Module,
        up: nn.Module,
        down: nn.Module,
        *,
        activation: str = "silu",
        names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__((gate, up, down), names)
        check_activation("FusedLoRASwiGLU", activation)
        self.activation = activation
        first, second, third = self.layers
        for sizes in ("in_features", "out_features"):
            _check_same("FusedLoRASwiGLU", sizes, self.names[:2], [getattr(first, sizes), getattr(second, sizes)])
        if third.in_features != first.out_features:
            raise ValueError(
                f"FusedLoRASwiGLU: {names[2]} has {third.in_features} input features; expected {first.out_features}"
            )
        adapted = self._adapted()
        _check_same("FusedLoRASwiGLU", "adapter dtype", tuple(adapted), [a.lora_A.dtype for a in adapted.values()])

    @classmethod
    def from_linears(
        cls, gate: nn.Module, up: nn.Module, down: nn.Module, r: int | Sequence[int | None] = 8, *,
        activation: str = "silu", names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"), **options: Any,
    ) -> FusedLoRASwiGLU:  # fmt: skip
        """Puts updates beside existing layers, sharing and freezing their weights and biases.

        Args:
            gate, up, down: `nn.Linear`, or layers in 4 bits, which stay in them; what is a `FusedLoRALinear` already
                stays as it is.
            r: rank of all, or of each; None for a layer that gets no update.
            activation, names: as for the class.
            options: of `FusedLoRALinear.from_linear`, for all three.

        Returns:
            The block, in the training mode of `gate`.

        Raises:
            ValueError, TypeError: as for the class and for `FusedLoRALinear.from_linear`; nothing is frozen then.
        """
        linears = (gate, up, down)
        with flags_kept(linears):
            block = cls(*_adapt(cls.__name__, linears, r, options), activation=activation, names=names)
        return block.train(gate.training)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output.

        Args:
            x: [..., hidden].

        Returns:
            y: [..., out] in x's dtype.

        Raises:
            ValueError, TypeError: as `functional.lora_swiglu_mlp`.
        """
        layers = self.layers
        if not all(map(_is_plain, layers)):
            gate, up, down = layers
            return down(gated_activation(gate(x), up(x), activation=self.activation))
        weights, biases, lora_As, lora_Bs, scalings, dropouts = zip(*map(_operands, layers), strict=True)
        return lora_swiglu_mlp(
            x,
            weights,
            lora_As,
            lora_Bs,
            scalings=scalings,
            biases=biases,
            activation=self.activation,
            dropout_p=dropouts,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


def _names(names: Sequence[str] | None, count: int) -> Sequence[str]:
    return [str(index) for index in range(count)] if names is None else names


def _check_same(kind: str, what: str, names: Sequence[str], values: Sequence[Any]) -> None:
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise ValueError(f"{kind}: {what} of {name} is {value}; expected {values[0]}, as of {names[0]}")


def _adapt(kind: str, linears: Sequence[nn.Module], r: int | Sequence[int | None], options: dict) -> list[nn.Module]:
    ranks = [r] * len(linears) if not isinstance(r, Sequence) else r
    if len(ranks) != len(linears):
        raise ValueError(f"{kind}.from_linears: r has {len(ranks)} entries for {len(linears)} layers")
    for rank in ranks:
        if rank is not None:
            check_rank(f"{kind}.from_linears", "r", rank)
    layers: list[nn.Module] = []
    for linear, rank in zip(linears, ranks, strict=True):
        if isinstance(linear, FusedLoRALinear):
            layers.append(linear)
        elif rank is None:
            layer = NF4Linear.from_linear(linear) if is_quantised_linear(linear) else linear
            layers.append(layer.requires_grad_(False))
        else:
            adapted = FusedQLoRALinear if is_quantised_linear(linear) else FusedLoRALinear
            layers.append(adapted.from_linear(linear, rank, **options))
    return layers


def _is_plain(layer: Any) -> bool:
    """Whether calling the layer would do no more than the fused function does with its tensors."""
    kind = type(layer)
    return (kind in _FROZEN or (kind in _ADAPTED and layer._lean)) and not is_hooked(layer)


def _operands(layer: Any) -> tuple:
    """(weight, bias, A, B, scaling, probability), A and B None for a layer without update."""
    if type(layer) in _FROZEN:
        return layer.weight, layer.bias, None, None, 1.0, 0.0
    dropout_p = layer.lora_dropout if layer.training else 0.0
    return layer.weight, layer.bias, layer.lora_A, layer.lora_B, layer.scaling, dropout_p


def _call(layer: Any, x: Tensor, token_mask: Tensor | None) -> Tensor:
    return layer(x) if token_mask is None or type(layer) in _FROZEN else layer(x, token_mask=token_mask)
