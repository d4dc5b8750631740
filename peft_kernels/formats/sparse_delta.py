"""A sparse change of a matrix: numbers that are added at chosen places.

Diff pruning (Guo et al. 2020, https://arxiv.org/abs/2012.07463), SHiRA (Bhardwaj et al. 2024,
https://arxiv.org/abs/2406.13175), sparse fine-tuning (Ansell et al. 2024, https://arxiv.org/abs/2401.16405) and the
like train such a change and nothing else. 1 % of 4096 x 4096 takes 1.3 MB with float32 values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.checks import FLOATS
from peft_kernels.formats.positions import Positions, extremes, positions

_INTEGERS = (torch.int32, torch.int64)


class SparseDelta(NamedTuple):
    """Δ of a matrix [out_features, in_features]: Δ.flat[positions.flat] = values, 0 elsewhere.

    Attributes:
        positions: the places, ascending, each once.
        values: [nnz] in any floating-point dtype, in the order of the places, on their device.
    """

    positions: Positions
    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.positions.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of places and values, which is what a file takes."""
        return self.positions.flat.nbytes + self.values.nbytes

    def density(self) -> float:
        """Changed weights / all weights; 0.0 of an empty matrix."""
        return self.values.numel() / self.shape.numel() if self.shape.numel() else 0.0

    def to(self, device: torch.device | str) -> SparseDelta:
        """The same change on another device."""
        return SparseDelta(self.positions.to(device), self.values.to(device))

    def dense(self) -> Tensor:
        """Δ in full, [out_features, in_features] in the values' dtype."""
        whole = torch.zeros(self.shape.numel(), dtype=self.values.dtype, device=self.device)
        return whole.index_copy_(0, self.positions.flat.long(), self.values).view(self.shape)

    def apply_(self, weight: Tensor) -> Tensor:
        """W += Δ in place, added in at least float32 and rounded once: what `sparse_delta_linear` computes with.

        Args:
            weight: [out_features, in_features], any floating-point dtype and strides, on the delta's device.

        Returns:
            The numbers that were overwritten, [nnz] in W's dtype: `remove_` takes them.

        Raises:
            TypeError, ValueError: no such weight.
        """
        _check_weight("apply_", weight, self)
        place = self._place()
        before = weight.detach()[place]
        with torch.no_grad():
            weight[place] = added(before, self.values, weight.dtype)
        return before

    def remove_(self, weight: Tensor, overwritten: Tensor) -> None:
        """Puts back what `apply_` overwrote, bit for bit. (Subtracting Δ would not: sums are rounded.)

        Args:
            weight: as for `apply_`.
            overwritten: what that returned.

        Raises:
            TypeError, ValueError: no such weight, or `overwritten` is of another shape or dtype.
        """
        _check_weight("remove_", weight, self)
        if overwritten.shape != self.values.shape or overwritten.dtype != weight.dtype:
            raise ValueError(
                f"SparseDelta.remove_: overwritten is {overwritten.dtype} {tuple(overwritten.shape)}; expected "
                f"{weight.dtype} {tuple(self.values.shape)}, what apply_ returned"
            )
        with torch.no_grad():
            weight[self._place()] = overwritten

    def _place(self) -> tuple[Tensor, Tensor]:
        return rows_and_columns(self.positions)


def rows_and_columns(places: Positions) -> tuple[Tensor, Tensor]:
    """(row, column) of each place, int64 [nnz]."""
    flat, columns = places.flat.long(), max(1, places.shape[1])
    return flat // columns, flat % columns


def added(base: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """base + values in at least float32, rounded once to `dtype`."""
    wide = torch.promote_types(torch.promote_types(torch.float32, base.dtype), values.dtype)
    return (base.to(wide) + values.to(wide)).to(dtype)


def _check_weight(name: str, weight: Tensor, delta: SparseDelta) -> None:
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"SparseDelta.{name}: weight is {got}; expected a tensor of a floating-point dtype")
    if weight.shape != delta.shape or weight.device != delta.device:
        raise ValueError(
            f"SparseDelta.{name}: weight has shape {tuple(weight.shape)} on {weight.device}; expected "
            f"{tuple(delta.shape)} on {delta.device}"
        )


def prepare(indices: Tensor, shape: Sequence[int]) -> tuple[Positions, Tensor | None]:
    """Checks places in any order and sorts them (waits for the device).

    Args:
        indices: int32 or int64; [nnz], row · in_features + column, or [2, nnz], rows and columns (as PEFT's SHiRA has
            them).
        shape: [out_features, in_features].

    Returns:
        (places with their order by columns, the order that values have to be brought into: `values[order]`, None where
        the places are in order already).

    Raises:
        TypeError: no tensor of int32 or int64.
        ValueError: another shape, a place outside the matrix, or a place that occurs twice: of two values for one
            weight it could not be said which one counts.
    """
    shape = torch.Size(shape)
    if not isinstance(indices, Tensor) or indices.dtype not in _INTEGERS:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"sparse delta: indices is {got}; expected a tensor of int32 or int64")
    if indices.ndim == 2 and indices.shape[0] == 2:
        flat = _flattened(indices.long(), shape)
    elif indices.ndim == 1:
        flat = indices.long()
    else:
        raise ValueError(f"sparse delta: indices has shape {tuple(indices.shape)}; expected (nnz,) or (2, nnz)")
    if bool((flat.diff() > 0).all()):
        return positions(flat, shape).with_columns(), None
    flat, order = flat.sort(stable=True)
    again = flat[1:][flat.diff() == 0]
    if again.numel():
        raise ValueError(
            f"sparse delta: indices names {again.unique().numel()} places more than once, the first is "
            f"{int(again[0])}; expected each place once"
        )
    return positions(flat, shape).with_columns(), order


def _flattened(pairs: Tensor, shape: torch.Size) -> Tensor:
    """Places from rows and columns, each of which has to be in range: a column too far would be the next row's."""
    for name, numbers, size in zip(("row", "column"), pairs, shape, strict=True):
        first, last = extremes(numbers)
        if first < 0 or last >= size:
            raise ValueError(f"sparse delta: indices has {name}s {first} to {last}; expected them in [0, {size})")
    return pairs[0] * shape[1] + pairs[1]


def sparse_delta(indices: Tensor, values: Tensor, shape: Sequence[int]) -> SparseDelta:
    """A delta from places in any order and their values.

    Args:
        indices: as for `prepare`.
        values: [nnz], of a floating-point dtype, on their device. Not copied where the places are in order.
        shape: [out_features, in_features].

    Raises:
        TypeError, ValueError: as `prepare`; or values of another dtype, length or device.
    """
    places, order = prepare(indices, shape)
    if not isinstance(values, Tensor) or values.dtype not in FLOATS:
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"sparse delta: values is {got}; expected a tensor of a floating-point dtype")
    if values.shape != places.flat.shape or values.device != places.device:
        raise ValueError(
            f"sparse delta: values has shape {tuple(values.shape)} on {values.device}; expected "
            f"{tuple(places.flat.shape)} on {places.device}, one for each place"
        )
    return SparseDelta(places, values if order is None else values[order])


def from_dense_difference(
    tuned: Tensor, base: Tensor, *, tolerance: float = 0.0, keep: int | float | None = None
) -> SparseDelta:
    """What fine-tuning changed: tuned - base, where that is large enough (makes the whole difference once).

    Args:
        tuned, base: [out_features, in_features] of floating-point dtypes, on one device.
        tolerance: differences of this magnitude and less are left out.
        keep: no more than so many of the largest (an integer), or so large a part of the matrix (a float in [0, 1]).

    Returns:
        The delta, its values in float32 (float64 where one of both is).

    Raises:
        TypeError: no floating-point tensors.
        ValueError: shapes or devices differ, the difference is not finite, or `keep` or `tolerance` is out of range.
    """
    where = "from_dense_difference"
    for name, tensor in (("tuned", tuned), ("base", base)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            raise TypeError(f"{where}: {name} is no tensor of a floating-point dtype")
    if tuned.ndim != 2 or tuned.shape != base.shape or tuned.device != base.device:
        raise ValueError(
            f"{where}: tuned is {tuple(tuned.shape)} on {tuned.device}, base {tuple(base.shape)} on {base.device}; "
            "expected two matrices of one shape on one device"
        )
    if not tolerance >= 0:
        raise ValueError(f"{where}: tolerance is {tolerance}; expected 0 or more")
    wide = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), torch.float32)
    difference = (tuned.detach().to(wide) - base.detach().to(wide)).flatten()
    if not bool(difference.isfinite().all()):
        raise ValueError(f"{where}: tuned - base is not finite")
    size = difference.abs()
    flat = (size > tolerance).nonzero().squeeze(1)
    if keep is not None:
        most = _count(where, keep, tuned.numel())
        if flat.numel() > most:
            flat = flat[size[flat].topk(most).indices].sort().values
    return sparse_delta(flat, difference[flat], tuned.shape)


def _count(where: str, keep: int | float, size: int) -> int:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"{where}: keep is {keep!r}; expected a number")
    if not 0 <= keep <= (1.0 if isinstance(keep, float) else size):
        raise ValueError(f"{where}: keep is {keep}; expected an integer in [0, {size}] or a part in [0.0, 1.0]")
    return round(keep * size) if isinstance(keep, float) else keep


def from_shira(shira_weight: Tensor, shira_indices: Tensor, shape: Sequence[int], scaling: float = 1.0) -> SparseDelta:
    """The delta of a layer of PEFT's SHiRA (peft 0.21.2, tuners/shira/layer.py).

    Args:
        shira_weight: [nnz], what trains.
        shira_indices: [2, nnz], rows and columns: `layer.shira_indices[adapter]`. A saved adapter has none: PEFT draws
            them again from the configuration's random_seed, as `shira_indices` here does.
        shape: [out_features, in_features] of the layer's weight.
        scaling: `layer.scaling[adapter]`.

    Raises:
        TypeError, ValueError: as `sparse_delta`.
    """
    values = shira_weight.detach() if scaling == 1.0 else shira_weight.detach() * scaling
    return sparse_delta(shira_indices.to(shira_weight.device), values, shape)


def shira_indices(shape: Sequence[int], r: int, random_seed: int) -> Tensor:
    """The places that PEFT's `random_mask` (tuners/shira/mask_functions.py) draws: r · (out_features + in_features) of
    them, int64 [nnz], ascending.

    Args:
        shape: [out_features, in_features].
        r: of the adapter's configuration.
        random_seed: of the adapter's configuration. (Without one PEFT cannot find the places again either.)

    Raises:
        ValueError: more places than the matrix has.
    """
    rows, columns = shape
    if r * (rows + columns) > rows * columns:
        raise ValueError(f"shira_indices: r is {r}, for which {rows} x {columns} has too few weights")
    generator = torch.Generator().manual_seed(random_seed)
    return torch.randperm(rows * columns, generator=generator)[: r * (rows + columns)].sort().values


def carried(numbers: Tensor, old: Positions, new: Positions) -> Tensor:
    """Numbers that belong to places, after some places were dropped and others added: [new nnz], 0 at those that are
    new. Waits for nothing.

    Args:
        numbers: [old nnz] of any dtype.
        old, new: places of one matrix.

    Raises:
        ValueError: they are of two shapes, or `numbers` has another length.
    """
    if old.shape != new.shape:
        raise ValueError(f"carried: places of {tuple(old.shape)} and {tuple(new.shape)}; expected of one matrix")
    if numbers.shape != old.flat.shape:
        raise ValueError(f"carried: numbers has shape {tuple(numbers.shape)}; expected {tuple(old.flat.shape)}")
    if old.flat.numel() == 0:
        return numbers.new_zeros(new.flat.shape)
    found = torch.searchsorted(old.flat, new.flat).clamp_(max=old.flat.numel() - 1)
    return torch.where(old.flat[found] == new.flat, numbers[found], 0)
