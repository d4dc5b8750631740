"""Many adapters beside one another, for ops whose rows choose among them: where each one's factors are.

Kernels read a *table*, int64 [adapters, layers, 4] on the device of x. The four words of an adapter in a layer are 32
bytes, one memory sector:

    address of A [r, in]; address of B [out, r]; r (int32), scaling (float32); row strides of A and B (int32, elements)

Rows are contiguous. r = 0 where the adapter has nothing in the layer, and then all four words are 0. Adapters need not
lie side by side, be stacked or have one rank: the table points to the parameters of a model (`AdapterLists`) or into a
pool's memory (`PoolAdapters`).
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.formats._device_copies import on_device

WORDS = 4
ROW = struct.Struct("<qqifii")
"""A row of the table: A, B, r, scaling, row stride of A, row stride of B."""

EMPTY_ROW = bytes(ROW.size)

BASE = -1
"""The adapter id of a row that runs the base weight alone."""


class Factors(NamedTuple):
    """One adapter in one layer: A [r, in], B [out, r], scaling; `place` is its place among the parameters, None in a
    pool."""

    A: Tensor
    B: Tensor
    scaling: float
    place: int | None


class Table(NamedTuple):
    """`rows`: the table; `layers`: which of its layers the projections of the op are; `kept`: tensors that it points to
    and that nobody else holds."""

    rows: Tensor
    layers: Sequence[int]
    kept: Sequence[Tensor] = ()


class AdapterLists:
    """Adapters where their parameters are. Entry i of the lists is adapter `adapters[i]` in projection `outputs[i]`;
    there may be none. `count`: the number of adapters, `widths`: the largest rank in each projection."""

    def __init__(
        self, lora_As: list[Tensor], lora_Bs: list[Tensor], outputs: list[int], adapters: list[int],
        scalings: list[float], widths: list[int], count: int,
    ) -> None:  # fmt: skip
        self.lora_As, self.lora_Bs, self.outputs, self.adapters = lora_As, lora_Bs, outputs, adapters
        self.scalings, self.widths, self.count = scalings, widths, count
        self._places: dict[tuple[int, int], int] | None = None
        self._ranks: list[int] = []  # of the As, as far as they are known

    def append(self, output: int, lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], scalings, ranks) -> None:
        """Takes up a projection in which every adapter has something; `ranks`: of its As."""
        self.lora_As += lora_As
        self.lora_Bs += lora_Bs
        self.outputs += [output] * len(ranks)
        self.adapters += range(len(ranks))
        self.scalings += scalings
        self._ranks += ranks
        self.widths[output] = max(1, *ranks)

    @property
    def dtype(self) -> torch.dtype | None:
        return self.lora_As[0].dtype if self.lora_As else None

    def factors(self, output: int, adapter: int) -> Factors | None:
        """Of one adapter in one projection; None where it has none."""
        if self._places is None:
            self._places = {place: i for i, place in enumerate(zip(self.outputs, self.adapters, strict=True))}
        i = self._places.get((output, adapter))
        return None if i is None else Factors(self.lora_As[i], self.lora_Bs[i], self.scalings[i], i)

    def table(self, device: torch.device) -> Table:
        """The table on `device`. Factors whose rows are not contiguous are copied, and kept by the table."""
        kept: list[Tensor] = []
        lora_As, A_strides = _row_major(self.lora_As, itertools.repeat(self._columns()), kept)
        ranks = self._ranks if len(self._ranks) == len(lora_As) else [a.shape[0] for a in lora_As]
        lora_Bs, B_strides = _row_major(self.lora_Bs, ranks, kept)
        addresses = (map(Tensor.data_ptr, lora_As), map(Tensor.data_ptr, lora_Bs))
        # One call packs all rows: a thousand by themselves take longer than their products.
        rows = zip(*addresses, ranks, self.scalings, A_strides, B_strides, strict=False)
        packed = bytearray(_rows(len(lora_As)).pack(*itertools.chain.from_iterable(rows)))
        count, layers = self.count, len(self.widths)
        if layers > 1 or len(lora_As) != count:
            scattered = bytearray(ROW.size * count * layers)
            for i, (adapter, output) in enumerate(zip(self.adapters, self.outputs, strict=True)):
                place = (adapter * layers + output) * ROW.size
                scattered[place : place + ROW.size] = packed[i * ROW.size : (i + 1) * ROW.size]
            packed = scattered
        return Table(_on_device(packed, count, layers, device), range(layers), kept)

    def _columns(self) -> int:
        return self.lora_As[0].shape[1] if self.lora_As else 0


class PoolAdapters:
    """Adapters in a pool's memory. `arena`: that memory, in the adapters' dtype; `rows` and `host_rows`: the table on
    the device and its copy on the host; `layers`: the table's layers that are the projections of the op."""

    lora_As: Sequence[Tensor] = ()
    lora_Bs: Sequence[Tensor] = ()
    outputs: Sequence[int] = ()
    adapters: Sequence[int] = ()
    scalings: Sequence[float] = ()

    def __init__(
        self, arena: Tensor, rows: Tensor, host_rows: Tensor, layers: Sequence[int], sizes: Sequence[tuple[int, int]],
        widths: Sequence[int],
    ) -> None:  # fmt: skip
        self.arena, self.rows, self.host_rows, self.layers = arena, rows, host_rows, layers
        self.sizes, self.widths, self.count = sizes, widths, rows.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.arena.dtype

    def factors(self, output: int, adapter: int) -> Factors | None:
        """As of `AdapterLists`: views of the pool's memory. The host's copy of the table says where, so nothing is read
        back from a GPU."""
        if not 0 <= adapter < self.count:
            return None
        words = self.host_rows[adapter, self.layers[output]]
        a, b, r, scaling, a_stride, b_stride = ROW.unpack(words.numpy().tobytes())
        if r == 0:
            return None
        n, k = self.sizes[output]
        start, size = self.arena.data_ptr(), self.arena.element_size()
        first = self.arena.storage_offset()
        lora_A = self.arena.as_strided((r, k), (a_stride, 1), first + (a - start) // size)
        lora_B = self.arena.as_strided((n, r), (b_stride, 1), first + (b - start) // size)
        return Factors(lora_A, lora_B, scaling, None)

    def table(self, device: torch.device) -> Table:
        return Table(self.rows, self.layers)


Adapters = AdapterLists | PoolAdapters


def row(lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[int, int, int, float, int, int]:
    """What `ROW` packs. Factors have contiguous rows; a stride of 0 stands for a single row."""
    return (
        lora_A.data_ptr(), lora_B.data_ptr(), lora_A.shape[0], scaling, lora_A.stride(0), lora_B.stride(0),
    )  # fmt: skip


def _row_major(
    factors: list[Tensor], contiguous: Iterable[int], kept: list[Tensor]
) -> tuple[list[Tensor], Iterable[int]]:
    """The factors with contiguous rows, copies of which go to `kept`, and their row strides: `contiguous` where they
    are."""
    if all(map(Tensor.is_contiguous, factors)):
        return factors, contiguous
    result = []
    for factor in factors:
        if factor.stride(1) != 1 and factor.shape[1] != 1:
            factor = factor.contiguous()
            kept.append(factor)
        result.append(factor)
    return result, [factor.stride(0) for factor in result]


@functools.lru_cache(8)
def _rows(count: int) -> struct.Struct:
    """`count` times `ROW`."""
    return struct.Struct("<" + ROW.format.removeprefix("<") * count)


def _on_device(rows: bytearray, count: int, layers: int, device: torch.device) -> Tensor:
    if not rows:
        return torch.empty(count, layers, WORDS, dtype=torch.int64, device=device)
    host = torch.frombuffer(rows, dtype=torch.int64).view(count, layers, WORDS)
    return host if device.type == "cpu" else on_device(host, bytes(rows), device)
