"""Ten thousand random steps of an `AdapterPool` against a dictionary: no wrong row, no leak."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest
import torch

from peft_kernels import AdapterPool
from peft_kernels.formats.pool import AdapterInUseError, PoolFullError, UnknownAdapterError
from tests.formats.pools import SIZES, Drawn, assert_rows, audit, drawn, put, state

STEPS = 10_000
RANKS = (1, 3, 8, 9, 16, 24)
NAMES = [f"n{i}" for i in range(24)]


class Model:
    """What the pool must be, in the fewest words: adapters by name, which of them are pinned, which blocks are open."""

    def __init__(self, pool: AdapterPool, seed: int) -> None:
        self.pool, self.random = pool, random.Random(seed)
        self.adapters: dict[str, Drawn] = {}
        self.pinned: list[str] = []
        self.open: list[tuple[contextlib.ExitStack, list[str], dict[str, Drawn], torch.Tensor]] = []
        self.drawn = {(r, seed): drawn(r, seed) for r in RANKS for seed in range(6)}
        self.done = dict.fromkeys(("load", "evict", "remove", "pin", "run", "prefetch", "enter", "leave"), 0)
        self.refused = 0

    def step(self) -> None:
        weights = {"load": 5, "evict": 3, "remove": 1, "pin": 1, "run": 3, "prefetch": 1, "enter": 1, "leave": 2}
        (what,) = self.random.choices(list(weights), list(weights.values()))
        self.done[what] += 1
        getattr(self, what)()

    def some(self) -> list[str]:
        return [self.random.choice([*NAMES, "__base__"]) for _ in range(self.random.randint(1, 5))]

    def attempt(self, call: Callable[[], object], names: list[str]) -> bool:
        """Runs the call, which may be refused for a reason that holds."""
        unknown = [name for name in names if name not in self.adapters and name != "__base__"]
        try:
            call()
        except UnknownAdapterError:
            assert unknown
        except AdapterInUseError:
            assert any(name in self.pinned or any(name in held for _, held, *_ in self.open) for name in names)
        except PoolFullError:
            assert self.pinned or self.open
        else:
            assert not unknown
            return True
        self.refused += 1
        return False

    def load(self) -> None:
        name, adapter = self.random.choice(NAMES), self.random.choice(list(self.drawn.values()))
        if self.random.random() < 0.2:
            adapter = Drawn({"down": adapter.factors["down"]}, adapter.scaling)
        try:
            put(self.pool, name, adapter)
        except PoolFullError:
            assert self.pinned or self.open
            self.refused += 1
        else:
            self.adapters[name] = adapter

    def evict(self) -> None:
        name = self.random.choice(NAMES)
        self.attempt(lambda: self.pool.evict(name), [name])

    def remove(self) -> None:
        name = self.random.choice(NAMES)
        if self.attempt(lambda: self.pool.remove(name), [name]):
            del self.adapters[name]

    def pin(self) -> None:
        name = self.random.choice(NAMES)
        if self.pinned and (len(self.pinned) > 3 or self.random.random() < 0.5):
            self.pool.unpin(self.pinned.pop(self.random.randrange(len(self.pinned))))
        elif self.attempt(lambda: self.pool.pin(name), [name]) and name not in self.pinned:
            self.pinned.append(name)

    def prefetch(self) -> None:
        names = self.some()
        self.attempt(lambda: self.pool.prefetch(names), names)

    def run(self) -> None:
        names = self.some()
        self.attempt(lambda: assert_rows(self.pool, names, self.adapters, self.pool.ids(names)), names)

    def enter(self) -> None:
        names, block = self.some(), contextlib.ExitStack()
        if len(self.open) < 3 and self.attempt(lambda: block.enter_context(self.pool.use(names)), names):
            self.open.append((block, names, dict(self.adapters), self.pool.active_ids))

    def leave(self) -> None:
        """The innermost block ends; until then it had the adapters of its beginning, whatever was loaded since."""
        if self.open:
            block, names, adapters, ids = self.open.pop()
            assert_rows(self.pool, names, adapters, ids)
            block.close()


@pytest.mark.timeout(240)
def test_soak():
    pool = AdapterPool(SIZES, budget=40_000, slots=9)
    start = pool.stats()
    model = Model(pool, seed=11)
    for step in range(STEPS):
        model.step()
        if step % 50 == 0:
            audit(pool)
            assert set(pool.names) == set(model.adapters)
    while model.open:
        model.leave()
    stats = pool.stats()
    assert min(model.done.values()) > 300
    assert 100 < model.refused < STEPS / 3
    assert min(stats.evictions, stats.compactions, stats.replacements, stats.misses, stats.hits) > 100
    assert stats.pinned == len(model.pinned)
    for name in list(model.pinned):
        pool.unpin(name)
    for name in list(model.adapters):
        assert_rows(pool, [name], model.adapters, pool.ids([name]))
        pool.remove(name)
    audit(pool)
    end = pool.stats()
    assert (end.bytes_free, end.largest_run, end.free_slots) == (start.bytes_free, start.largest_run, start.free_slots)
    assert (end.adapters, end.resident, end.host_copies, end.host_bytes, end.pinned, end.in_use) == (0,) * 6
    assert state(pool)[6] == [(0, start.bytes_free)]
    assert not pool._memory.rows.any()
