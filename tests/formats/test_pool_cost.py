"""`AdapterPool`: what a load costs when there are many adapters."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from typing import ClassVar

import torch

from peft_kernels.formats.pool import AdapterPool


class TestCost:
    """What a load costs does not depend on how many adapters there are."""

    LAYERS: ClassVar = {"one": (8, 8)}

    def filled(self, adapters: int, budget: int) -> AdapterPool:
        pool = AdapterPool(self.LAYERS, budget=budget, slots=6000)
        for i in range(adapters):
            self.load(pool, f"early {i}")
        return pool

    FACTORS = torch.ones(8, 8), torch.ones(8, 8)

    def load(self, pool: AdapterPool, name: str) -> None:
        pool.load(name, {"one": self.FACTORS}, scaling=1.0)

    def test_of_the_5000th_load(self):
        """The interpreter's steps are the same in number; what is in C (searching and inserting) is timed. First with
        room for one more, then with somebody to evict."""
        pools = [self.filled(n, 512 * (n + 8)) for n in (5, 4950)]
        for evicting in (False, True):
            steps, times = [], []
            for pool in pools:
                while evicting and pool.stats().bytes_free:
                    self.load(pool, f"late {pool.stats().bytes_free}")
                self.load(pool, f"warm {evicting}")
                steps.append(self.count(lambda pool=pool: self.load(pool, "counted")))
                assert (pool.stats().evictions > 0) == evicting
                pool.remove("counted")
            for _ in range(3):
                times.append([self.median(pool) for pool in pools])
            assert steps[1] <= steps[0] + 5
            assert min(late / early for early, late in times) < 1.5

    def median(self, pool: AdapterPool) -> float:
        times = []
        for i in range(100):
            start = time.perf_counter()
            self.load(pool, f"timed {i}")
            times.append(time.perf_counter() - start)
            pool.remove(f"timed {i}")
        return statistics.median(times)

    @staticmethod
    def count(call) -> int:
        events = [0]

        def trace(frame, event, argument):
            events[0] += 1
            return trace

        before = sys.gettrace()
        gc.disable()  # what a collection finalises, of other tests too, would count
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(before)
            gc.enable()
        return events[0]
