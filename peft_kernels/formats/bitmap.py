"""A pruned weight as one bit for each of its places and its nonzeros, in the order in which tensor cores take them.

The layout is for few rows of x (csrc/bitmap_linear.cu), where a linear layer costs what its weight's bytes cost: of 16
bits a number 1.20, 0.80 and 0.38 bytes a weight at 50, 30 and 10 % density, where a dense weight takes 2.

Rows are sorted by how many weights they keep and taken 16 at a time (a strip, `order` names its rows): strips whose
rows keep about as many need little padding. Columns are cut into chunks of 256, for which a lane of a warp has 16
bytes of bits, one for each tile of 16 x 16: bit 4v + 2h + e of byte 2q + u is row g + 8h and column
32q + 8t + 4u + 2v + e of the chunk, for lane 4g + t (as `mma.m16n8k16` lays a tile out, columns permuted).

Values go by panels, of at most 16 chunks. In a strip's panel a lane has two streams, of its even and of its odd bits,
each in the order of chunks and bits. Slot i holds element i of all 64 streams side by side (element 2·lane + e): a
lane finds all its values in one bank of shared memory. A panel has as many slots as its longest stream has elements;
`starts` says where they begin. Streams begin anew with each panel: `panels` says how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.formats._kept import PIECE, bits_of, kept_rows, row_counts
from peft_kernels.formats.mask import PackedMask

STRIP, CHUNK, LANES, TILES, STREAMS = 16, 256, 32, 16, 2
"""Rows of a strip, columns of a chunk, lanes of a warp, tiles of a chunk, streams of a lane."""
MOST_CHUNKS = 16
"""Chunks of a panel, at most: one for each warp of a block."""
_ENOUGH_PANELS, _FEW_CHUNKS = 128, 4


class BitmapWeight(NamedTuple):
    """A weight matrix of bits and nonzeros. Immutable; see the module for what is where.

    Attributes:
        values: [slots, 32, 2], the kept weights; the streams' padding is 0.
        bits: uint8 [strips, chunks, 32, 16], which weights are kept.
        starts: int32 [strips · panels + 1], the first slot of each panel of each strip, and the end.
        order: int32 [16 · strips], the row of the weight that each row of each strip is; out_features where it is none.
        shape: of the weight, [out_features, in_features].
        panels: into how many panels a strip's columns are cut.
        most_slots: slots of the largest panel.
        kept: how many weights are kept.
    """

    values: Tensor
    bits: Tensor
    starts: Tensor
    order: Tensor
    shape: torch.Size
    panels: int
    most_slots: int
    kept: int

    @property
    def layout(self) -> str:
        return "bitmap"

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight's numbers."""
        return self.values.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept in memory: [values, bits, starts, order]."""
        return [self.values, self.bits, self.starts, self.order]

    @property
    def numbers(self) -> list[int]:
        """What an op needs beside `tensors`: out_features, in_features, panels, most_slots, kept."""
        return [*self.shape, self.panels, self.most_slots, self.kept]

    @property
    def density(self) -> float:
        """Kept weights / all weights; 1.0 of an empty matrix."""
        return self.kept / self.shape.numel() if self.shape.numel() else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> BitmapWeight:
        """The same weight on another device; itself where it is there already."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])

    def with_tensors(self, tensors: Sequence[Tensor]) -> BitmapWeight:
        """The same shape over other tensors, in the order of `tensors`."""
        values, bits, starts, order = tensors
        return self._replace(values=values, bits=bits, starts=starts, order=order)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in full, [out_features, in_features], dropped weights +0. None: in its own dtype."""
        out = self.values.new_empty(self.shape, dtype=dtype or self.dtype)
        for rows, piece in self.pieces(dtype):
            out[rows] = piece
        return out

    def pieces(self, dtype: torch.dtype | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The weight in parts of bounded size: (int64 [r], the rows; [r, in_features], their weights). Each row comes
        once, in no order."""
        n, k = self.shape
        for first, last in _spans(self.bits.shape[0], k):
            rows = self.order[first * STRIP : min(last * STRIP, n)].long()
            kept = _expand(self.bits[first:last])
            places, _ = _stream_places(kept, self.panels)
            found = places + _first_slots(self.starts, self.panels, kept.shape, first, last) * (LANES * STREAMS)
            values = bits_of(self.values).new_zeros(kept.shape)
            if self.kept:
                flat = bits_of(self.values).flatten()
                values = torch.where(kept, flat[found.clamp_(max=flat.numel() - 1)], values)
            piece = _to_rows(values)[: len(rows), :k].view(self.dtype)
            yield rows, piece if dtype is None else piece.to(dtype)


def from_numbers(tensors: Sequence[Tensor], numbers: Sequence[int]) -> BitmapWeight:
    """The weight that `tensors` and `numbers` of a `BitmapWeight` describe."""
    n, k, panels, most_slots, kept = numbers
    values, bits, starts, order = tensors
    return BitmapWeight(values, bits, starts, order, torch.Size((n, k)), panels, most_slots, kept)


def compress_bitmap(weight: Tensor, mask: PackedMask | None = None, *, panels: int | None = None) -> BitmapWeight:
    """Packs a pruned weight on its own device.

    One pass counts, the host reads two numbers (how many slots there are and the most of a panel: how large the result
    is depends on the mask, so this is not for `torch.compile`), a second pass lays the values out. Temporaries are of
    bounded size.

    Args:
        weight: [out_features, in_features], of any floating dtype.
        mask: which weights are kept, with whatever they are, -0.0 and NaN included. None: those that are not 0 (NaN
            is kept, -0.0 becomes 0).
        panels: into how many panels columns are cut; None: by the shape (`panels_of`).

    Returns:
        The weight, whose `dense()` has the bits of the kept weights and +0 elsewhere.

    Raises:
        TypeError: weight or mask is of another type.
        ValueError: weight is no matrix, the mask is of another shape or on another device, or no such panels.
    """
    _check(weight, mask)
    n, k = weight.shape
    strips, chunks = -(-n // STRIP), -(-k // CHUNK)
    panels = panels_of(n, k) if panels is None else panels
    width = chunks_of_panel(chunks, panels) if panels > 0 else 0
    if not 0 < width <= MOST_CHUNKS or (chunks and (panels - 1) * width >= chunks):
        raise ValueError(f"compress_bitmap: panels is {panels}; {chunks} chunks cannot be cut into so many")
    device = weight.device
    by_row = row_counts(weight, mask)
    order = torch.full((strips * STRIP,), n, dtype=torch.int32, device=device)
    order[:n] = torch.argsort(by_row, descending=True, stable=True).int()
    bits = torch.empty(strips, chunks, LANES, TILES, dtype=torch.uint8, device=device)
    slots = torch.zeros(strips, panels, dtype=torch.int64, device=device)
    for first, last in _spans(strips, k):
        kept = _tiled(kept_rows(weight, mask, order[first * STRIP : min(last * STRIP, n)].long()), last - first)
        bits[first:last] = _to_bytes(kept)
        slots[first:last] = _stream_places(kept, panels)[1]
    starts = torch.zeros(strips * panels + 1, dtype=torch.int64, device=device)
    torch.cumsum(slots.flatten(), 0, out=starts[1:])
    numbers = (starts[-1], slots.max() if slots.numel() else starts[-1], by_row.sum())
    total, most_slots, kept_count = torch.stack(numbers).tolist()
    starts = starts.int()
    values = _values(weight, order, bits, starts, panels, total)
    return BitmapWeight(values, bits, starts, order, weight.shape, panels, most_slots, kept_count)


def panels_of(out_features: int, in_features: int) -> int:
    """Into how many panels a weight's columns are cut: the fewest of at most 16 chunks, more where a GPU's
    multiprocessors would otherwise not each have one."""
    strips, chunks = -(-out_features // STRIP), -(-in_features // CHUNK)
    panels = max(1, -(-chunks // MOST_CHUNKS))
    while strips * panels < _ENOUGH_PANELS and -(-chunks // panels) > _FEW_CHUNKS:
        panels *= 2
    return max(1, -(-chunks // chunks_of_panel(chunks, panels)))


def chunks_of_panel(chunks: int, panels: int) -> int:
    """Chunks of each panel; the last may have fewer."""
    return max(1, -(-chunks // panels))


def _check(weight: Tensor, mask: PackedMask | None) -> None:
    from peft_kernels.checks import check_floating, check_mask_of, shape_text

    check_floating("compress_bitmap", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"compress_bitmap: weight has shape {shape_text(weight.shape)}; expected (out, in)")
    if mask is not None:
        check_mask_of("compress_bitmap", "mask", mask, weight)


def _spans(strips: int, columns: int) -> Iterator[tuple[int, int]]:
    """[first, last) of strips, of about `PIECE` weights together."""
    step = max(1, PIECE // (STRIP * max(1, columns)))
    for first in range(0, strips, step):
        yield first, min(first + step, strips)


def _tiled(rows: Tensor, strips: int) -> Tensor:
    """Rows of `strips` strips [r, k], padded by zeros, as [strips, chunks, lane, tile, 4 (2v + h), 2 (e)]."""
    chunks = -(-rows.shape[1] // CHUNK)
    full = rows.new_zeros(strips * STRIP, chunks * CHUNK)
    full[: rows.shape[0], : rows.shape[1]] = rows
    parts = full.view(strips, 2, 8, chunks, 8, 4, 2, 2, 2)  # s, h, g, c, q, t, u, v, e
    return parts.permute(0, 3, 2, 5, 4, 6, 7, 1, 8).reshape(strips, chunks, LANES, TILES, 4, 2)


def _to_rows(tiles: Tensor) -> Tensor:
    """The inverse of `_tiled`: [16 · strips, 256 · chunks]."""
    strips, chunks = tiles.shape[:2]
    parts = tiles.view(strips, chunks, 8, 4, 8, 2, 2, 2, 2)  # s, c, g, t, q, u, v, h, e
    return parts.permute(0, 7, 2, 1, 4, 3, 5, 6, 8).reshape(strips * STRIP, chunks * CHUNK)


def _to_bytes(kept: Tensor) -> Tensor:
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (kept.flatten(-2).to(torch.uint8) * weights).sum(-1, dtype=torch.uint8)


def _expand(bits: Tensor) -> Tensor:
    """The inverse of `_to_bytes`: bool [strips, chunks, lane, tile, 4, 2]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).bool().view(*bits.shape, 4, 2)


def _stream_places(kept: Tensor, panels: int) -> tuple[Tensor, Tensor]:
    """Where each kept weight stands among the values of its panel, int64 in the shape of `kept`; and the slots that
    each panel takes, int64 [strips, panels]."""
    strips, chunks = kept.shape[:2]
    width = chunks_of_panel(chunks, panels)
    padded = kept.new_zeros(strips, panels * width, *kept.shape[2:])
    padded[:, :chunks] = kept
    # strip, panel, lane, e, and the stream: chunk of the panel, tile, bit
    streams = padded.view(strips, panels, width, LANES, TILES * 4, 2).permute(0, 1, 3, 5, 2, 4).flatten(4)
    ends = streams.cumsum(4, dtype=torch.int32)
    slots = ends[..., -1].amax((2, 3)).long()
    index = (ends - 1).clamp_(min=0).view(strips, panels, LANES, 2, width, TILES * 4).permute(0, 1, 4, 2, 5, 3)
    index = index.reshape(strips, panels * width, LANES, TILES, 4, 2)[:, :chunks].long() * (LANES * STREAMS)
    lane = torch.arange(LANES * STREAMS, device=kept.device).view(LANES, 1, 1, STREAMS)
    return index + lane, slots


def _first_slots(starts: Tensor, panels: int, shape: torch.Size, first: int, last: int) -> Tensor:
    """The first slot of the panel of each chunk of strips [first, last), to be added to what has `shape`."""
    chunks = shape[1]
    by_panel = starts[first * panels : last * panels].long().view(-1, panels)
    return by_panel.repeat_interleave(chunks_of_panel(chunks, panels), 1)[:, :chunks].view(*shape[:2], 1, 1, 1, 1)


def _values(weight: Tensor, order: Tensor, bits: Tensor, starts: Tensor, panels: int, total: int) -> Tensor:
    n, k = weight.shape
    size = total * LANES * STREAMS
    values = bits_of(weight).new_zeros(size + 1)  # what is not kept goes to the last element, which is cut off
    for first, last in _spans(bits.shape[0], k):
        kept = _expand(bits[first:last])
        places, _ = _stream_places(kept, panels)
        places = places + _first_slots(starts, panels, kept.shape, first, last) * (LANES * STREAMS)
        tiles = _tiled(bits_of(weight)[order[first * STRIP : min(last * STRIP, n)].long()], last - first)
        values.scatter_(0, torch.where(kept, places, size).flatten(), tiles.flatten())
    return values[:-1].view(weight.dtype).view(total, LANES, STREAMS)
