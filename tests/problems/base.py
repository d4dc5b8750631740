"""What the problems of all ops share: drawing, running, and the composition differentiated by autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

import peft_kernels
from peft_kernels import functional, ops

Output = Tensor | tuple[Tensor, ...]
Result = tuple[Output, dict[str, Tensor]]


def batch_of(m: int | tuple[int, ...]) -> tuple[int, ...]:
    return (m,) if isinstance(m, int) else tuple(m)


def drawer(seed: int, device: str) -> Callable[..., Tensor]:
    """draw(*shape, scale, dtype): normal numbers, the same on every device and, rounded, in every dtype; a leaf."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).to(device).requires_grad_()

    return draw


def mask_of(x: Tensor, p: float, seed: int) -> Tensor:
    """drop(1) in x's shape and dtype: 0 or 1 / (1 - p), by the specification of `philox_dropout`."""
    ones = torch.ones_like(x, dtype=torch.float64).detach()
    with peft_kernels.use_backend("reference"):
        return (functional.philox_dropout(ones, p, seed) if p else ones).to(x.dtype)


class Problem:
    """Seeded tensors of one problem of an op, by name, each a leaf that requires gradients (None where there is none).

    `arguments(t)` are the call's, `compose(t)` is what users write with PyTorch's own functions. An entry of a tuple
    `grad_y` that is None leaves that output unused.
    """

    op: ClassVar[str]
    tensors: dict[str, Tensor | None]
    grad_y: Tensor | tuple[Tensor | None, ...]

    def arguments(self, t: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        raise NotImplementedError

    def compose(self, t: dict[str, Any]) -> Output:
        raise NotImplementedError

    @property
    def length(self) -> int:
        """The number of terms in the longest chain of sums."""
        raise NotImplementedError

    def call(self, t: dict[str, Any] | None = None, **options) -> Output:
        """The library's output, by whatever backend is in force."""
        args, kwargs = self.arguments(t or self.tensors)
        return getattr(functional, self.op)(*args, **{**kwargs, **options})

    def dispatched(self) -> Any:
        """What dispatch chooses by."""
        args, kwargs = self.arguments(self.tensors)
        return getattr(ops, self.op).problem(*args, **kwargs)

    def run(self, **changes) -> Result:
        """The library's outputs and gradients; `changes` takes the place of tensors."""
        t = {**self.tensors, **changes}
        y = self.call(t)
        return _detached(y), self.gradients(y, t)

    def eager(self, dtype: torch.dtype | None = None) -> Result:
        """The composition differentiated by autograd, at the problem's dtypes or all in `dtype`."""
        t = {
            n: None if v is None else v.detach().to(dtype or v.dtype).requires_grad_() for n, v in self.tensors.items()
        }
        y = self.compose(t)
        return _detached(y), self.gradients(y, t)

    def gradients(self, y: Output, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """Of every tensor that requires one; zeros where the used outputs do not depend on it."""
        wanted = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
        ys, grads = ((y,), (self.grad_y,)) if isinstance(y, Tensor) else (y, self.grad_y)
        used = [(out, grad.to(out.dtype)) for out, grad in zip(ys, grads, strict=True) if grad is not None]
        values = torch.autograd.grad(*map(list, (
            (out for out, _ in used), wanted.values(), (grad for _, grad in used)
        )), allow_unused=True, materialize_grads=True)  # fmt: skip
        return dict(zip(wanted, values, strict=True))

    def freeze_all_but(self, *wanted: str) -> None:
        """By name, or by the name before the first dot ("lora_As" for all of them)."""
        for name, tensor in self.tensors.items():
            if tensor is not None:
                tensor.requires_grad_(name in wanted or name.partition(".")[0] in wanted)

    def absolute(self) -> Problem:
        """The same problem with every number replaced by its absolute value: the size of the terms that are summed."""
        twin = copy.copy(self)
        twin.tensors = {n: None if v is None else v.detach().abs().requires_grad_() for n, v in self.tensors.items()}
        twin.grad_y = _each(self.grad_y, torch.abs)
        return twin


def _each(value, function):
    if isinstance(value, Tensor):
        return function(value)
    return tuple(None if entry is None else function(entry) for entry in value)


def _detached(y: Output) -> Output:
    return _each(y, torch.detach)
