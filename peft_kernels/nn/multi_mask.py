"""`MultiMaskLinear`: a linear layer each row of which sees its own subnetwork of one weight, and how a whole model gets
them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.checks import check_floating, check_mask_of
from peft_kernels.formats._open_ids import BASE_NAME, OpenIds
from peft_kernels.formats.mask import PackedMask, PackedMaskStack, full, stack
from peft_kernels.formats.strict_json import short
from peft_kernels.functional import multi_mask_linear
from peft_kernels.nn._masked_state import words_problem
from peft_kernels.nn._sites import (
    all_sites,
    check_open,
    compiled_modules,
    put_layers,
    put_linears_back,
    replacement_objection,
    unwrap,
)
from peft_kernels.nn.lora import dense_weight_of, plain_linear
from peft_kernels.nn.masked import MaskedLinear


class Subnetworks:
    """The names of the subnetworks of a model, and which of them the rows of a batch run.

    Made by `attach_masks`. Copies of a model share it.

    Attributes:
        names: in the order of their ids.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._numbers = {name: i for i, name in enumerate(self.names)} | {BASE_NAME: -1}
        self._open = OpenIds()

    def ids(self, names: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """The mask ids of these names.

        Args:
            names: one for each row or sample; "__base__" for the whole weight.
            device: of the model.

        Returns:
            int64 [len(names)] on the device, -1 for "__base__".

        Raises:
            ValueError: a name that is not known.
            TypeError: a single string.
        """
        if isinstance(names, str):
            raise TypeError(f"Subnetworks.ids: names is {short(names)}; expected a sequence of names")
        unknown = [name for name in names if name not in self._numbers]
        if unknown:
            raise ValueError(f"Subnetworks.ids: no subnetwork {short(unknown[0])}; there are {', '.join(self.names)}")
        return torch.tensor([self._numbers[name] for name in names], dtype=torch.int64, device=device)

    @contextlib.contextmanager
    def use(self, names: Sequence[str], device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """A block in which the model's rows or samples run these subnetworks.

        Args, yields and raises as `ids`.
        """
        with self._open.opened(self.ids(names, device)) as ids:
            yield ids

    @property
    def active_ids(self) -> Tensor | None:
        """The ids of the innermost `use` block that this thread has open, or None."""
        return self._open.active

    def __deepcopy__(self, memo: dict) -> Subnetworks:
        return self

    def __reduce__(self):
        return Subnetworks, (self.names,)


class MultiMaskLinear(nn.Module):
    """y[m] = x[m] (W ⊙ M_i)ᵀ + b, i = mask_ids[m], with one dense W for all masks of one bit a weight, computed by
    `functional.multi_mask_linear`. Made by `from_linear` or `attach_masks`.

    W and b train where they did in the layer that this one stands for: dW sums what each row gives inside its own mask.
    The masks are the buffer `mask_words`, int32 [masks, out_features, ceil(in_features / 32)]: casts leave them alone,
    state dicts hold them, and loading replaces them by as many of the same shape.

    Attributes:
        weight: [out_features, in_features].
        bias: [out_features] or None.
        masks: the `PackedMaskStack`.
        subnetworks: the `Subnetworks` whose block says which masks run, or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    mask_words: Tensor
    in_features: int
    out_features: int
    subnetworks: Subnetworks | None
    _kind: Any  # the type of the layer that this one stands for

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("MultiMaskLinear stands for a layer that exists; use from_linear or attach_masks")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        masks: Sequence[PackedMask] | PackedMaskStack,
        subnetworks: Subnetworks | None = None,
    ) -> MultiMaskLinear:
        """Puts masks over an existing layer, sharing its weight and bias.

        Args:
            linear: an `nn.Linear`, or a transformers `Conv1D`, whose [in, out] weight is shared as a transposed,
                frozen view.
            masks: of the weight's shape, on its device; they are copied.
            subnetworks: whose block says which masks run where `forward` is not told.

        Returns:
            A layer in the same training mode as `linear`.

        Raises:
            TypeError: `linear` is neither (a subclass may compute something else), or its weight not floating-point.
            ValueError: no mask, or one that does not fit.
        """
        where = f"{cls.__name__}.from_linear"
        weight = dense_weight_of(cls.__name__, linear)
        check_floating(where, "the weight", weight)
        listed = [masks.mask(i) for i in range(len(masks))] if isinstance(masks, PackedMaskStack) else list(masks)
        for i, mask in enumerate(listed):
            check_mask_of(where, f"masks[{i}]", mask, weight)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = weight.shape
        layer.weight, layer.subnetworks = weight, subnetworks
        layer.register_parameter("bias", linear.bias)  # type: ignore[arg-type]
        layer.register_buffer("mask_words", stack(listed).words)
        layer._kind = type(linear)
        return layer.train(linear.training)

    @property
    def masks(self) -> PackedMaskStack:
        return PackedMaskStack(self.mask_words, torch.Size((self.out_features, self.in_features)))

    def forward(self, x: Tensor, mask_ids: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features].
            mask_ids: int32 or int64, one for each row of x or for each sample, shape x.shape[:-1] or x.shape[:1]; -1
                for the whole W. None takes those of the `Subnetworks.use` block that is open.

        Returns:
            y: [..., out_features] in x's dtype.

        Raises:
            RuntimeError: no ids are given, and this thread has no such block open.
            ValueError, TypeError: as `functional.multi_mask_linear`.
        """
        if mask_ids is None:
            mask_ids = None if self.subnetworks is None else self.subnetworks.active_ids
            if mask_ids is None:
                raise RuntimeError(
                    "MultiMaskLinear: called without mask_ids, and outside of subnetworks.use(names); for the whole "
                    'weight: with subnetworks.use(["__base__"] * samples)'
                )
        return multi_mask_linear(x, self.weight, self.masks, mask_ids, self.bias)

    def subnetwork(self, number: int) -> MaskedLinear:
        """One subnetwork as a layer of its own, with a copy of W inside its mask and of b, for one that goes alone."""
        weight, bias = (
            None if p is None else nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            for p in (self.weight, self.bias)
        )
        assert weight is not None
        linear = plain_linear(nn.Linear, weight, bias).train(self.training)
        return MaskedLinear.from_linear(linear, self.masks.mask(number))

    def to_linear(self) -> nn.Module:
        """The layer without masks, of the type that `from_linear` took, sharing weight and bias."""
        return plain_linear(self._kind, self.weight, self.bias).train(self.training)

    def _apply(self, fn, recurse: bool = True):
        words = self.mask_words
        super()._apply(fn, recurse)
        if self.mask_words.dtype != words.dtype:  # .type(dtype) casts integers too
            self.mask_words = words.to(self.mask_words.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        key = f"{prefix}mask_words"
        problem = self._words_problem(state_dict[key]) if key in state_dict else None
        if problem is not None:
            error_msgs.append(f"{key} {problem}")  # before anything of this module is changed
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _words_problem(self, words: Any) -> str | None:
        """Why what a checkpoint has cannot be the words of these masks."""
        if not isinstance(words, Tensor) or words.ndim != 3 or len(words) != len(self.mask_words):
            shape = tuple(words.shape) if isinstance(words, Tensor) else type(words).__name__
            return f"has shape {shape}; expected {tuple(self.mask_words.shape)}"
        rows = torch.Size((len(words) * self.out_features, self.in_features))
        return words_problem(words.flatten(0, 1), PackedMask(self.mask_words.flatten(0, 1), rows))

    def extra_repr(self) -> str:
        words, sparsities = self.mask_words, ""
        if not words.is_meta:
            parts = [1 - self.masks.mask(i).density() for i in range(len(words))]
            sparsities = f", sparsity={min(parts):.4g} to {max(parts):.4g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"masks={len(words)}{sparsities}"
        )


_ATTACH = "attach_masks"


def attach_masks(model: nn.Module, subnetworks: Mapping[str, Mapping[str, PackedMask]]) -> Subnetworks:
    """Puts many subnetworks over one model, in place: its linear layers become `MultiMaskLinear`. The model then runs
    inside of `use(names)`, with a name for each sample:

        tickets = {"a": masks_of(first), "b": masks_of(second)}     # of the same dense weights
        subnetworks = attach_masks(model, tickets)
        with subnetworks.use(["a", "b", "__base__"]):
            y = model(x)                                            # three samples, one weight

    Args:
        model: with `nn.Linear` or transformers `Conv1D` layers, dense; not yet wrapped by DDP or FSDP.
        subnetworks: by name, the masks of a model by the layer's name, as `peft_kernels.pruning` makes them. A layer
            that only some of them have masks for is whole in the others.

    Returns:
        The `Subnetworks` that choose.

    Raises:
        ValueError: no subnetwork, a layer that the model does not have or that cannot be replaced, a mask that does not
            fit. The model is unchanged.
        TypeError: a layer that is not linear, or a subclass.
    """
    wrapped, model = model, unwrap(model)
    check_open(wrapped, _ATTACH)
    layers = {name: None for masks in subnetworks.values() for name in masks}
    if not layers:
        raise ValueError(f"{_ATTACH}: no masks; expected at least one subnetwork with one")
    if BASE_NAME in subnetworks:
        raise ValueError(f"{_ATTACH}: a subnetwork is named {BASE_NAME!r}, which is the whole model")
    found = {name: site.module for site in all_sites(model) for name in site.names}
    missing = [name for name in layers if name not in found]
    if missing:
        raise ValueError(f"{_ATTACH}: the model has no layer {missing[0]}, which there are masks for")
    choice, compiled = Subnetworks(tuple(subnetworks)), compiled_modules(model)
    made: dict[nn.Module, nn.Module] = {}
    for name in layers:
        linear: Any = found[name]
        weight = dense_weight_of(f"{_ATTACH}: {name}: MultiMaskLinear", linear)
        reason = replacement_objection(linear, id(linear) in compiled)
        if reason is None and linear in made:
            reason = "has two names, and masks under both"
        if reason is not None:
            raise ValueError(f"{_ATTACH}: {name} {reason}")
        masks = [each.get(name) or full(*weight.shape, device=weight.device) for each in subnetworks.values()]
        try:
            made[linear] = MultiMaskLinear.from_linear(linear, masks, choice)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{_ATTACH}: {name}: {error}") from error
    put_layers(model, made)
    return choice


def detach_masks(model: nn.Module) -> tuple[str, ...]:
    """Undoes `attach_masks`: layers with the same weights and biases stand in the places of all `MultiMaskLinear` again
    (`MultiMaskLinear.to_linear`).

    Returns:
        The names of the layers, in the model's order.

    Raises:
        ValueError: the model is itself a `MultiMaskLinear`.
        TypeError: `model` is no module.
    """
    return put_linears_back(model, MultiMaskLinear, "detach_masks")
