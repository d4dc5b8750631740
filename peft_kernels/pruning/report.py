"""What is pruned of a model, layer by layer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from peft_kernels._table import table
from peft_kernels.formats.mask import PackedMask
from peft_kernels.pruning.apply import masks_of

logger = logging.getLogger("peft_kernels")


class LayerSparsity(NamedTuple):
    """A layer: its name, the shape of its weight, and how many of its weights are kept."""

    name: str
    shape: tuple[int, ...]
    kept: int

    @property
    def total(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class SparsityReport:
    """Prints as a table.

    Attributes:
        layers: one for each mask.
    """

    layers: tuple[LayerSparsity, ...]

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers)

    @property
    def total(self) -> int:
        return sum(layer.total for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of the weights under a mask that is pruned; 0 of none."""
        return 1 - self.kept / self.total if self.total else 0.0

    @property
    def emptied(self) -> tuple[str, ...]:
        """Names of layers that have nothing left: their output is the bias."""
        return tuple(layer.name for layer in self.layers if layer.total and not layer.kept)

    def __str__(self) -> str:
        rows = [
            (x.name, " x ".join(map(str, x.shape)), x.kept, f"{1 - x.kept / x.total:.4f}" if x.total else None)
            for x in self.layers
        ]
        whole = f"{self.kept:,} of {self.total:,} weights kept, sparsity {self.sparsity:.4f}"
        empty = [f"nothing is left of: {', '.join(self.emptied)}"] if self.emptied else []
        return "\n".join([table(rows, ("layer", "shape", "kept", "sparsity")), whole, *empty])


def sparsity_report(model: nn.Module | Mapping[str, PackedMask]) -> SparsityReport:
    """Counts what masks keep; waits for the device once, whatever the number of layers. Layers that have lost all their
    weights are warned of, once, through the logger `peft_kernels`.

    Args:
        model: a model with masked layers, or masks by name.
    """
    masks = masks_of(model) if isinstance(model, nn.Module) else model
    if not masks:
        return SparsityReport(())
    home = next(iter(masks.values())).device
    counts = torch.stack([mask.kept().to(home) for mask in masks.values()]).tolist()
    layers = [LayerSparsity(name, tuple(masks[name].shape), n) for name, n in zip(masks, counts, strict=True)]
    report = SparsityReport(tuple(layers))
    if report.emptied:
        _warn_of_empty(report.emptied)
    return report


@functools.lru_cache(64)
def _warn_of_empty(names: tuple[str, ...]) -> None:
    logger.warning("pruning has left nothing of %s: the output there is the bias, or 0", ", ".join(names))
