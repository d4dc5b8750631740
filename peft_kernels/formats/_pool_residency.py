"""Which adapters of a pool are in its memory: who comes in, who goes, what is copied on the host. `AdapterPool` holds
its lock around every call."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from peft_kernels.formats._pool_device import Event, Memory
from peft_kernels.formats._pool_files import Layout, Packed
from peft_kernels.formats._pool_memory import Move, Runs
from peft_kernels.formats.strict_json import short


class PoolError(ValueError):
    """What an `AdapterPool` refuses. It is as it was before."""


class UnknownAdapterError(PoolError):
    """A name that the pool does not know, or no longer."""


class AdapterInUseError(PoolError):
    """The adapter is pinned, or a `use` block that is open holds it."""


class PoolFullError(PoolError):
    """There is no room: the adapter is larger than the budget, or what is there is pinned or in use."""


@dataclass(frozen=True)
class PoolStats:
    """What an `AdapterPool` holds and what it has done.

    Attributes:
        adapters: names that it knows.
        resident: adapters in device memory; `pinned` and `in_use` (held by `use` blocks) of them cannot be evicted.
        host_copies: adapters with a copy on the host, and `host_bytes` that these take.
        slots: rows of the table, `free_slots` of them without an adapter.
        budget: bytes of device memory: `bytes_used` by adapters, `bytes_free` in all, `largest_run` in one piece.
        hits: names that `ids` or `use` found in device memory; misses: that they had to bring back.
        loads: adapters loaded, `replacements` of them under a name that was there.
        evictions: adapters that left device memory, asked for or to make room.
        compactions: times that adapters were moved together, `bytes_moved` in all.
        prefetches: adapters that `prefetch` brought back.
        rereads: folders read again because the host copy was gone.
        dropped: host copies given up for the host's budget.
    """

    adapters: int
    resident: int
    pinned: int
    in_use: int
    host_copies: int
    host_bytes: int
    slots: int
    free_slots: int
    budget: int
    bytes_used: int
    bytes_free: int
    largest_run: int
    hits: int
    misses: int
    loads: int
    replacements: int
    evictions: int
    compactions: int
    bytes_moved: int
    prefetches: int
    rereads: int
    dropped: int


@dataclass(eq=False)
class Known:
    """An adapter that the pool knows: in device memory, as a copy on the host, in a folder, or in several of them."""

    name: str
    folder: str | None
    copy: Packed | None = None
    place: Place | None = None
    pinned: bool = False


@dataclass(eq=False)
class Place:
    """An adapter in device memory. `holds`: how many open blocks use it; `ready`: the write that readers wait for."""

    known: Known
    start: int
    slot: int
    layout: Layout
    holds: int = 0
    ready: Event | None = None


_COUNTED = (
    "hits", "misses", "loads", "replacements", "evictions", "compactions", "bytes_moved", "prefetches", "rereads",
    "dropped",
)  # fmt: skip


def place_of(known: Known) -> Place:
    """Of an adapter that is in device memory."""
    assert known.place is not None
    return known.place


class Residency:
    """The state of a pool. No method does work that grows with the number of adapters, except to move some.

    Attributes:
        known: by name.
        at: places by their start. `held`: those that open blocks use.
        idle: adapters that may be evicted, the least recently used first; `idle_bytes` in all.
        copies: bytes of each copy on the host, the least recently used first; `host_bytes` in all.
        widths: the largest rank so far in each layer, or what the pool was told.
    """

    def __init__(
        self, runs: Runs, memory: Memory, slots: int, host_budget: int | None, widths: list[int], fixed_widths: bool
    ) -> None:
        self.runs, self.memory, self.slots, self.host_budget = runs, memory, slots, host_budget
        self.widths, self._fixed_widths = widths, fixed_widths
        self.known: dict[str, Known] = {}
        self.at: dict[int, Place] = {}
        self.held: set[Place] = set()
        self.idle: OrderedDict[str, Known] = OrderedDict()
        self.copies: OrderedDict[str, int] = OrderedDict()
        self.free_slots = list(range(slots))[::-1]
        self.idle_bytes = self.host_bytes = self.pinned = 0
        self.counts: Counter[str] = Counter()

    def stats(self) -> PoolStats:
        return PoolStats(
            adapters=len(self.known),
            resident=len(self.at),
            pinned=self.pinned,
            in_use=len(self.held),
            host_copies=len(self.copies),
            host_bytes=self.host_bytes,
            slots=self.slots,
            free_slots=len(self.free_slots),
            budget=self.runs.size,
            bytes_used=self.runs.size - self.runs.free,
            bytes_free=self.runs.free,
            largest_run=self.runs.largest,
            **{name: self.counts[name] for name in _COUNTED},
        )

    def hold_all(self, where: str, wanted: Sequence[Known], sources: dict[Known, Packed], side: bool) -> list[Place]:
        """Brings those of `sources`, which are not in device memory, there and holds all that are wanted.

        Raises:
            PoolFullError: nothing is held then. Unless what others hold cuts the memory to pieces, nothing has changed.
        """
        self._check_room(where, [packed.layout.nbytes for packed in sources.values()], wanted)
        held: list[Place] = []
        try:
            held += [self._hold(known) for known in wanted if known.place is not None]
            for known, packed in sources.items():
                self._bring(where, known, packed, side)
                held.append(self._hold(known))
        except BaseException:
            self.release(held)
            raise
        self.held.update(held)  # not before: what no block uses yet may still be moved
        for known, packed in sources.items():
            if known.copy is None:
                self._keep_copy(known, packed)
                self.counts["rereads"] += 1
        self._touch_copies(wanted)
        return held

    def touch(self, wanted: Sequence[Known]) -> None:
        """Says that these, which are in device memory, are used."""
        for known in wanted:
            if known.name in self.idle:
                self.idle.move_to_end(known.name)
        self._touch_copies(wanted)

    def release(self, held: Sequence[Place]) -> None:
        for place in held:
            place.holds -= 1
            if place.holds == 0:
                self.held.discard(place)
                if place.known.place is not place:  # replaced while it was in use
                    self._leave([place])
                elif not place.known.pinned:
                    self._set_idle(place.known, True)

    def replace(self, where: str, known: Known, packed: Packed) -> None:
        """Puts a new adapter into device memory, in place of the one of its name if there is one.

        Raises:
            PoolFullError: nothing has changed.
        """
        old = self.known.get(known.name)
        own = old.place if old is not None and old.place is not None and not old.place.holds else None
        start = self._room(where, packed.layout.nbytes, own)
        place = Place(known, start, self.free_slots.pop() if own is None else own.slot, packed.layout)
        if own is None:
            with self.memory.writing() as done:
                self._write(place, packed)
        else:
            with self.memory.published(unfinished([own])) as done:
                self._write(place, packed)
        if old is not None:
            self._set_idle(old, False)
            self._drop_copy(old)
            known.pinned |= old.pinned
            self.pinned -= old.pinned
            old.place = None
            self.counts["replacements"] += 1
        self.known[known.name] = known
        self.pinned += known.pinned
        self._enter(place, done)
        self._keep_copy(known, packed)
        self.counts["loads"] += 1

    def evict(self, known: Known) -> None:
        """Of an adapter that is neither pinned nor held."""
        if known.place is not None:
            self._evict([known])

    def remove(self, known: Known) -> None:
        """Of an adapter that is neither pinned nor held."""
        self.evict(known)
        self._drop_copy(known)
        self.known.pop(known.name, None)

    def set_pinned(self, known: Known, pinned: bool) -> None:
        self.pinned += pinned - known.pinned
        known.pinned = pinned
        if known.place is not None and not known.place.holds:
            self._set_idle(known, not pinned)

    def _hold(self, known: Known) -> Place:
        place = place_of(known)
        self._set_idle(known, False)
        place.holds += 1
        return place

    def _touch_copies(self, wanted: Sequence[Known]) -> None:
        for known in wanted:
            if known.copy is not None:
                self.copies.move_to_end(known.name)

    def _set_idle(self, known: Known, idle: bool) -> None:
        if idle == (known.name in self.idle):
            return
        if idle:
            self.idle[known.name] = known
        else:
            del self.idle[known.name]
        self.idle_bytes += place_of(known).layout.nbytes * (1 if idle else -1)

    def _bring(self, where: str, known: Known, packed: Packed, side: bool) -> None:
        start = self._room(where, packed.layout.nbytes, None)
        place = Place(known, start, self.free_slots.pop(), packed.layout)
        with self.memory.writing(side=side) as done:
            self._write(place, packed)
        self._enter(place, done)

    def _write(self, place: Place, packed: Packed) -> None:
        self.memory.put(place.start, packed.blob)
        self._set_rows(place)

    def _set_rows(self, place: Place) -> None:
        self.memory.set_rows(place.slot, place.layout.rows(self.memory.address + place.start))

    def _enter(self, place: Place, done: Sequence[Event]) -> None:
        known = place.known
        known.place, self.at[place.start] = place, place
        place.ready = done[0] if done else None
        if not known.pinned:
            self._set_idle(known, True)
        if not self._fixed_widths:
            self.widths[:] = map(max, self.widths, place.layout.ranks)

    def _evict(self, victims: Sequence[Known], *, given: bool = False) -> None:
        for known in victims:
            self._set_idle(known, False)
        self._leave([place_of(known) for known in victims], given=given)
        for known in victims:
            known.place = None
            self._forget_if_gone(known)
        self.counts["evictions"] += len(victims)

    def _leave(self, places: Sequence[Place], *, given: bool = False) -> None:
        """Frees their slots and, unless that was done, their runs."""
        if not places:
            return
        with self.memory.published(unfinished(places)):
            for place in places:
                self.memory.clear_rows(place.slot)
        for place in places:
            del self.at[place.start]
            self.free_slots.append(place.slot)
            if not given:
                self.runs.give(place.start)

    def _room(self, where: str, nbytes: int, own: Place | None) -> int:
        """The start of a run that is taken now, beside a free slot. Evicts, the least recently used first, and moves,
        where that is needed. `own`: the place that is given up for it, slot included.

        Raises:
            PoolFullError: nothing has changed.
        """
        given: list[Place] = []  # given back so far, all of it on the host only
        candidates = (known for known in self.idle.values() if known.place is not own)
        if own is not None:
            self._give(own, given)
        while True:
            start, moves = self._fit(nbytes) if self.free_slots or given else (None, [])
            if start is not None or moves:
                break
            victim = next(candidates, None)
            if victim is None or nbytes > self.runs.size:
                for place in reversed(given):
                    self.runs.take_at(place.start, place.layout.nbytes)
                raise PoolFullError(self._no_room(where, nbytes, 1))
            self._give(place_of(victim), given)
        if own is not None:
            del self.at[own.start]
        self._evict([place.known for place in given if place is not own], given=True)
        return self._compact(moves, nbytes) if start is None else start

    def _give(self, place: Place, given: list[Place]) -> None:
        self.runs.give(place.start)
        given.append(place)

    def _fit(self, nbytes: int) -> tuple[int | None, Sequence[Move]]:
        """A run that is taken, or the moves after which there is one."""
        start = self.runs.take(nbytes)
        if start is not None or self.runs.free < nbytes:
            return start, []
        return None, self.runs.moves(nbytes, [place.start for place in self.held]) or []

    def _compact(self, moves: Sequence[Move], nbytes: int) -> int:
        places = [self.at.pop(move.start) for move in moves]
        with self.memory.published(unfinished(places)) as done:
            for move, place in zip(moves, places, strict=True):
                self.memory.move(move)
                place.start = move.to
                self._set_rows(place)
        self.runs.apply(moves)
        for place in places:
            self.at[place.start] = place
            place.ready = done[0] if done else None
        self.counts["compactions"] += 1
        self.counts["bytes_moved"] += sum(move.size for move in moves)
        start = self.runs.take(nbytes)
        assert start is not None
        return start

    def _check_room(self, where: str, sizes: list[int], wanted: Sequence[Known]) -> None:
        stay = [place_of(known).layout.nbytes for known in wanted if known.name in self.idle]
        slots, free = len(self.free_slots) + len(self.idle), self.runs.free + self.idle_bytes
        if len(sizes) > slots - len(stay) or sum(sizes) > free - sum(stay):
            raise PoolFullError(self._no_room(where, sum(sizes), len(sizes)))

    def _no_room(self, where: str, nbytes: int, slots: int) -> str:
        needs = f"{where}: needs {nbytes:,} bytes"
        if nbytes > self.runs.size:
            return f"{needs}, but the pool's budget is {self.runs.size:,} bytes"
        stay = [place.known.name for place in self.at.values() if place.holds or place.known.pinned]
        text = (
            f"{needs} in one run and {slots} of the {self.slots} slots; {self.runs.free:,} bytes and "
            f"{len(self.free_slots)} slots are free, and evicting would free {self.idle_bytes:,} bytes and "
            f"{len(self.idle)} slots"
        )
        first = f": {', '.join(map(short, stay[:5]))}{', ...' * (len(stay) > 5)}" if stay else ""
        return f"{text}; {len(stay)} adapters are pinned or in use{first}"

    def _keep_copy(self, known: Known, packed: Packed) -> None:
        nbytes = packed.blob.nbytes
        if self.host_budget is not None and nbytes > self.host_budget:
            return
        known.copy, self.copies[known.name] = packed, nbytes
        self.host_bytes += nbytes
        while self.host_budget is not None and self.host_bytes > self.host_budget:
            other = self.known[next(iter(self.copies))]
            self._drop_copy(other)
            self._forget_if_gone(other)
            self.counts["dropped"] += 1

    def _drop_copy(self, known: Known) -> None:
        if known.copy is not None:
            known.copy = None
            self.host_bytes -= self.copies.pop(known.name)

    def _forget_if_gone(self, known: Known) -> None:
        if known.place is None and known.copy is None and known.folder is None:
            del self.known[known.name]


def unfinished(places: Sequence[Place]) -> list[Event]:
    """The writes of these places that readers have to wait for."""
    events = []
    for place in places:
        if place.ready is not None and place.ready.query():
            place.ready = None
        if place.ready is not None:
            events.append(place.ready)
    return events
