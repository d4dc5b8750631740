"""What all problems are made of: a `Case`, its `Shape`, the numbers drawn for it, the parts of a layer with LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import functional, ops
from peft_kernels.kernels.reference import philox_dropout as philox_reference

SCALING = 1.5
SEED = 11


@dataclass(frozen=True)
class Case:
    """One problem of an op: tensors by argument name (those in `grads` get gradients), other arguments (a 4-bit weight
    `q` is one of them), and eager code.

    `eager(tensors)` composes the op of PyTorch's own functions in the dtype of whatever tensors it is given. Tensors of
    an argument that is a list are named "weights.0", "weights.1" ...; several outputs count as one, side by side.
    """

    op: str
    label: str
    tensors: dict[str, Tensor]
    options: Mapping[str, object]
    eager: Callable[[dict[str, Tensor]], Tensor] = field(repr=False)
    grads: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        placed: Any = next(iter(self.tensors.values()), self.options.get("q"))
        return placed.device.type

    @property
    def problem(self) -> Any:
        """What dispatch chooses by."""
        return getattr(ops, self.op).problem(**nested(self.tensors), **self.options)

    def call(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The op's output for these tensors, by whatever implementation is in force."""
        ys = self.outputs(tensors)
        return ys[0] if len(ys) == 1 else torch.cat(ys, -1)

    def outputs(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """As `call`, each output by itself."""
        ys = getattr(functional, self.op)(**nested(tensors), **self.options)
        return (ys,) if isinstance(ys, Tensor) else tuple(ys)

    def without(self, *names: str, **options: object) -> Case:
        """The same problem without these tensors (an optional bias), and with these options."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in names}
        return replace(self, tensors=tensors, options={**self.options, **options})

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors detached, those in `grads` requiring gradients; floating-point ones in `dtype` if given."""
        found = {name: t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach() for name, t in
                 self.tensors.items()}  # fmt: skip
        return {name: t.requires_grad_() if name in self.grads else t for name, t in found.items()}


@dataclass(frozen=True)
class Shape:
    """Sizes and dtypes of a linear layer with an adapter: `batch` rows, K in_features, N out_features, rank r."""

    batch: tuple[int, ...]
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0

    def __str__(self) -> str:
        rows = "x".join(map(str, self.batch))
        dtypes = f"{short(self.dtype)}/{short(self.adapter_dtype)}"
        return f"{rows}, {self.k} -> {self.n}, r={self.r}, {dtypes}, p={self.dropout_p:g}"


class Draw:
    """Normal numbers, drawn on the device itself: in float64 on a CPU, in float32 where they are many. On the meta
    device there are sizes only."""

    def __init__(self, device: str | torch.device, seed: int = 1) -> None:
        self.device = torch.device(device)
        self.generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def __call__(self, dtype: torch.dtype, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        wide = torch.float64 if self.device.type == "cpu" else torch.float32
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=wide)
        return values.mul_(scale).add_(offset).to(dtype)

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator, device=self.device)

    def seeds(self, *seeds: int) -> Tensor:
        """On the device: a CUDA graph cannot read integers of the host."""
        return torch.tensor(seeds, device=self.device)


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors named "weights.0", "weights.1" as one argument, the list `weights`."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stem, _, index = name.partition(".")
        if index:
            arguments.setdefault(stem, []).append(tensor)
        else:
            arguments[stem] = tensor
    return arguments


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x times the mask that every implementation is to draw for this seed, and 1 / (1 - p)."""
    if p == 0:
        return x
    rows = x.numel() // x.shape[-1]
    mask = philox_reference.keep_mask(rows, x.shape[-1], p, torch.tensor([seed], device=x.device))
    return x * (mask.view_as(x) * (1 / (1 - p))).to(x.dtype)


def low_rank(x: Tensor, a: Tensor, b: Tensor, p: float, seed: int) -> Tensor:
    return F.linear(F.linear(dropped(x, p, seed), a.to(x.dtype)), b.to(x.dtype))


def layer_of(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    n, k, r = shape.n, shape.k, shape.r
    return {
        "x": draw(shape.dtype, *shape.batch, k),
        "weight": draw(shape.dtype, n, k, scale=k**-0.5),
        "bias": draw(shape.dtype, n),
        "lora_A": draw(shape.adapter_dtype, r, k, scale=k**-0.5),
        "lora_B": draw(shape.adapter_dtype, n, r, scale=r**-0.5),
    }


def options_of(shape: Shape, draw: Draw, adapters: int = 1) -> dict[str, Any]:
    seeds = draw.seeds(*range(SEED, SEED + adapters)) if shape.dropout_p else None
    return {"dropout_p": shape.dropout_p, "seed": seeds}
