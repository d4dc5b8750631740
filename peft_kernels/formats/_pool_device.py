"""A pool's memory and table on their device, and the order in which they are written there.

On a GPU nothing here makes the host wait. Three rules keep kernels from reading what is half written or gone:

- *Readers* are the streams that asked for adapter ids, or wrote. Before bytes are overwritten that were free, the
  writer waits for what the readers had been given when they became free (`fence`).
- Rows of the table that readers may be reading are written after all that the readers have been given so far, and what
  they are given later waits for the write (`published`).
- A row that nobody can name yet is written with its adapter, on whatever stream; who asks for its id waits for it.

On a CPU all of it happens at once, in the calling thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peft_kernels.formats._pool_files import ALIGN
from peft_kernels.formats._pool_memory import Move
from peft_kernels.formats.adapter_table import WORDS

Event = torch.cuda.Event

_BOUNCE_BYTES = 4 * 2**20


class Memory:
    """`arena`: the pool's bytes as a tensor of its dtype; `rows` and `host_rows`: the table, int64 [slots, layers, 4],
    and its copy on the host, which on a CPU are one tensor."""

    def __init__(self, nbytes: int, slots: int, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        with torch.inference_mode(False):  # tensors made in it could never take part in autograd
            spare = ALIGN // dtype.itemsize
            whole = torch.empty(nbytes // dtype.itemsize + spare, dtype=dtype, device=device)
            first = -whole.data_ptr() % ALIGN // dtype.itemsize
            self.arena = whole[first : first + nbytes // dtype.itemsize]
            self.rows = torch.zeros(slots, layers, WORDS, dtype=torch.int64, device=device)
            self.host_rows = torch.zeros(slots, layers, WORDS, dtype=torch.int64) if self.on_gpu else self.rows
        self.address = self.arena.data_ptr()
        self._side = torch.cuda.Stream(device) if self.on_gpu else None
        self._readers: dict[int, torch.cuda.Stream] = {}
        self._fences: dict[int, Event] = {}

    def reading(self, after: Sequence[Event]) -> None:
        """The current stream will read adapters whose bytes are there after these events."""
        if self.on_gpu:
            stream = torch.cuda.current_stream(self.device)
            self._readers[stream.cuda_stream] = stream
            for event in after:
                stream.wait_event(event)

    def fence(self) -> None:
        """Bytes have become free that kernels given to the readers before now may still read."""
        for key, stream in self._readers.items():
            self._fences[key] = stream.record_event()

    @contextlib.contextmanager
    def writing(self, after: Sequence[Event] = (), *, side: bool = False) -> Iterator[list[Event]]:
        """What is written inside goes to the current stream, or to the side stream, after the fences and `after`. The
        list that this yields then holds the event of its end; it stays empty on a CPU."""
        done: list[Event] = []
        if not self.on_gpu:
            yield done
            return
        stream = self._side if side else torch.cuda.current_stream(self.device)
        assert stream is not None
        if not side:
            self._readers[stream.cuda_stream] = stream
        for event in (*self._fences.values(), *after):
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            yield done
        done.append(stream.record_event())

    @contextlib.contextmanager
    def published(self, after: Sequence[Event] = ()) -> Iterator[list[Event]]:
        """`writing` on the current stream, between what the readers were given before and what they are given later."""
        self.fence()
        with self.writing(after) as done:
            yield done
        for stream in self._readers.values():
            for event in done:
                stream.wait_event(event)
        self.fence()

    def put(self, start: int, blob: Tensor) -> None:
        """Writes an adapter's run at byte `start`."""
        self._bytes(start, blob.nbytes).copy_(blob, non_blocking=True)

    def set_rows(self, slot: int, rows: Tensor) -> None:
        """Writes an adapter's rows, int64 [layers, 4], by one copy."""
        self.host_rows[slot].copy_(rows)
        if self.on_gpu:
            self.rows[slot].copy_(rows.pin_memory(), non_blocking=True)

    def clear_rows(self, slot: int) -> None:
        """Leaves the slot without an adapter."""
        self.host_rows[slot].zero_()
        if self.on_gpu:
            self.rows[slot].zero_()

    def move(self, move: Move) -> None:
        """Moves bytes down. Where source and target overlap a copy goes through a buffer, the lowest bytes first, so
        that it never overwrites what it has yet to read."""
        distance = move.start - move.to
        step = move.size if distance >= move.size else _BOUNCE_BYTES
        for begin in range(0, move.size, step):
            size = min(step, move.size - begin)
            source = self._bytes(move.start + begin, size)
            self._bytes(move.to + begin, size).copy_(source.clone() if distance < size else source)

    def ids(self, slots: Sequence[int]) -> Tensor:
        """int64 [len(slots)] on the device."""
        host = torch.tensor(slots, dtype=torch.int64)
        return host.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else host

    def check_not_capturing(self, where: str) -> None:
        if self.on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{where}: a CUDA graph is being captured, which would repeat this at every replay; do it before, and "
                "copy the ids into the tensor that the graph reads"
            )

    def _bytes(self, start: int, size: int) -> Tensor:
        itemsize = self.arena.itemsize
        return self.arena[start // itemsize : (start + size) // itemsize]
