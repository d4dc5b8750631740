"""The order in which an `AdapterPool` writes on a GPU, on streams that are played here: what each was given runs in its
order, events are waited for, and everything else comes in a random order, copies and kernels in pieces.

A kernel that reads a row of the table too early or too late, or bytes that were overwritten meanwhile, sees another
adapter than its own.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable

import pytest
import torch

from peft_kernels import AdapterPool
from peft_kernels.formats import _pool_files
from peft_kernels.formats import pool as pool_module
from peft_kernels.formats._pool_device import Memory
from peft_kernels.formats.adapter_table import ROW
from peft_kernels.formats.pool import PoolFullError
from tests.formats.pools import SIZES, Drawn, audit, drawn, put, run_bytes

SMALL = run_bytes(drawn(8, 0))


class PlayedEvent:
    done = False

    def query(self) -> bool:
        return self.done


class PlayedStream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.work: deque[PlayedEvent | Callable[[], None]] = deque()

    def record_event(self) -> PlayedEvent:
        event = PlayedEvent()
        self.work.append(lambda: setattr(event, "done", True))
        return event

    def wait_event(self, event: PlayedEvent) -> None:
        self.work.append(event)

    def step(self) -> bool:
        """Does the next piece of work, if it need not wait."""
        while self.work and isinstance(self.work[0], PlayedEvent) and self.work[0].done:
            self.work.popleft()
        if not self.work or isinstance(self.work[0], PlayedEvent):
            return False
        self.work.popleft()()
        return True


class Gpu:
    """The streams, one of which is current."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams = [PlayedStream(i) for i in range(3)]
        self.side = PlayedStream(99)
        self.current = self.streams[0]

    @contextlib.contextmanager
    def stream(self, stream: PlayedStream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.random.choice([*self.streams, self.side]).step()

    def finish(self) -> None:
        streams = [*self.streams, self.side]
        while any(stream.step() for stream in streams):
            pass
        assert not any(stream.work for stream in streams), "streams wait for one another"


def played_memory(gpu: Gpu) -> type[Memory]:
    """The pool's memory, whose writes are given to the current stream in pieces."""

    class PlayedMemory(Memory):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.on_gpu, self._side, self.host_rows = True, gpu.side, self.rows.clone()

        def put(self, start, blob) -> None:
            for at in range(0, blob.nbytes, SMALL // 2):
                piece = blob[at // 4 : (at + SMALL // 2) // 4]
                gpu.current.work.append(lambda at=at, piece=piece: Memory.put(self, start + at, piece))

        def set_rows(self, slot, rows) -> None:
            self.host_rows[slot].copy_(rows)
            gpu.current.work.append(lambda: self.rows[slot].copy_(rows))

        def clear_rows(self, slot) -> None:
            self.host_rows[slot].zero_()
            gpu.current.work.append(lambda: self.rows[slot].zero_())

        def move(self, move) -> None:
            gpu.current.work.append(lambda: Memory.move(self, move))

        def ids(self, slots) -> list[int]:
            return list(slots)

    return PlayedMemory


def play(monkeypatch, seed: int) -> Gpu:
    """From now on pools on the CPU think that they are on this one."""
    gpu = Gpu(seed)
    monkeypatch.setattr(pool_module, "Memory", played_memory(gpu))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    pack = _pool_files.pack
    monkeypatch.setattr(_pool_files, "pack", lambda *arguments: pack(*arguments[:-1], False))  # no pinned memory
    return gpu


def launch(gpu: Gpu, pool: AdapterPool, slot: int, adapter: Drawn) -> None:
    """A kernel on the current stream: it reads the row of each layer, and the factors some time later."""
    memory, seen = pool._memory, {}

    def read_rows() -> None:
        for i, layer in enumerate(SIZES):
            seen[layer] = ROW.unpack(memory.rows[slot, i].numpy().tobytes())

    def read_factors() -> None:
        for layer, (n, k) in SIZES.items():
            a, b, r, scaling, k_stride, b_stride = seen[layer]
            lora_A, lora_B = adapter.factors[layer]
            assert (r, scaling, k_stride) == (lora_A.shape[0], adapter.scaling, k)
            first_a, first_b = ((address - memory.address) // 4 for address in (a, b))
            assert torch.equal(memory.arena.as_strided((r, k), (k, 1), memory.arena.storage_offset() + first_a), lora_A)
            assert torch.equal(
                memory.arena.as_strided((n, r), (b_stride, 1), memory.arena.storage_offset() + first_b), lora_B
            )

    gpu.current.work += [read_rows, read_factors]


@pytest.mark.parametrize("seed", range(2))
def test_no_kernel_sees_what_is_not_its_own(monkeypatch, seed):
    gpu = play(monkeypatch, seed)

    pool, adapters = AdapterPool(SIZES, budget=8 * SMALL, slots=5), {}
    choose, names = gpu.random, [f"n{i}" for i in range(9)]
    drawings = [drawn(r, s) for r in (3, 8, 14, 20) for s in range(3)]
    blocks: list[tuple] = []
    gpu.current = gpu.streams[1]
    for name in names:
        adapters[name] = put(pool, name, choose.choice(drawings))
    adapters["graph"] = put(pool, "graph", choose.choice(drawings), pin=True)
    with gpu.stream(gpu.streams[0]):  # which only ever reads
        (graph,) = pool.ids(["graph"])
    for _ in range(900):
        gpu.advance(choose.randint(0, 6))
        gpu.current = choose.choice(gpu.streams[1:])
        what, some = choose.choice("llerrrpuukGgg"), choose.sample(names, 2)
        with contextlib.suppress(PoolFullError):
            if what == "l":
                adapter = choose.choice(drawings)
                put(pool, some[0], adapter)
                adapters[some[0]] = adapter
            elif what == "e" and not any(some[0] in block[2] for block in blocks):
                pool.evict(some[0])
            elif what == "r":
                for slot, name in zip(pool.ids(some), some, strict=True):
                    launch(gpu, pool, slot, adapters[name])
            elif what == "G":
                adapter = choose.choice(drawings)
                put(pool, "graph", adapter)
                adapters["graph"] = adapter
            elif what == "g":  # a captured graph does not ask for ids again
                with gpu.stream(gpu.streams[0]):
                    launch(gpu, pool, graph, adapters["graph"])
            elif what == "p":
                pool.prefetch(some)
            elif what == "u" and not blocks:
                block = contextlib.ExitStack()
                slots = block.enter_context(pool.use(some))
                blocks.append((block, gpu.current, some, slots, [adapters[name] for name in some]))
            elif what == "k" and blocks:
                block, stream, _, slots, held = blocks.pop()
                with gpu.stream(stream), block:
                    for slot, adapter in zip(slots, held, strict=True):
                        launch(gpu, pool, slot, adapter)
    while blocks:
        blocks.pop()[0].close()
    gpu.finish()
    assert torch.equal(pool._memory.rows, pool._memory.host_rows)
    stats = pool.stats()
    assert min(stats.evictions, stats.compactions, stats.replacements, stats.prefetches, stats.misses) > 20
    audit(pool)


@pytest.mark.parametrize("seed", range(8))
def test_writers_that_nobody_reads_yet(monkeypatch, seed):
    """Three streams load, replace, evict and move; who comes in the end finds all of it whole."""
    gpu = play(monkeypatch, seed)
    pool, adapters = AdapterPool(SIZES, budget=8 * SMALL, slots=5), {}
    drawings = [drawn(r, s) for r in (3, 8, 14, 20) for s in range(3)]
    for _ in range(60):
        gpu.advance(gpu.random.randint(0, 3))
        gpu.current = gpu.random.choice(gpu.streams)
        name = f"n{gpu.random.randrange(6)}"
        if gpu.random.random() < 0.7 or name not in adapters:
            adapters[name] = put(pool, name, gpu.random.choice(drawings))
        else:
            pool.evict(name)
    gpu.current = PlayedStream(3)
    gpu.streams.append(gpu.current)
    resident = [place.known.name for place in pool._state.at.values()]
    for slot, name in zip(pool.ids(resident), resident, strict=True):
        launch(gpu, pool, slot, adapters[name])
    while gpu.current.work:
        gpu.advance(1)
    gpu.finish()


def test_a_prefetch_into_free_memory_waits_for_nobody(monkeypatch):
    gpu = play(monkeypatch, 0)
    pool = AdapterPool(SIZES, budget=8 * SMALL)
    for i, name in enumerate("ab"):
        put(pool, name, drawn(8, i))
    pool.ids(["a"])
    pool.evict("b")
    gpu.finish()
    gpu.current.wait_event(PlayedEvent())  # the stream is busy for ever
    pool.prefetch(["b"])
    while gpu.side.step():
        pass
    assert pool._state.known["b"].place.ready.query()


def test_who_asks_for_a_moved_adapter_waits_for_the_move(monkeypatch):
    """On a stream, too, that the pool has not seen before."""
    gpu = play(monkeypatch, 0)
    pool = AdapterPool(SIZES, budget=4 * SMALL)
    for name, r in (("first", 8), ("large", 16)):
        put(pool, name, drawn(r, 1))
    gpu.finish()
    pool.remove("first")
    put(pool, "wide", drawn(16, 2))
    assert pool.stats().compactions == 1
    gpu.current = PlayedStream(3)
    gpu.streams.append(gpu.current)
    launch(gpu, pool, pool.ids(["large"])[0], drawn(16, 1))
    assert not gpu.current.step()
    gpu.finish()
