"""Which rows chose which adapter, found on the GPU: the host never reads the ids, and shapes follow from sizes alone.

The choices ids [M, k] are M k places; place // k is the row. Places are sorted by adapter, those of one adapter in
their own order, and those without one, -1 or out of range, come last as a segment of adapter `count`. Kernels work on
tiles of places of one adapter each, which a table lists: T = ceil(M k / BLOCK_M) + min(M k, count) always suffice, and
those that were not needed come last and end at once.

Ids are not checked here: whatever they are, each place is in one segment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.kernels.triton import _launch

_BLOCK = 256
NOT_NEEDED = -1


class SortedPlaces:
    """Attributes:
    order: int64 [M k], the places by adapter.
    ends: int32 [count + 1], for each adapter, and for none, where in `order` it ends.
    per_row: k.
    """

    def __init__(self, ids: Tensor, count: int) -> None:
        places = ids.reshape(-1)
        keys = torch.where((places < 0) | (places >= count), count, places)
        # Fewer bytes are fewer passes of a radix sort.
        keys = keys.to(torch.int16 if count < 1 << 15 else torch.int32)
        in_order, self.order = torch.sort(keys, stable=True)
        owners = torch.arange(count + 1, dtype=keys.dtype, device=keys.device)
        self.ends = torch.searchsorted(in_order, owners, right=True, out_int32=True)
        self.count, self.per_row = count, ids.shape[1]
        self._tiles: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.order.shape[0]

    @property
    def rows_each(self) -> int:
        """Places of an adapter on average, rounded up to a power of two: what configurations are chosen by."""
        return _launch.bucket(_launch.blocks(len(self), max(1, self.count)))

    def tiles(self, block_m: int) -> Tensor:
        """int32 [T, 3]: of each tile the adapter (`count` for none, -1 where not needed), where in `order` it begins
        and where it ends."""
        return self._table(block_m)[0]

    def first_tiles(self, block_m: int) -> Tensor:
        """int32 [count + 2]: the first tile of each adapter, of no adapter, and the number of tiles that are needed."""
        return self._table(block_m)[1]

    def _table(self, block_m: int) -> tuple[Tensor, Tensor]:
        if block_m not in self._tiles:
            number = _launch.blocks(len(self), block_m) + min(len(self), self.count)
            device = self.ends.device
            tiles = torch.empty((number, 3), dtype=torch.int32, device=device)
            firsts = torch.empty((self.count + 2,), dtype=torch.int32, device=device)
            _launch.launch(
                _list_tiles, (self.count + 1,), device, self.ends, tiles, firsts, self.count, number,
                BLOCK_M=block_m, BLOCK=_BLOCK, num_warps=1,
            )  # fmt: skip
            self._tiles[block_m] = tiles, firsts
        return self._tiles[block_m]


@triton.jit
def ends_of(ends, segments, inside):
    """(begin, end) of segments."""
    begin = tl.load(ends + segments - 1, mask=inside & (segments > 0), other=0)
    return begin, tl.load(ends + segments, mask=inside, other=0)


@triton.jit(do_not_specialize=["count", "number"])
def _list_tiles(ends, tiles, firsts, count, number, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles of one segment; the last program also marks what is not needed."""
    segment = tl.program_id(0)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for at in range(0, segment, BLOCK):
        others = at + tl.arange(0, BLOCK)
        begin, end = ends_of(ends, others, others < segment)
        before += (end - begin + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(before, 0)
    begin, end = ends_of(ends, segment, segment >= 0)
    stop = first + (end - begin + BLOCK_M - 1) // BLOCK_M
    tl.store(firsts + segment, first)
    if segment == count:
        tl.store(firsts + count + 1, stop)
        for at in range(stop, number, BLOCK):
            unused = at + tl.arange(0, BLOCK)
            tl.store(tiles + unused.to(tl.int64) * 3, tl.full((BLOCK,), -1, tl.int32), mask=unused < number)
    for at in range(first, stop, BLOCK):
        mine = at + tl.arange(0, BLOCK)
        place, start = tiles + mine.to(tl.int64) * 3, begin + (mine - first) * BLOCK_M
        tl.store(place, tl.zeros((BLOCK,), tl.int32) + segment, mask=mine < stop)
        tl.store(place + 1, start, mask=mine < stop)
        tl.store(place + 2, tl.minimum(start + BLOCK_M, end), mask=mine < stop)


@triton.jit
def tile_at(tiles, number):
    """(adapter, begin, end) of a tile; -1 for the adapter of one that is not needed."""
    place = tiles + tl.cast(number, tl.int64) * 3
    return tl.load(place), tl.load(place + 1), tl.load(place + 2)


@triton.jit
def places_of(order, begin, end, BLOCK_M: tl.constexpr):
    """(places [BLOCK_M], which of them belong to the tile)."""
    at = begin + tl.arange(0, BLOCK_M)
    return tl.load(order + at, mask=at < end, other=0), at < end
