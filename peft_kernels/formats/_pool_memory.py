"""Which runs of a pool's memory are free, and which moves join them. Host arithmetic: nothing here touches a device.

Sizes and places are in bytes, multiples of what the pool aligns to. Free runs never touch one another. Finding, taking
and giving back a run takes O(log n) comparisons among n free runs; keeping two lists sorted moves 8 n bytes besides.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Move(NamedTuple):
    """`size` bytes go from `start` down to `to`; the two ranges may overlap."""

    start: int
    to: int
    size: int


class Runs:
    """The free and the taken runs of [0, size). `free`: bytes that are free, in however many runs."""

    def __init__(self, size: int) -> None:
        self.size, self.free = size, 0
        self._taken: dict[int, int] = {}  # size by start, as _sizes
        self._sizes: dict[int, int] = {}
        self._starts: list[int] = []
        self._by_size: list[tuple[int, int]] = []
        if size:
            self._add(0, size)

    @property
    def largest(self) -> int:
        return self._by_size[-1][0] if self._by_size else 0

    @property
    def free_runs(self) -> list[tuple[int, int]]:
        """(start, size), by start."""
        return [(start, self._sizes[start]) for start in self._starts]

    def take(self, size: int) -> int | None:
        """The start of a run of `size` > 0 bytes, cut from the smallest free run that holds it; None if none does."""
        i = bisect_left(self._by_size, (size, 0))
        if i == len(self._by_size):
            return None
        start = self._by_size[i][1]
        self.take_at(start, size)
        return start

    def take_at(self, start: int, size: int) -> None:
        """Takes these bytes, which must be free."""
        run = self._starts[bisect_right(self._starts, start) - 1]
        end = run + self._remove(run)
        if run < start:
            self._add(run, start - run)
        if start + size < end:
            self._add(start + size, end - start - size)
        self._taken[start] = size

    def give(self, start: int) -> None:
        """Gives back the run that was taken at `start`, and joins it with the free ones beside it."""
        size = self._taken.pop(start)
        i = bisect_left(self._starts, start)
        if i < len(self._starts) and self._starts[i] == start + size:
            size += self._remove(start + size)
        if i and self._starts[i - 1] + self._sizes[self._starts[i - 1]] == start:
            start = self._starts[i - 1]
            size += self._remove(start)
        self._add(start, size)

    def moves(self, size: int, fixed: Iterable[int]) -> list[Move] | None:
        """What to move, in this order, so that a run of `size` bytes is free: among neighbouring free runs that hold as
        much, those with the fewest taken bytes between them. None if there are none.

        Args:
            size: more than `largest`.
            fixed: starts of taken runs that stay where they are.
        """
        window = self._window(size, sorted(fixed))
        if window is None:
            return None
        position, end = window
        at, found = position, []
        while at < end:
            if at in self._sizes:
                at += self._sizes[at]
            else:
                taken = self._taken[at]
                found.append(Move(at, position, taken))
                at, position = at + taken, position + taken
        return found

    def apply(self, moves: Sequence[Move]) -> None:
        """Does the bookkeeping of `moves`: the bytes between the first and the last of them are as they say."""
        for start, to, size in moves:
            self.give(start)
            self.take_at(to, size)

    def _window(self, size: int, fixed: list[int]) -> tuple[int, int] | None:
        best: tuple[int, int, int] | None = None
        first, free = 0, 0
        for last, start in enumerate(self._starts):
            between = bisect_left(fixed, self._starts[last - 1]) if last else 0
            if last and between < len(fixed) and fixed[between] < start:
                first, free = last, 0
            free += self._sizes[start]
            while free - self._sizes[self._starts[first]] >= size:
                free -= self._sizes[self._starts[first]]
                first += 1
            begin, end = self._starts[first], start + self._sizes[start]
            if free >= size and (best is None or end - begin - free < best[0]):
                best = end - begin - free, begin, end
        return None if best is None else best[1:]

    def _add(self, start: int, size: int) -> None:
        self._sizes[start] = size
        insort(self._starts, start)
        insort(self._by_size, (size, start))
        self.free += size

    def _remove(self, start: int) -> int:
        size = self._sizes.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        self.free -= size
        return size
