"""`SparseLinear`: a linear layer over a compressed, pruned weight, in the place of `nn.Linear`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats import sparse
from peft_kernels.formats._sparse_files import check, entry_of
from peft_kernels.formats.mask import PackedMask
from peft_kernels.formats.sparse import BlockWeight, SemiStructuredWeight, SparseWeight
from peft_kernels.functional import sparse_linear
from peft_kernels.kernels import _semi_structured
from peft_kernels.nn._layers import is_conv1d
from peft_kernels.nn.lora import is_linear
from peft_kernels.nn.nf4 import NF4Linear

_STRUCTURE, _DESCRIPTION = "structure", "layout"


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W as `formats.sparse.compress` left it, computed by `functional.sparse_linear`.

    The kept numbers are the parameter `values`, frozen unless `trainable`, so that casts, optimisers and distributed
    wrappers treat them as those of `nn.Linear`. Where they are stays in plain attributes, which `.to(device)` moves and
    no cast touches; the state dict has all of it, as tensors. Of a weight in 4 bits nothing is a parameter.

    Args:
        weight: [out_features, in_features] compressed; its memory is taken over.
        bias: [out_features] or None.
        trainable: whether `values` train; layout "block" only.
        semi_structured: layout "2:4" only: multiply through PyTorch's semi-structured tensors where the weight is on a
            GPU that has them, from a second form of the weight made at the first call. Off by default: it has never
            been run, nor measured to win.

    Raises:
        TypeError: no compressed weight.
        ValueError: an option that the layout does not have.
    """

    values: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: SparseWeight,
        bias: Tensor | None = None,
        *,
        trainable: bool = False,
        semi_structured: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(weight, SparseWeight):
            raise TypeError(
                f"SparseLinear: weight is {type(weight).__name__}; expected what peft_kernels.formats.sparse.compress "
                "returns"
            )
        if trainable and not isinstance(weight, BlockWeight):
            raise ValueError(f"SparseLinear: trainable is for layout 'block'; the weight is of {weight.layout!r}")
        if semi_structured and not isinstance(weight, SemiStructuredWeight):
            raise ValueError(f"SparseLinear: semi_structured is for layout '2:4'; the weight is of {weight.layout!r}")
        self.semi_structured = semi_structured
        self._set(weight, trainable)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    def _set(self, weight: SparseWeight, trainable: bool) -> None:
        self.out_features, self.in_features = weight.shape
        self._layout, self._numbers, self._dtype = weight.layout, weight.numbers, weight.dtype
        first, *others = weight.tensors
        values = nn.Parameter(first.detach(), requires_grad=trainable) if first.is_floating_point() else None
        self.register_parameter("values", values)
        self._others = others if values is not None else [first, *others]
        self._packed: tuple[int, _semi_structured.Packed] | None = None

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        layout: str = "bitmap",
        *,
        block: int = 64,
        mask: PackedMask | None = None,
        trainable: bool = False,
        semi_structured: bool = False,
    ) -> SparseLinear:
        """Compresses the weight of an existing layer, which stays as it is, and shares its bias.

        Args:
            linear: an `nn.Linear`, a transformers `Conv1D`, or with layout "bitmap" an `NF4Linear`.
            layout, block, mask: as for `formats.sparse.compress`; without a mask the weights that are not 0 are kept.
            trainable, semi_structured: as for the class.

        Returns:
            A layer in the same training mode as `linear`.

        Raises:
            TypeError, ValueError: `linear` is none of these, or as `formats.sparse.compress` and the class.
        """
        if not (is_linear(linear) or type(linear) is NF4Linear):
            kind = type(linear)
            raise TypeError(
                f"{cls.__name__}.from_linear: got {kind.__module__}.{kind.__qualname__}; expected exactly "
                "torch.nn.Linear, transformers' Conv1D or NF4Linear"
            )
        weight = linear.weight.t() if is_conv1d(linear) else linear.weight
        compressed = sparse.compress(weight, layout, block=block, mask=mask)
        layer = cls(compressed, linear.bias, trainable=trainable, semi_structured=semi_structured)
        return layer.train(linear.training)

    @property
    def weight(self) -> SparseWeight:
        """The compressed weight, over the memory of this module."""
        tensors = self._others if self.values is None else [self.values, *self._others]
        return sparse.from_numbers(self._layout, tensors, self._numbers, self._dtype)

    @property
    def sparsity(self) -> float:
        """The part of the weight that is not kept: of layout "block" in whole blocks, of "2:4" always 0.5."""
        return 1 - self.weight.density

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features].

        Returns:
            y: [..., out_features] in x's dtype.

        Raises:
            ValueError, TypeError: as `functional.sparse_linear`.
        """
        weight = self.weight
        wanted = self.semi_structured and x.is_cuda
        if wanted and isinstance(weight, SemiStructuredWeight) and _semi_structured.unavailable(weight) is None:
            return _semi_structured.linear(x, self._packed_for_the_gpu(weight), weight, self.bias)
        return sparse_linear(x, weight, self.bias)

    def _packed_for_the_gpu(self, weight: SemiStructuredWeight) -> _semi_structured.Packed:
        version = weight.values._version
        if self._packed is None or self._packed[0] != version:
            self._packed = version, _semi_structured.pack(weight)
        return self._packed[1]

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A new, plain `nn.Linear` with the weight in full and a copy of the bias, not requiring gradients.

        Args:
            dtype: of both; None takes the weight's.
        """
        weight = self.weight.dense(dtype).contiguous()
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype, copy=True), requires_grad=False)
        return linear.train(self.training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # PyTorch's form is made again where it is needed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        super()._apply(fn, recurse)
        self._packed = None
        on_host = len(self._others) - 1 if self._layout == "block" else None  # a BlockWeight's `starts`
        self._others = [
            t if i == on_host and not _to_meta(fn, t) else _moved(fn, t) for i, t in enumerate(self._others)
        ]
        if self.values is not None:
            self._dtype = self.values.dtype
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for i, tensor in enumerate(self._others):
            destination[f"{prefix}{_STRUCTURE}.{i}"] = tensor
        text = json.dumps({"layout": self._layout, "dtype": str(self._dtype), "numbers": self._numbers})
        destination[f"{prefix}{_DESCRIPTION}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        try:
            loaded = self._loaded(state_dict, prefix)
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))  # before anything of this module is changed
            return
        if loaded is None:
            missing_keys.append(f"{prefix}{_DESCRIPTION}")
        else:
            self._take(loaded)
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )  # fmt: skip
        own = (f"{prefix}{_STRUCTURE}.", f"{prefix}{_DESCRIPTION}")
        unexpected_keys.extend(key for key in unexpected if not key.startswith(own))

    def _take(self, loaded: SparseWeight) -> None:
        """Makes room for the values, which `nn.Module` copies, and takes over where they are."""
        first, *others = loaded.tensors
        device = self._others[0].device
        if self.values is None:
            others = [first, *others]
        elif self.values.shape != first.shape:
            values = torch.empty(first.shape, dtype=self.values.dtype, device=device)
            self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)
        on_host = len(others) - 1 if self._layout == "block" else None
        self._others = [t.clone() if i == on_host else t.to(device, copy=True) for i, t in enumerate(others)]
        self._numbers, self._packed = loaded.numbers, None

    def _loaded(self, state: Any, prefix: str) -> SparseWeight | None:
        """The weight of a state dict; None where it has none.

        Raises:
            ValueError, TypeError: it is none, of another layout or shape, or contradicts itself.
        """
        where = f"{prefix}weight"
        description = state.get(f"{prefix}{_DESCRIPTION}")
        if description is None:
            return None
        entry = entry_of(where, bytes(description.tolist()).decode(errors="replace"))
        tensors = [state[f"{prefix}values"]] if self.values is not None and f"{prefix}values" in state else []
        while (key := f"{prefix}{_STRUCTURE}.{len(tensors) - (self.values is not None)}") in state:
            tensors.append(state[key])
        if entry["layout"] != self._layout:
            raise ValueError(f"{where}: is of layout {entry['layout']!r} in the checkpoint, {self._layout!r} here")
        weight = check(where, entry, tensors)
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"size mismatch for {where}: shape {tuple(weight.shape)} in the checkpoint, "
                f"{(self.out_features, self.in_features)} here"
            )
        return weight

    def extra_repr(self) -> str:
        weight = self.weight
        block = f", block={weight.block}" if isinstance(weight, BlockWeight) else ""
        trains = ", trainable" if self.values is not None and self.values.requires_grad else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"layout={self._layout!r}{block}, sparsity={self.sparsity:.1%}{trains}"
        )


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What `fn` makes of a tensor that it may move, but not cast."""
    result = fn(tensor)
    return result if result.dtype == tensor.dtype else tensor.to(result.device)


def _to_meta(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    return fn(tensor).device.type == "meta"
