"""Sparsity by step: what is called with the number of a step gives the share of weights pruned there."""

from __future__ import annotations

from dataclasses import dataclass

from peft_kernels.checks import check_probability


@dataclass(frozen=True)
class Constant:
    """`final` from step `begin` on, 0 before.

    Raises:
        ValueError: a sparsity outside [0, 1].
    """

    final: float
    begin: int = 0

    def __post_init__(self) -> None:
        check_probability("Constant", "final", self.final)

    def __call__(self, step: int) -> float:
        return self.final if step >= self.begin else 0.0


@dataclass(frozen=True)
class Linear:
    """From `initial` at step `begin` to `final` at step `end`, the same each step; 0 before.

    Raises:
        ValueError: a sparsity outside [0, 1], or an end before the beginning.
    """

    final: float
    begin: int
    end: int
    initial: float = 0.0

    _power = 1

    def __post_init__(self) -> None:
        check_probability(type(self).__name__, "final", self.final)
        check_probability(type(self).__name__, "initial", self.initial)
        if self.end < self.begin:
            raise ValueError(f"{type(self).__name__}: end is {self.end}; expected at least begin, {self.begin}")

    def __call__(self, step: int) -> float:
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        left = (self.end - step) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * left**self._power


@dataclass(frozen=True)
class Cubic(Linear):
    """s = final + (initial - final) · (1 - (step - begin) / (end - begin))³: fast while there is much to spare, slow
    towards the end (Zhu & Gupta 2017, "To prune, or not to prune", https://arxiv.org/abs/1710.01878). 0 before `begin`.

    Raises:
        ValueError: as `Linear`.
    """

    _power = 3
