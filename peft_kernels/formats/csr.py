"""A pruned weight as its kept numbers and their columns, row by row: time and bytes are paid for what is kept alone.

The layout is for weights of which little is kept: 4 bytes for a kept 16-bit number, 0.40 bytes a weight at 10 %
density (`formats.bitmap` takes 0.37 there and 1.2 at 50 %, where this layout takes 2, but decodes every place).

Rows are compressed sparse rows in groups of 8 numbers and 8 columns, so that a thread takes a group by two aligned
loads of 16 bytes. A row's last group is filled up with the number +0 at column `in_features`, which no matrix has: what
multiplies keeps a zero there, so that no infinity of x is multiplied with a 0 that pads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats._kept import PIECE, bits_of, kept_rows, row_counts
from peft_kernels.formats.mask import PackedMask

LAYOUT = "csr"
GROUP = 8
"""Kept numbers of a group."""
MOST_NARROW = 65_535
"""The most input features whose columns take 16 bits; those of wider weights take 32."""
_MOST_GROUPS = 2**31 - 1  # `starts` are int32


class CsrWeight(NamedTuple):
    """A weight matrix of kept numbers and their columns. Immutable; see the module for what is where.

    Attributes:
        values: [groups, 8], the kept weights row by row, in the order of columns.
        columns: int16 [groups, 8], of each, to be read as unsigned; int32 above 65,535 input features.
        starts: int32 [out_features + 1], the first group of each row, and the end.
        shape: of the weight, [out_features, in_features].
        most_groups: groups of the row that has the most.
        kept: how many weights are kept.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    shape: torch.Size
    most_groups: int
    kept: int

    @property
    def layout(self) -> str:
        return LAYOUT

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight's numbers."""
        return self.values.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept in memory: [values, columns, starts]."""
        return [self.values, self.columns, self.starts]

    @property
    def numbers(self) -> list[int]:
        """What an op needs beside `tensors`: out_features, in_features, most_groups, kept."""
        return [*self.shape, self.most_groups, self.kept]

    @property
    def density(self) -> float:
        """Kept weights / all weights; 1.0 of an empty matrix."""
        return self.kept / self.shape.numel() if self.shape.numel() else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> CsrWeight:
        """The same weight on another device; itself where it is there already."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])

    def with_tensors(self, tensors: Sequence[Tensor]) -> CsrWeight:
        """The same shape over other tensors, in the order of `tensors`."""
        values, columns, starts = tensors
        return self._replace(values=values, columns=columns, starts=starts)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in full, [out_features, in_features], dropped weights +0. None: in its own dtype."""
        out = self.values.new_empty(self.shape, dtype=dtype or self.dtype)
        for start, stop in _spans(*self.shape):
            out[start:stop] = self.dense_rows(start, stop, dtype)
        return out

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) of `dense`, without waiting for the device: every row is read as if it were the longest.
        Rows lie a multiple of 8 numbers apart where in_features is one."""
        k, starts = self.shape[1], self.starts[start : stop + 1]
        groups = starts[:-1, None] + torch.arange(self.most_groups, device=self.device)
        alive = groups < starts[1:, None]
        groups = torch.where(alive, groups, 0)
        columns = torch.where(alive.unsqueeze(2), _wide(self.columns)[groups], k)
        values = bits_of(self.values)[groups]
        out = values.new_zeros(stop - start, k + GROUP).scatter_(1, columns.flatten(1).long(), values.flatten(1))
        dense = out.view(self.dtype)[:, :k]
        return dense if dtype is None else dense.to(dtype)

    def check(self, where: str) -> None:
        """Refuses what is no such weight (waits for the device): for what comes from a file.

        Raises:
            ValueError: a tensor of another dtype or size, starts that do not ascend, columns out of range or order.
        """
        (n, k), groups = self.shape, self.values.shape[0]
        expected = {
            "values": (self.values, (groups, GROUP), self.dtype),
            "columns": (self.columns, (groups, GROUP), _column_dtype(k)),
            "starts": (self.starts, (n + 1,), torch.int32),
        }
        for name, (tensor, shape, dtype) in expected.items():
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{where}: {name} have dtype {tensor.dtype} and shape {tuple(tensor.shape)}; expected {dtype}, "
                    f"{shape}"
                )
        sizes = self.starts.diff()
        if int(self.starts[0]) or int(self.starts[-1]) != groups or bool((sizes < 0).any()):
            raise ValueError(f"{where}: starts do not ascend from 0 to {groups}")
        self._check_columns(where, sizes)
        most, kept = (int(sizes.max()) if n else 0), int((_wide(self.columns) != k).sum())
        if (most, kept) != (self.most_groups, self.kept):
            raise ValueError(
                f"{where}: {self.kept} kept weights, at most {self.most_groups} groups in a row; its tensors have "
                f"{kept} and {most}"
            )

    def _check_columns(self, where: str, sizes: Tensor) -> None:
        n, k = self.shape
        columns = _wide(self.columns)
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) <= k:
            raise ValueError(
                f"{where}: columns {int(columns.min())} to {int(columns.max())}; expected ones in [0, {k})"
            )
        pads = (columns == k).flatten()
        rows = torch.arange(n, device=self.device).repeat_interleave(sizes.long()).repeat_interleave(GROUP)
        in_order = (columns.flatten().diff() > 0) | (pads[:-1] & pads[1:]) | (rows.diff() != 0)
        if not bool(in_order.all()):
            raise ValueError(f"{where}: a row's columns are not in order, or one occurs twice")
        if bool(bits_of(self.values).flatten()[pads].any()):
            raise ValueError(f"{where}: numbers other than 0 beyond the last column")


def from_numbers(tensors: Sequence[Tensor], numbers: Sequence[int]) -> CsrWeight:
    """The weight that `tensors` and `numbers` of a `CsrWeight` describe."""
    n, k, most_groups, kept = numbers
    values, columns, starts = tensors
    return CsrWeight(values, columns, starts, torch.Size((n, k)), most_groups, kept)


def compress_csr(weight: Tensor, mask: PackedMask | None = None) -> CsrWeight:
    """Packs a pruned weight on its own device (waits for the device; temporaries are of bounded size).

    Args:
        weight: [out_features, in_features], of any floating dtype.
        mask: which weights are kept, with whatever they are, -0.0 and NaN included. None: those that are not 0.

    Returns:
        The weight, whose `dense()` has the bits of the kept weights and +0 elsewhere.

    Raises:
        ValueError: more than 2³¹ groups of kept weights.
    """
    (n, k), device = weight.shape, weight.device
    counts = row_counts(weight, mask)
    sizes = -(-counts // GROUP)
    starts = F.pad(sizes.cumsum(0), (1, 0))
    most = sizes.max() if n else starts[0]
    total, most_groups, kept = torch.stack((starts[-1], most, counts.sum())).tolist()
    if total > _MOST_GROUPS:
        raise ValueError(f"compress: {total} groups of kept weights; expected at most {_MOST_GROUPS}")
    values = bits_of(weight).new_zeros(total * GROUP)
    columns = torch.full((total * GROUP,), k, dtype=torch.int32, device=device).to(_column_dtype(k))
    for first, last in _spans(n, k):
        rows, found = kept_rows(weight, mask, torch.arange(first, last, device=device)).nonzero().unbind(1)
        some = counts[first:last]
        # The place of a kept weight: its row's, and how many of the row come before it.
        before = some.cumsum(0) - some
        places = starts[first:last][rows] * GROUP + torch.arange(len(rows), device=device) - before[rows]
        values[places] = bits_of(weight[first:last])[rows, found]
        columns[places] = found.to(columns.dtype)
    tensors = (values.view(weight.dtype).view(total, GROUP), columns.view(total, GROUP), starts.int())
    return CsrWeight(*tensors, weight.shape, most_groups, kept)


def _column_dtype(in_features: int) -> torch.dtype:
    """One that holds in_features itself, too: the column of what pads."""
    return torch.int16 if in_features <= MOST_NARROW else torch.int32


def _wide(columns: Tensor) -> Tensor:
    """As int32, those of 16 bits read as unsigned."""
    return columns.int() & MOST_NARROW if columns.dtype == torch.int16 else columns


def _spans(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """[first, last) of rows, of about `PIECE` weights together."""
    step = max(1, PIECE // max(1, columns))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
