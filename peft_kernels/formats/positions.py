"""Chosen weights of a matrix, by their places in its flattened memory.

What gathers gradients of chosen weights (`grad_layout="compact"` of `masked_linear`, `sparse_delta_linear`) goes
through a matrix in strips of `STRIP` rows: `starts` says which places each strip has, on the host, so that nobody waits
for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STRIP = 64
"""Rows of a strip."""


class Positions(NamedTuple):
    """Places of chosen weights in a matrix [out_features, in_features].

    Attributes:
        flat: [nnz] int32, or int64 for matrices of 2³¹ elements and more: row · in_features + column, strictly
            ascending, on the weight's device.
        starts: int64 [ceil(out_features / 64) + 1], on the CPU: the places of strip i (rows 64·i and up) are
            flat[starts[i] : starts[i + 1]].
        shape: of the matrix.
        order: [nnz] of flat's dtype, on its device: numbers of the places, by column and within one by row; None until
            `with_columns`.
        column_starts: as `starts`, for strips of 64 columns in that order.
    """

    flat: Tensor
    starts: Tensor
    shape: torch.Size
    order: Tensor | None = None
    column_starts: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.flat.device

    def to(self, device: torch.device | str) -> Positions:
        order = None if self.order is None else self.order.to(device)
        return self._replace(flat=self.flat.to(device), order=order)

    def with_columns(self) -> Positions:
        """The same with the order by columns, which gradients of x go through (waits for the device)."""
        order, starts = self.by_columns()
        return self._replace(order=order, column_starts=starts)

    def by_columns(self) -> tuple[Tensor, Tensor]:
        """(order, column_starts), made where they are not there (then it waits for the device)."""
        if self.order is not None and self.column_starts is not None:
            return self.order, self.column_starts
        columns, order = (self.flat.long() % max(1, self.shape[1])).sort(stable=True)
        ends = torch.arange(-(-self.shape[1] // STRIP) + 1, device=self.device) * STRIP
        return order.to(self.flat.dtype), torch.searchsorted(columns, ends).cpu()


def extremes(numbers: Tensor) -> tuple[int, int]:
    """(least, greatest) of integers of any shape, which waits for the device; (0, -1) of none."""
    if not numbers.numel():
        return 0, -1
    least, greatest = torch.aminmax(numbers)
    return int(least), int(greatest)


def index_dtype(shape: torch.Size) -> torch.dtype:
    return torch.int32 if shape.numel() < 2**31 else torch.int64


def positions(flat: Tensor, shape: Sequence[int]) -> Positions:
    """Checks and prepares places, once for the many steps that use them (waits for the device).

    Args:
        flat: [nnz] integers: row · in_features + column, strictly ascending.
        shape: [out_features, in_features].

    Raises:
        TypeError: `flat` is no tensor of int32 or int64.
        ValueError: no vector, a place outside the matrix, a place that occurs twice, or places not in order.
    """
    shape = torch.Size(shape)
    if not isinstance(flat, Tensor) or flat.dtype not in (torch.int32, torch.int64):
        got = flat.dtype if isinstance(flat, Tensor) else type(flat).__name__
        raise TypeError(f"positions: flat is {got}; expected a tensor of int32 or int64")
    if flat.ndim != 1:
        raise ValueError(f"positions: flat has shape {tuple(flat.shape)}; expected (nnz,)")
    flat = flat.to(torch.int64)
    first, last = extremes(flat)
    if first < 0 or last >= shape.numel():
        raise ValueError(f"positions: flat has {first} to {last}; expected places in [0, {shape.numel()})")
    if bool((flat.diff() <= 0).any()):
        raise ValueError("positions: flat is not strictly ascending; expected each place once, in order")
    rows, columns = shape
    strips = torch.arange(-(-rows // STRIP) + 1, device=flat.device) * (STRIP * columns)
    starts = torch.searchsorted(flat, strips).cpu()
    return Positions(flat.to(index_dtype(shape)), starts, shape)
