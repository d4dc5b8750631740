"""Ratios that hold on a noisy machine: two things are timed in turn, and each pair gives one ratio."""

from __future__ import annotations

import statistics
from typing import NamedTuple, Protocol

from peft_kernels.tuning.timing import quartiles


class Sampler(Protocol):
    def sample(self) -> float: ...


class Ratio(NamedTuple):
    """The median of a/b over the pairs, its quartiles, a/b of the fastest samples (what an undisturbed machine would
    show), and both medians in seconds per call."""

    ratio: float
    low: float
    high: float
    best: float
    a: float
    b: float
    pairs: int

    def rounded(self) -> dict[str, float]:
        """What is recorded: the ratios to four digits."""
        return {name: round(getattr(self, name), 4) for name in ("ratio", "low", "high", "best")}

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.low:.3f}..{self.high:.3f}), fastest {self.best:.3f}, {self.pairs} pairs"


def of_pairs(pairs: list[tuple[float, float]]) -> Ratio:
    """The `Ratio` of pairs (a, b) that were measured one right after the other."""
    ratios = [a / b for a, b in pairs]
    low, middle, high = quartiles(ratios)
    columns = list(zip(*pairs, strict=True))
    a, b = map(statistics.median, columns)
    best_a, best_b = map(min, columns)
    return Ratio(middle, low, high, best_a / best_b, a, b, len(pairs))


def ratio(a: Sampler, b: Sampler, rounds: int = 30) -> Ratio:
    """Times a and b in turn, the first of each pair alternating, so that drift and neighbours hit both alike.

    Args:
        a, b: stopwatches (`timing.stopwatch`).
        rounds: number of pairs.

    Returns:
        The `Ratio` a / b, pair by pair.
    """
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            second = b.sample()
            pairs.append((a.sample(), second))
        else:
            pairs.append((a.sample(), b.sample()))
    return of_pairs(pairs)
