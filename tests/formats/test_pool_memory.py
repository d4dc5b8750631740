"""The allocator of an `AdapterPool` against a list of bytes."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from peft_kernels.formats._pool_memory import Runs


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(0, 40),
    steps=st.lists(st.tuples(st.sampled_from("tgm"), st.integers(1, 12), st.integers(0, 50)), max_size=60),
)
def test_is_exact(size, steps):
    runs, owner = Runs(size), [None] * size
    taken: dict[int, int] = {}
    for number, (what, length, choice) in enumerate(steps):
        free = gaps(owner)
        if what == "g" and taken:
            start = sorted(taken)[choice % len(taken)]
            runs.give(start)
            length = taken.pop(start)
            owner[start : start + length] = [None] * length
        elif what == "t":
            start = runs.take(length)
            fitting = [(n, at) for at, n in free if n >= length]
            assert start == (min(fitting)[1] if fitting else None)
            if start is not None:
                taken[start] = length
                owner[start : start + length] = [number] * length
        elif what == "m" and length > runs.largest:
            taken = compact(runs, owner, taken, length, {s for s in taken if s % 3 == choice % 3})
        assert runs.free_runs == gaps(owner)
        assert runs.free == owner.count(None)
        assert runs.largest == max((n for _, n in runs.free_runs), default=0)
    for start in taken:
        runs.give(start)
    assert runs.free_runs == ([(0, size)] if size else [])


def gaps(owner: list[int | None]) -> list[tuple[int, int]]:
    """(start, length) of the free runs."""
    starts = [i for i, o in enumerate(owner) if o is None and (i == 0 or owner[i - 1] is not None)]
    return [(s, next((i for i in range(s, len(owner)) if owner[i] is not None), len(owner)) - s) for s in starts]


def compact(runs, owner, taken, length, fixed):
    """What `moves` says is done on both sides, and there is a way whenever bytes suffice between two fixed runs."""
    moves = runs.moves(length, fixed)
    bounds = [-1, *sorted(fixed), len(owner)]
    possible = any(owner[max(a, 0) : b].count(None) >= length for a, b in itertools.pairwise(bounds))
    assert (moves is not None) == possible
    for start, to, size in moves or []:
        assert start not in fixed
        assert to < start
        assert taken.pop(start) == size
        owner[to : to + size], owner[max(start, to + size) : start + size] = (
            owner[start : start + size], [None] * min(size, start - to),
        )  # fmt: skip
        taken[to] = size
    runs.apply(moves or [])
    assert not possible or runs.largest >= length
    return taken


def test_moves_the_fewest_bytes():
    runs = Runs(40)
    for start, size in ((0, 2), (2, 3), (5, 20), (25, 2), (27, 1), (28, 2), (30, 10)):
        runs.take_at(start, size)
    for start in (0, 25, 28):
        runs.give(start)
    # 4 free bytes lie around 1 taken one, and around 23 others.
    assert runs.moves(4, []) == [(27, 25, 1)]
