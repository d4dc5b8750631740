"""What kernels ask of `tuning.config`, and trials, in which a search answers instead of the files."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from peft_kernels.tuning.configs import Config

Answer = Config | None
SMALLEST_RANK_TILE = 16


def bucket(name: str, size: int) -> tuple[int, int]:
    """The sizes, lowest and highest, that a measurement at `size` stands for: rows `m` and ranks `r` up to the next
    power of two, ranks up to 16 together because their tiles are the same; every other size for itself."""
    if name not in ("m", "r") or size < 1:
        return size, size
    if name == "r" and size <= SMALLEST_RANK_TILE:
        return 1, SMALLEST_RANK_TILE
    highest = 1 << (size - 1).bit_length()
    return highest // 2 + 1, highest


@dataclass(frozen=True)
class Question:
    """The arguments of one `tuning.config` call but the architecture: `sizes` holds (name, size), sorted by name."""

    kernel: str
    dtype: str
    dropout: bool
    sizes: tuple[tuple[str, int], ...]

    @staticmethod
    def of(kernel: str, dtype: str, dropout: bool, sizes: Mapping[str, int]) -> Question:
        return Question(kernel, dtype, dropout, tuple(sorted(sizes.items())))

    def bucketed(self) -> Question:
        """The question that stands for all of its bucket: each size is the largest of its own."""
        return Question(
            self.kernel, self.dtype, self.dropout, tuple((name, bucket(name, size)[1]) for name, size in self.sizes)
        )

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes)
        return f"{self.kernel} ({', '.join(filter(None, (self.dtype, sizes, 'dropout' * self.dropout)))})"


class Trial:
    """Answers by bucket; all that was asked, bucketed, with what was answered, and how often."""

    def __init__(self, answers: Mapping[Question, Answer]) -> None:
        self.answers = {question.bucketed(): answer for question, answer in answers.items()}
        self.asked: dict[Question, Answer] = {}
        self.times: Counter[Question] = Counter()

    def answer(self, question: Question, otherwise: Callable[[], Answer]) -> Answer:
        question = question.bucketed()
        answer = self.answers[question] if question in self.answers else otherwise()
        self.asked[question] = answer
        self.times[question] += 1
        return answer


# Process-wide rather than per context: autograd runs a GPU's backward on threads of its own.
active: Trial | None = None


@contextlib.contextmanager
def trial(answers: Mapping[Question, Answer]) -> Iterator[Trial]:
    """Answers the questions in `answers`, and their buckets, with these configurations; not to be nested."""
    global active
    active = Trial(answers)
    try:
        yield active
    finally:
        active = None
