"""`MaskedLinear`: a linear layer over a pruned weight, in the place of `nn.Linear` or one of `torch.nn.utils.prune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.checks import check_floating
from peft_kernels.formats.mask import PackedMask, full, popcount
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import Positions
from peft_kernels.functional import mask_apply, mask_apply_, masked_linear
from peft_kernels.nn._layers import check_flags, is_conv1d
from peft_kernels.nn._masked_state import Masked, is_masked, mask_of, words_problem
from peft_kernels.nn._pruned import taken_from_pruned
from peft_kernels.nn.lora import is_linear
from peft_kernels.nn.nf4 import is_quantised_linear, weight_of

_PLACES_AT_ONCE = 1 << 20


class MaskedLinear(Masked):
    """y = x (W ⊙ M)ᵀ + b with a mask of one bit a weight, computed by `functional.masked_linear`.

    W is 0 outside the mask from the start, after each `set_mask` and after loading, and its gradient is 0 there. So
    optimisers whose state is 0 there too (SGD with momentum, Adam, weight decay, ... that began with this mask) keep it
    so, bit for bit. After another mask their momentum may write outside of it: what the layer computes is exact all the
    same unless `weight_is_masked` was promised, and `enforce_` makes W so again.

    With `grad_layout="compact"` what trains is `values`, the kept weights in row-major order: gradient and optimiser
    state are as small as the mask allows, and checkpoints hold no zeros. W is then kept beside them and filled from
    them, at every forward in training mode, since an optimiser may write without leaving a trace; in evaluation mode
    after a change that PyTorch counts and after each `.eval()`. Another mask makes another parameter `values`, for
    which a new optimiser has to be made. A layer of either layout loads what one of the other has saved.

    Over an `NF4Weight` (`from_linear` of an `NF4Linear`) W is frozen. How that moves, is saved and loaded:
    `_quantised.Quantised`; the mask: `_masked_state.Masked`.

    Args:
        in_features: K, the size of x's last dimension.
        out_features: N, the size of y's last dimension.
        bias: whether there is a bias. It trains, as in `nn.Linear`.
        mask: [out_features, in_features], a `PackedMask` or a tensor whose non-zero elements are kept; None keeps all.
        grad_layout: "dense" or "compact".
        weight_is_masked: promises that whoever writes to W leaves it 0 outside the mask: forward and dx are then plain
            matmuls. With "compact", and for 4 bits that are 0 outside, it is so without a promise.
        device: device of all tensors.
        dtype: dtype of W and b; the default dtype when None.

    Attributes:
        weight: [out_features, in_features]: a parameter, with "compact" a tensor, or an `NF4Weight`.
        values: with "compact", the parameter [nnz]; else None.
        bias: [out_features] or None.
        mask: the `PackedMask`.
        sparsity: the part of the weights that it leaves out.

    Raises:
        ValueError: a mask of another shape or device, an unknown `grad_layout`.
        TypeError: an argument of the wrong type, or an integer dtype.
    """

    weight: Any  # nn.Parameter | Tensor | NF4Weight
    values: nn.Parameter | None
    bias: nn.Parameter | None
    _places: Positions | None = None
    _seen: tuple[int, int] | None = None  # the parameter `values` and its version that W was last filled from

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mask: PackedMask | Tensor | None = None,
        grad_layout: str = "dense",
        weight_is_masked: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if mask is None:
            mask = full(out_features, in_features, device=base.weight.device)
        self._set_up(base.weight, base.bias, mask, grad_layout, weight_is_masked)

    def _set_up(self, weight, bias, mask, grad_layout: str, weight_is_masked: bool) -> None:
        kind = type(self).__name__
        check_flags(kind, bias is not None, weight_is_masked=weight_is_masked)
        if grad_layout not in ("dense", "compact"):
            raise ValueError(f"{kind}: grad_layout is {grad_layout!r}; expected 'dense' or 'compact'")
        self.grad_layout, quantised = grad_layout, isinstance(weight, NF4Weight)
        if quantised and grad_layout == "compact":
            raise ValueError(f"{kind}: grad_layout is 'compact', but a weight of 4 bits does not train")
        if not quantised:
            check_floating(kind, "weight", weight)
        mask = mask_of(kind, mask, weight)
        self.out_features, self.in_features = weight.shape
        clean = is_masked(weight, mask)
        self.weight_is_masked = clean if quantised else weight_is_masked or grad_layout == "compact"
        if grad_layout == "compact":
            self.weight = mask_apply(weight, mask)
            self._put_values(mask, weight.requires_grad)
        elif clean or quantised:
            self.weight = weight
        else:
            self.weight = nn.Parameter(mask_apply(weight, mask), requires_grad=weight.requires_grad)
        if grad_layout == "dense":
            self.register_parameter("values", None)
        self.register_parameter("bias", bias)
        self._put_mask(mask)

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        mask: PackedMask | Tensor | None = None,
        *,
        grad_layout: str = "dense",
        weight_is_masked: bool = False,
    ) -> MaskedLinear:
        """A pruned layer in the place of an existing one, which stays as it is.

        Args:
            linear: an `nn.Linear`, a transformers `Conv1D`, or a layer in 4 bits (`NF4Linear`, bitsandbytes'
                `Linear4bit`).
            mask: as for the class; None keeps what is not 0.
            grad_layout, weight_is_masked: as for the class.

        Returns:
            A layer in the same training mode as `linear`, with its bias. Its weight is that of `linear` where that is
            0 outside the mask already (with "compact" never), else a copy.

        Raises:
            TypeError: `linear` is none of these (a subclass may compute something else).
            ValueError: as for the class.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(prunable_weight(cls.__name__, linear), linear.bias, mask, grad_layout, weight_is_masked)
        return layer.train(linear.training)

    @classmethod
    def from_pruned(cls, module: Any, *, grad_layout: str = "dense", weight_is_masked: bool = False) -> MaskedLinear:
        """The layer that `torch.nn.utils.prune` made of an `nn.Linear`: `weight_orig` and `weight_mask` of 32 bits a
        weight each, multiplied before every forward, become one weight and a mask of one bit.

        Args:
            module: an `nn.Linear` whose weight was pruned, by whichever methods; it stays as it is. What `prune.remove`
                has made permanent is for `from_linear`.
            grad_layout, weight_is_masked: as for the class.

        Returns:
            A layer in the same training mode with the same bias and a copy of the weight.

        Raises:
            TypeError: `module` is no `nn.Linear`.
            ValueError: its weight is not pruned, its bias is, its mask is not of zeros and ones, or it has other hooks
                or parametrisations, which would be lost.
        """
        weight, mask, bias = taken_from_pruned(f"{cls.__name__}.from_pruned", module)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(weight, bias, mask, grad_layout, weight_is_masked)
        return layer.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features].

        Returns:
            y: [..., out_features] in x's dtype.

        Raises:
            ValueError, TypeError: as `functional.masked_linear`.
        """
        if self.grad_layout == "dense":
            return masked_linear(x, self.weight, self.mask, self.bias, weight_is_masked=self.weight_is_masked)
        self._refresh()
        return masked_linear(
            x, self.weight, self.mask, self.bias,
            weight_is_masked=True, grad_layout="compact", values=self.values, places=self._places,
        )  # fmt: skip

    @torch.no_grad()
    def set_mask(self, mask: PackedMask | Tensor) -> None:
        """Takes another mask; W is set to 0 where that keeps nothing, and starts at 0 where the old one kept nothing.

        With "compact" and a mask that differs, `values` is another parameter afterwards. An `NF4Weight` stays as it is
        (what is outside has no effect).

        Raises:
            ValueError, TypeError: it does not fit; the layer is unchanged.
        """
        mask = mask_of(type(self).__name__, mask, self.weight)
        if self.grad_layout == "compact":
            if mask.equal(self.mask):
                return
            self._refresh()
            mask_apply_(self.weight, mask)
            self._put_values(mask, self._values().requires_grad)
        elif isinstance(self.weight, NF4Weight):
            self.weight_is_masked = is_masked(self.weight, mask)
        else:
            mask_apply_(self.weight, mask)
        self._put_mask(mask)

    @torch.no_grad()
    def enforce_(self) -> None:
        """Sets W to exactly 0 outside the mask, in place and without a wait for the device, whatever was written there.
        What trains under another mask than it began with needs it once after the optimiser's last step."""
        if self.grad_layout == "compact":
            self.weight.zero_()
            self._seen = None
            self._refresh()
        elif not isinstance(self.weight, NF4Weight):
            mask_apply_(self.weight, self.mask)

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A new, plain `nn.Linear` with W ⊙ M and a copy of the bias, not requiring gradients.

        Args:
            dtype: of both; None takes the weight's, of 4 bits that of what was quantised.
        """
        weight = self.weight
        if isinstance(weight, NF4Weight):
            weight = mask_apply_(weight.dequantize(dtype), self.mask)
        else:
            if self.grad_layout == "compact":
                self._refresh()
            weight = mask_apply(weight, self.mask, dtype)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype, copy=True), requires_grad=False)
        return linear.train(self.training)

    def train(self, mode: bool = True) -> MaskedLinear:
        self._seen = None
        return super().train(mode)

    def extra_repr(self) -> str:
        dense = not isinstance(self.weight, NF4Weight) and self.grad_layout == "dense"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={self.sparsity:.4g}"
            + (", grad_layout=compact" if self.grad_layout == "compact" else "")
            + (", weight_is_masked=True" if dense and self.weight_is_masked else "")
            + self._quantised_repr()
        )

    def _values(self) -> nn.Parameter:
        values = self.values
        assert values is not None  # of the compact layout, as all callers are
        return values

    def _put_values(self, mask: PackedMask, requires_grad: bool) -> None:
        """Makes `values` from W."""
        if self.weight.is_meta:
            raise ValueError(
                f"{type(self).__name__}: grad_layout is 'compact', but the weight is on the meta device: how many "
                "weights the mask keeps is not known there"
            )
        self._places = mask.positions()
        kept = self.weight.view(-1).index_select(0, self._places.flat)
        self.values = nn.Parameter(kept, requires_grad=requires_grad)
        self._seen = (id(self.values), self.values._version)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Fills W from `values`."""
        values = self._values()
        if torch.compiler.is_compiling():
            _fill(self.weight, self._place(), values)
            return
        now = (id(values), values._version)
        if now != self._seen:
            _fill(self.weight, self._place(), values)
            self._seen = now
        elif self.training:
            # The same numbers, unless they were written without a trace. `.data`, so that a second forward before
            # backward does not look like a change of what the first has kept.
            _fill(self.weight.data, self._place(), values)

    def _place(self) -> Tensor:
        assert self._places is not None
        return self._places.flat

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        super()._apply(fn, recurse)
        if self._places is not None:
            self.weight, self._seen = fn(self.weight), None
            self._places = self._places.to(self.weight.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        state_dict = self._in_own_layout(state_dict, prefix)
        words, loaded = state_dict.get(f"{prefix}mask_words"), state_dict.get(f"{prefix}values")
        if words_problem(words, self.mask) is None and isinstance(loaded, Tensor) and not words.is_meta:
            count = int(popcount(words).sum())
            if tuple(loaded.shape) != (count,):
                error_msgs.append(
                    f"{prefix}values has shape {tuple(loaded.shape)}; expected ({count},), as many as the mask keeps"
                )
                return
            if self.values is not None and count != self.values.numel():
                values = self.values.detach().new_zeros(count)
                self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def _in_own_layout(self, state: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """`state` with the weight as this layer's `grad_layout` has it, where it is that of a layer with the other one;
        else as it is, for loading to say what is wrong with it."""
        own, other = ("values", "weight") if self.grad_layout == "compact" else ("weight", "values")
        words, given = state.get(f"{prefix}mask_words"), state.get(f"{prefix}{other}")
        if f"{prefix}{own}" in state or isinstance(self.weight, NF4Weight):
            return state
        if not isinstance(words, Tensor) or words_problem(words, self.mask) is not None:
            return state
        if not isinstance(given, Tensor) or not given.is_floating_point() or hasattr(given, "full_tensor"):
            return state
        shape = (int(popcount(words).sum()),) if other == "values" else self.mask.shape
        if given.shape != shape or given.is_meta or words.is_meta:
            return state
        flat = self.mask._replace(words=words).positions().flat.to(given.device)
        if own == "values":
            made = given.reshape(-1).index_select(0, flat)
        else:
            made = given.new_zeros(self.mask.shape)
            _fill(made, flat, given)
        return {**{key: value for key, value in state.items() if key != f"{prefix}{other}"}, f"{prefix}{own}": made}

    @torch.no_grad()
    def _mask_loaded(self) -> None:
        if self.grad_layout == "compact":
            self._places = self.mask.positions()
            self.weight.zero_()
            self._seen = None  # the next forward fills it, for which values that are sharded are whole
        elif isinstance(self.weight, NF4Weight):
            self.weight_is_masked = is_masked(self.weight, self.mask)
        elif not self.weight.is_meta and not hasattr(self.weight, "full_tensor"):
            # Of a sharded weight the forward leaves out what is outside the mask; nothing can be enforced here.
            self.enforce_()


def _fill(weight: Tensor, flat: Tensor, values: Tensor) -> None:
    """Writes `values` to their places in a contiguous weight, a few at a time: PyTorch wants places of 64 bits."""
    memory, values = weight.view(-1), values.detach()
    for start in range(0, flat.numel(), _PLACES_AT_ONCE):
        some = slice(start, start + _PLACES_AT_ONCE)
        memory.index_copy_(0, flat[some].long(), values[some])


def prunable_weight(name: str, linear: Any) -> nn.Parameter | NF4Weight:
    """The weight [out_features, in_features] of a layer that `from_linear` takes; of a `Conv1D` a copy.

    Raises:
        TypeError: it is no such layer.
    """
    if is_quantised_linear(linear):
        return weight_of(name, linear, 64, True)
    if not is_linear(linear):
        kind = type(linear)
        raise TypeError(
            f"{name}.from_linear: got {kind.__module__}.{kind.__qualname__}; expected exactly torch.nn.Linear, "
            "transformers' Conv1D, NF4Linear or bitsandbytes' Linear4bit"
        )
    if not is_conv1d(linear):
        return linear.weight
    return nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=linear.weight.requires_grad)
