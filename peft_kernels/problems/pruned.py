"""Problems of the ops over pruned weights. Masks are drawn as booleans and packed outside the ops' own packing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import functional
from peft_kernels.formats.mask import PackedMask, PackedMaskStack, words_of
from peft_kernels.problems.base import SCALING, SEED, Case, Draw, Shape, dropped, layer_of, low_rank, options_of, short


def drawn(draw: Draw, density: float, n: int, k: int) -> Tensor:
    """bool [n, k], about `density` of it True, the second row empty."""
    kept = draw(torch.float32, n, k).erf().add(1).div(2) < density  # even numbers between 0 and 1
    kept[1:2] = False
    return kept


def packed(kept: Tensor) -> PackedMask:
    """The mask by the format's definition, in powers of two."""
    (n, k), width = kept.shape, 32 * words_of(kept.shape[1])
    bits = F.pad(kept, (0, width - k)).view(n, -1, 32).double()
    powers = torch.tensor([2.0**i for i in range(31)] + [-(2.0**31)], dtype=torch.float64, device=kept.device)
    return PackedMask((bits * powers).sum(-1).to(torch.int64).to(torch.int32), kept.shape)


def masked_linear(shape: Shape, draw: Draw, density: float = 0.5, **options: Any) -> Case:
    kept = drawn(draw, density, shape.n, shape.k)

    def eager(t: dict[str, Tensor]) -> Tensor:
        return F.linear(t["x"], t["weight"] * kept, t.get("bias"))

    tensors = {name: tensor for name, tensor in layer_of(shape, draw).items() if not name.startswith("lora")}
    if options.get("weight_is_masked"):
        tensors["weight"] *= kept
    options = {"mask": packed(kept), **options}
    return Case("masked_linear", _label(shape, density), tensors, options, eager, ("x", "weight"))


def masked_lora_linear(shape: Shape, draw: Draw, density: float = 0.5, update_masked: bool = True) -> Case:
    kept = drawn(draw, density, shape.n, shape.k)

    def eager(t: dict[str, Tensor]) -> Tensor:
        x, dtype = t["x"], t["x"].dtype
        y = F.linear(x, t["weight"] * kept, t.get("bias"))
        if not update_masked:
            return y + SCALING * low_rank(x, t["lora_A"], t["lora_B"], shape.dropout_p, SEED)
        update = (t["lora_B"].to(dtype) @ t["lora_A"].to(dtype)) * kept
        return y + SCALING * F.linear(dropped(x, shape.dropout_p, SEED), update)

    options = {"mask": packed(kept), "scaling": SCALING, "update_masked": update_masked, **options_of(shape, draw)}
    label = f"{_label(shape, density)}, update {'masked' if update_masked else 'beside'}"
    return Case("masked_lora_linear", label, layer_of(shape, draw), options, eager, ("x", "lora_A", "lora_B"))


def by_rows(x: Tensor, weight: Tensor, kept: Sequence[Tensor], ids: Tensor, bias: Tensor | None) -> Tensor:
    """Each mask on a copy of its own rows, as users write it: sums over rows are then as long as an op's."""
    y = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for i in range(-1, len(kept)):
        own = ids == i
        y = y.masked_scatter(own.unsqueeze(-1), F.linear(x[own], weight if i < 0 else weight * kept[i], bias))
    return y


def multi_mask_linear(shape: Shape, draw: Draw, densities: Sequence[float] = (0.5, 0.1, 0.9)) -> Case:
    """About as many rows without a mask as with each."""
    kept = [drawn(draw, density, shape.n, shape.k) for density in densities]

    def eager(t: dict[str, Tensor]) -> Tensor:
        return by_rows(t["x"], t["weight"], kept, t["mask_ids"], t.get("bias"))

    tensors = {name: tensor for name, tensor in layer_of(shape, draw).items() if not name.startswith("lora")}
    tensors["mask_ids"] = draw.integers(len(kept) + 1, *shape.batch) - 1
    words = torch.stack([packed(mask).words for mask in kept])
    masks = PackedMaskStack(words, torch.Size((shape.n, shape.k)))
    label = f"{shape}, {len(kept)} masks"
    return Case("multi_mask_linear", label, tensors, {"masks": masks}, eager, ("x", "weight"))


class MaskCase(Case):
    """The output is a mask's bytes as numbers: nothing but the very bits will do."""

    def outputs(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        mask = functional.mask_pack(**tensors, **self.options)  # type: ignore[arg-type]
        return (mask.words.view(torch.uint8).float(),)


def mask_pack(shape: Shape, draw: Draw) -> Case:
    """N by K scores above a threshold by absolute value."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        return packed(t["values"].abs() > 0.5).words.view(torch.uint8).float()

    values = draw(shape.dtype, shape.n, shape.k)
    threshold = torch.tensor(0.5, device=values.device)
    label = f"{shape.n} x {shape.k}, {short(shape.dtype)}"
    options = {"threshold": threshold, "magnitude": True}
    return MaskCase("mask_pack", label, {"values": values}, options, eager)


class UnpackCase(Case):
    """The output is booleans, as numbers."""

    def outputs(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (functional.mask_unpack(**self.options).float(),)  # type: ignore[arg-type]

    @property
    def device(self) -> str:
        return self.options["mask"].device.type  # type: ignore[attr-defined]


def mask_unpack(shape: Shape, draw: Draw) -> Case:
    kept = drawn(draw, 0.4, shape.n, shape.k)
    label = f"{shape.n} x {shape.k}"
    return UnpackCase("mask_unpack", label, {}, {"mask": packed(kept)}, lambda t: kept.float())


def mask_apply(shape: Shape, draw: Draw) -> Case:
    """N by K, rounded to the adapters' dtype."""
    kept = drawn(draw, 0.4, shape.n, shape.k)

    def eager(t: dict[str, Tensor]) -> Tensor:
        return (t["weight"] * kept).to(shape.adapter_dtype)

    tensors = {"weight": draw(shape.dtype, shape.n, shape.k)}
    label = f"{shape.n} x {shape.k}, {short(shape.dtype)} to {short(shape.adapter_dtype)}"
    return Case("mask_apply", label, tensors, {"mask": packed(kept), "dtype": shape.adapter_dtype}, eager)


def _label(shape: Shape, density: float) -> str:
    return f"{shape}, {density:g} kept"
