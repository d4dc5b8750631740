"""Which weights of a matrix train: given, drawn, or the largest by some score."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.checks import check_device, check_floating, check_probability, check_shape
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import Positions, positions
from peft_kernels.formats.sparse_delta import prepare

SELECTIONS = ("random", "magnitude")


def choose(
    module: str,
    weight: Tensor | NF4Weight,
    indices: Positions | Tensor | None,
    density: float | None,
    scores: Tensor | None,
    selection: str,
    generator: torch.Generator | None,
) -> Positions:
    """The places, checked and prepared; arguments as of `SparseDeltaLinear.from_linear`.

    Raises:
        ValueError: both or neither of `indices` and `density`, an unknown selection, or what does not fit.
        TypeError: an argument of the wrong type.
    """
    if (indices is None) == (density is None):
        raise ValueError(f"{module}: expected either indices or density")
    if indices is not None:
        if scores is not None or selection != "random":
            raise ValueError(f"{module}: scores and selection are for density, but indices are given")
        return _given(module, weight, indices)
    check_probability(module, "density", density)
    if selection not in SELECTIONS:
        raise ValueError(f"{module}: selection is {selection!r}; expected 'random' or 'magnitude'")
    if scores is not None and selection != "random":
        raise ValueError(f"{module}: scores take the place of selection; expected one of both")
    count = round(density * weight.shape.numel())  # type: ignore[operator]
    if scores is None and selection == "random":
        drawn = _drawn(weight.shape.numel(), count, generator)
        if weight.device.type == "meta":  # how many they are is known there, and which ones when a state is loaded
            return positions(drawn, weight.shape).with_columns().to("meta")
        return positions(drawn.to(weight.device), weight.shape).with_columns()
    if weight.device.type == "meta":
        raise ValueError(f"{module}: weight is on the meta device, where no weights are the largest; expected indices")
    if scores is None:
        scores = (weight.dequantize() if isinstance(weight, NF4Weight) else weight.detach()).abs()
    check_floating(module, "scores", scores)
    check_shape(module, "scores", scores, tuple(weight.shape), "they are of weight")
    check_device(module, "scores", scores, weight.device)
    if bool(scores.isnan().any()):
        raise ValueError(f"{module}: scores holds NaN")
    flat = scores.detach().flatten().topk(count, sorted=False).indices.sort().values
    return positions(flat, weight.shape).with_columns()


def _given(module: str, weight: Tensor | NF4Weight, indices: Positions | Tensor) -> Positions:
    on_meta = weight.device.type == "meta"
    if on_meta and isinstance(indices, Tensor) and indices.is_meta:
        raise ValueError(
            f"{module}: indices is on the meta device; expected places on the CPU, also for a weight there"
        )
    if not isinstance(indices, Positions):
        try:
            indices, _ = prepare(indices, weight.shape)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{module}: {error}") from None
    check_shape(module, "indices", indices, tuple(weight.shape), "it has the places of weight")
    if on_meta:
        return indices.with_columns().to("meta")
    check_device(module, "indices", indices, weight.device)
    return indices.with_columns()


def _drawn(size: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of the numbers below `size`, each set of them as likely, ascending: int64, on the CPU."""
    if 2 * count > size:  # drawing again what was drawn would take long
        return torch.randperm(size, generator=generator, device="cpu")[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while drawn.numel() < count:
        more = torch.randint(size, (count - drawn.numel() + 64,), generator=generator, device="cpu")
        drawn = torch.cat((drawn, more)).unique()
    keep = torch.randperm(drawn.numel(), generator=generator, device="cpu")[:count]
    return drawn[keep].sort().values
