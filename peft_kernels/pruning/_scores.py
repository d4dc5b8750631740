"""Scores of the weights of a matrix, a strip of rows at a time: what is computed from a weight (of 4 bits, say, or
times the norm of its input) never exists as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.checks import FLOATS, shape_text
from peft_kernels.formats.mask import PackedMask
from peft_kernels.formats.nf4 import NF4Weight

# A strip's keys, digits and comparisons stay in a CPU's caches; on a GPU a strip fills the device.
_CPU_STRIP, _GPU_STRIP = 1 << 17, 1 << 22


class Scores(NamedTuple):
    """Scores [out_features, in_features]; a larger one is kept before a smaller one, NaN never.

    Attributes:
        shape: of the matrix.
        device: where the scores are computed.
        dtype: in which they are compared: float32 or float64.
        rows: (start, stop) -> scores of these rows, in any floating-point dtype.
    """

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def strips(self, row_cost: int = 1, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their scores in `dtype`), as many rows as have the elements of a strip.

        Args:
            row_cost: elements that a row counts as, should it have fewer.
            multiple: of which the number of rows is one, but for the last strip's.
        """
        n, k = self.shape
        strip = _CPU_STRIP if self.device.type == "cpu" else _GPU_STRIP
        step = max(1, strip // (max(1, k, row_cost) * multiple)) * multiple
        for start in range(0, n, step):
            stop = min(n, start + step)
            yield slice(start, stop), self.rows(start, stop).detach().to(self.dtype)

    def map(self, fn: Callable[[Tensor, slice], Tensor], dtype: torch.dtype | None = None) -> Scores:
        """Other scores, made of each strip and the rows that it has."""
        return self._replace(
            dtype=self.dtype if dtype is None else dtype,
            rows=lambda start, stop: fn(self.rows(start, stop), slice(start, stop)),
        )


def scores_of(values: Any, name: str = "scores") -> Scores:
    """The scores that a matrix holds: the numbers of a tensor, or of a weight of 4 bits without rounding.

    Raises:
        TypeError: neither a floating-point tensor nor an `NF4Weight`.
        ValueError: it has not two dimensions.
    """
    if isinstance(values, Scores):
        return values
    if not isinstance(values, NF4Weight) and not (isinstance(values, Tensor) and values.dtype in FLOATS):
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} is {got}; expected a floating-point tensor or an NF4Weight")
    if len(values.shape) != 2:
        raise ValueError(f"{name} has shape {shape_text(values.shape)}; expected (out_features, in_features)")
    if isinstance(values, NF4Weight):
        rows = lambda start, stop: values.rows(start, stop).dequantize(torch.float32)  # noqa: E731
        return Scores(values.shape, values.device, torch.float32, rows)
    wide = torch.promote_types(values.dtype, torch.float32)
    return Scores(values.shape, values.device, wide, lambda start, stop: values.detach()[start:stop])


def magnitudes(weight: Any, name: str = "weight") -> Scores:
    """|W|."""
    return scores_of(weight, name).map(lambda strip, _: strip.abs())


def inside(scores: Scores, mask: PackedMask | None) -> Scores:
    """The scores where a mask keeps something, NaN elsewhere: what is pruned stays so."""
    if mask is None:
        return scores
    return scores.map(lambda strip, at: strip.masked_fill(~mask.rows(at.start, at.stop).unpack(), float("nan")))


def check_finite_scores(where: str, scores: Mapping[str, Scores]) -> None:
    """One wait for the device, whatever the number of layers.

    Raises:
        ValueError: scores that are infinite or NaN; the message names the layers.
    """
    if not scores:
        return
    good = [torch.stack([strip.isfinite().all() for _, strip in s.strips()]).all().cpu() for s in scores.values()]
    bad = [name for name, fine in zip(scores, torch.stack(good).tolist(), strict=True) if not fine]
    if bad:
        raise ValueError(f"{where}: scores of {', '.join(bad)} are not finite")
