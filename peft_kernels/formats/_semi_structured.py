"""2:4 weights: of four neighbours in a row two are kept, with the place of each among the four in two bits.

PyTorch's own formats for the tensor cores' sparse products depend on the library behind them (CUTLASS, cuSPARSELt) and
exist on a GPU only; this one is the same everywhere, and theirs is made from it where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUT = "2:4"
GROUP, KEPT = 4, 2


class SemiStructuredWeight(NamedTuple):
    """A matrix with at most two numbers in each group of four neighbours of a row.

    Attributes:
        values: [out_features, 2 · G], G = ceil(in_features / 4) groups.
        places: uint8 [out_features, ceil(G / 2)]: of a group, its two places from the lowest bits up, the lower place
            first; an even group in the low half of the byte.
        shape: of the matrix, [out_features, in_features].
        transposable: whether the columns too have at most two kept numbers in each group of four neighbours, and a
            second, transposed copy may be made of it for dx where there are instructions for such weights.
    """

    values: Tensor
    places: Tensor
    shape: torch.Size
    transposable: bool

    @property
    def layout(self) -> str:
        return LAYOUT

    @property
    def tensors(self) -> list[Tensor]:
        """[values, places]."""
        return [self.values, self.places]

    @property
    def numbers(self) -> list[int]:
        """out_features, in_features, transposable."""
        return [*self.shape, int(self.transposable)]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def density(self) -> float:
        """0.5, whatever the values are."""
        return KEPT / GROUP

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> SemiStructuredWeight:
        """The same shape over other tensors, in the order of `tensors`."""
        values, places = tensors
        return self._replace(values=values, places=places)

    def to(self, device: torch.device | str) -> SemiStructuredWeight:
        """The same weight on another device; itself where it is there already."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """[out_features, in_features] with zeros between the kept numbers, in `dtype` (None: the values')."""
        return self.dense_rows(0, self.shape[0], dtype)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) of `dense`."""
        return _dense(self.values[start:stop], self.places[start:stop], dtype)[:, : self.shape[1]]

    def dense_columns(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Columns [start, stop) of `dense`."""
        first = start // (2 * GROUP)  # a byte of places has two groups
        last = -(-stop // (2 * GROUP))
        values = self.values[:, first * 2 * KEPT : last * 2 * KEPT]
        return _dense(values, self.places[:, first:last], dtype)[:, start - first * 2 * GROUP :][:, : stop - start]

    def check(self, where: str) -> None:
        """Refuses what is no such weight (waits for the device): for what comes from a file.

        Raises:
            ValueError: a tensor of another dtype or size, places that are not in order.
        """
        n, k = self.shape
        groups = -(-k // GROUP)
        if self.values.shape != (n, KEPT * groups):
            raise ValueError(f"{where}: values have shape {tuple(self.values.shape)}; expected {(n, KEPT * groups)}")
        if self.places.dtype != torch.uint8 or self.places.shape != (n, -(-groups // 2)):
            raise ValueError(
                f"{where}: places have dtype {self.places.dtype} and shape {tuple(self.places.shape)}; expected "
                f"torch.uint8 and {(n, -(-groups // 2))}"
            )
        places = _unpacked(self.places, groups)
        if bool((places[..., 0] >= places[..., 1]).any()):
            raise ValueError(f"{where}: the places of a group are not two different ones in order")


def _unpacked(places: Tensor, groups: int) -> Tensor:
    """int64 [N, groups, 2]."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=places.device)  # bytes until the last moment
    return ((places.unsqueeze(-1) >> shifts) & 3).view(places.shape[0], 2 * places.shape[1], KEPT)[:, :groups].long()


def _dense(values: Tensor, places: Tensor, dtype: torch.dtype | None) -> Tensor:
    n, groups = values.shape[0], values.shape[1] // KEPT
    dense = values.new_zeros(n, groups, GROUP, dtype=dtype)
    dense.scatter_(2, _unpacked(places, groups), values.reshape(n, groups, KEPT).to(dense.dtype))
    return dense.view(n, groups * GROUP)


def compress_2_4(weight: Tensor, kept: Tensor | None, keep_transpose: bool) -> SemiStructuredWeight:
    """Keeps the numbers other than 0 (-0 is 0, NaN is not), or those that are `kept`.

    Args:
        weight: [out_features, in_features]; zero outside `kept`.
        kept: bool [out_features, in_features], or None.
        keep_transpose: whether a transposed copy may be made, where the numbers allow one.

    Raises:
        ValueError: groups of four with more than two; the message says how many.
    """
    present = weight != 0 if kept is None else kept
    n, k = weight.shape
    groups = -(-k // GROUP)
    grouped = F.pad(present, (0, groups * GROUP - k)).view(n, groups, GROUP)
    crowded = int((grouped.sum(2) > KEPT).sum())
    if crowded:
        what = "numbers other than 0" if kept is None else "kept numbers"
        raise ValueError(
            f"compress: {crowded} of {n * groups} groups of four neighbours have more than two {what}; layout '2:4' "
            "takes weights pruned to 2:4 (mask chooses which to keep)"
        )
    # What is there comes before what is not, each in order: the first two are the places, in order once sorted.
    places = grouped.logical_not().to(torch.uint8).argsort(dim=2, stable=True)[..., :KEPT].sort(dim=2).values
    padded = F.pad(weight, (0, groups * GROUP - k)).view(n, groups, GROUP)
    values = torch.where(grouped, padded, 0).gather(2, places).view(n, groups * KEPT)
    columns = F.pad(present, (0, 0, 0, -n % GROUP)).view(-(-n // GROUP), GROUP, k).sum(1)
    transposable = keep_transpose and not bool((columns > KEPT).any())
    return SemiStructuredWeight(values, _packed(places), weight.shape, transposable)


def _packed(places: Tensor) -> Tensor:
    """int64 [N, groups, 2] as `SemiStructuredWeight.places`; the half byte of no group is (0, 1)."""
    nibbles = (places[..., 0] | places[..., 1] << 2).to(torch.uint8)
    nibbles = F.pad(nibbles, (0, nibbles.shape[1] % 2), value=1 << 2)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4
