"""The measurement behind `peft-kernels tune`, of one problem at a time.

Kernels are tuned in the order in which the op asks for their configurations, each with the winners before it in force.
A candidate is judged by the time of the whole op, side by side with the rival: what it does to its neighbours (the
cache, overlapping launches) counts. It is timed only after its results were compared with float64, at this problem and
at one of the same bucket that divides nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from peft_kernels import dispatch, selfcheck
from peft_kernels.problems import BUILDERS, Case, Draw, Shape
from peft_kernels.tuning import points, timing, trials
from peft_kernels.tuning.candidates import Machine, candidates
from peft_kernels.tuning.points import FORWARD, FORWARD_BACKWARD, Candidate, Choice, Point, Timing
from peft_kernels.tuning.provenance import Provenance
from peft_kernels.tuning.timing import Context, Step, Stopwatch
from peft_kernels.tuning.trials import Answer, Question, Trial, bucket

logger = logging.getLogger("peft_kernels")

CANDIDATE_ROUNDS = 12
FINAL_ROUNDS = 40
# A challenger must be faster than the configuration in force by more than repetitions of one measurement differ.
MARGIN = 0.005
OURS = "triton"

MakeStopwatch = Callable[[str, list[Step], Context], Stopwatch]
Report = Callable[[str], None]


class DeviceLost(RuntimeError):
    """A candidate left the GPU unusable for this process."""


class NothingWorks(RuntimeError):
    """No candidate of a kernel gives right results."""


class OutOfTime(Exception):
    """The time that the user allowed is over."""


class Deadline:
    """`check` raises OutOfTime once `minutes` have passed."""

    def __init__(self, minutes: float = math.inf, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.end = now, now() + 60 * minutes

    @property
    def over(self) -> bool:
        return self.now() >= self.end

    def check(self) -> None:
        if self.over:
            raise OutOfTime


@dataclass(frozen=True)
class Workload:
    """An op at one shape: `Shape.batch` is the number of rows."""

    op: str
    shape: Shape

    @property
    def rival(self) -> str:
        """What runs where the Triton kernels do not."""
        order = dispatch.ORDER[self.op]
        return "composed" if "composed" in order else "reference"

    def case(self, device: str, seed: int = 1) -> Case:
        return BUILDERS[self.op](self.shape, Draw(device, seed))

    def problem(self) -> dict[str, Any]:
        """The fields by which dispatch knows it, without a device."""
        return points.fields_of(self.case("meta").problem)

    def tail(self) -> Workload:
        """The same in sizes that divide nothing, where the bucket holds such."""
        (m,), r = self.shape.batch, self.shape.r
        rows = max(bucket("m", m)[0], m - m // 8 - 1)
        return replace(self, shape=replace(self.shape, batch=(rows,), r=max(bucket("r", r)[0], r - 1)))

    def __str__(self) -> str:
        return f"{self.op} {self.shape}"


class Laboratory:
    """Runs, checks and times one workload on a device."""

    def __init__(self, workload: Workload, device: str, stopwatch: MakeStopwatch = timing.stopwatch) -> None:
        self.workload, self.device, self.stopwatch = workload, device, stopwatch
        first = workload.case(device)
        size = sum(tensor.numel() * tensor.itemsize for tensor in first.tensors.values())
        sets = timing.sets_beyond_cache(device, size)
        self.cases = [first, *(workload.case(device, seed) for seed in range(2, sets + 1))]
        self.modes = (FORWARD, FORWARD_BACKWARD) if first.grads else (FORWARD,)

    @cached_property
    def expected(self) -> list[tuple[Case, selfcheck.Expected]]:
        """The cases that results are compared at: this one and one with tails."""
        return [(case, selfcheck.Expected.of(case)) for case in (self.cases[0], self.workload.tail().case(self.device))]

    def ask(self, mode: str, answers: Mapping[Question, Answer]) -> Trial:
        """Runs the op once; the trial has heard what its kernels ask, as far as they got."""
        step = step_of(self.cases[0], mode)
        with dispatch.use_backend(OURS), trials.trial(answers) as trial:
            try:
                step()
            except Exception as error:  # the search drops the configuration that this kernel fails with
                logger.info("%s stopped: %s", self.workload, error)
        return trial

    def check(self, answers: Mapping[Question, Answer]) -> None:
        """Raises selfcheck.Disagreement where results are wrong."""
        with trials.trial(answers):
            for case, expected in self.expected:
                selfcheck.judge(selfcheck.run_op(case, OURS), selfcheck.run_op(case, OURS), expected)

    def watch(self, mode: str, backend: str, answers: Mapping[Question, Answer]) -> Stopwatch:
        """A stopwatch over sets of tensors that the GPU's cache does not hold together."""

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with dispatch.use_backend(backend), trials.trial(answers):
                yield

        return self.stopwatch(self.device, [step_of(case, mode) for case in self.cases], context)

    def synchronize(self) -> None:
        """Raises where the GPU no longer answers."""
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)


def step_of(case: Case, mode: str) -> Step:
    """The op's work on a case's tensors, without arguments."""
    leaves = case.leaves()
    wanted = [leaves[name] for name in case.grads]
    if mode == FORWARD:
        return lambda: case.outputs(leaves)
    grads = [torch.randn_like(y) for y in case.outputs(case.tensors)]
    return lambda: torch.autograd.grad(case.outputs(leaves), wanted, grads)


class Search:
    """Tunes one workload.

    Args:
        laboratory: where it is run.
        provenance: recorded with the result.
        machine: what bounds the candidates.
        extent: "none" (what is in force is compared with the rival), "small" or "full".
        fixed: winners of other problems, in force here and not tuned again: what `tuning.config` is asked does not
            tell these problems apart.
        known: an earlier measurement that was not completed, or not so far; what it has is not measured again.
        deadline: of the search. The comparison that ends it is made nevertheless.
        report: gets a line for each thing that is done.
    """

    def __init__(
        self,
        laboratory: Laboratory,
        provenance: Provenance,
        machine: Machine,
        extent: str,
        *,
        fixed: Mapping[Question, Answer] | None = None,
        known: Point | None = None,
        deadline: Deadline | None = None,
        report: Report = lambda line: None,
    ) -> None:
        self.laboratory, self.provenance, self.machine, self.extent = laboratory, provenance, machine, extent
        self.deadline, self.report = deadline or Deadline(), report
        self.choices = {} if known is None else {choice.question: choice for choice in known.choices}
        self.fixed = {question: answer for question, answer in (fixed or {}).items() if question not in self.choices}
        self.finished: set[Question] = set()
        self.rivals: dict[str, Stopwatch] = {}

    @property
    def answers(self) -> dict[Question, Answer]:
        """What is in force: the winners so far."""
        return self.fixed | {question: choice.config for question, choice in self.choices.items()}

    def run(self) -> Point:
        """The point, complete or, when time is up, with what there is.

        Raises:
            Interrupted: the GPU is lost; the exception holds the point with what there is.
        """
        try:
            self._tune()
            complete = True
        except OutOfTime:
            complete = False
        except NothingWorks as error:
            self.report(str(error))
            return self._point(True, ())
        except DeviceLost as error:
            raise Interrupted(self._point(False, ()), str(error)) from error
        return self._point(complete, self._compare())

    def _point(self, complete: bool, compared: tuple[tuple[str, Timing], ...]) -> Point:
        workload = self.laboratory.workload
        choices = tuple(self.choices.values())
        return Point(
            workload.op, tuple(workload.problem().items()), workload.rival, self.provenance, complete, compared,
            choices, self.extent,
        )  # fmt: skip

    def _tune(self) -> None:
        while (found := self._next()) is not None:
            question, mode, in_force = found
            configs = candidates(question.kernel, question.dtype, in_force, self.extent, self.machine)
            if len(configs) == 1:
                self.finished.add(question)
                continue
            self.report(f"{question}, judged by {mode}")
            try:
                for config in configs:
                    self._try(question, mode, config)
            finally:
                found_one = self._settle(question, in_force)
            if not found_one:
                raise NothingWorks(f"{question}: no configuration gives right results")
            self.finished.add(question)

    def _next(self) -> tuple[Question, str, Answer] | None:
        """The first question that is open, the mode by which to judge, and the answer in force without a trial."""
        trials_of = {mode: self.laboratory.ask(mode, self.answers) for mode in self.laboratory.modes}
        last = trials_of[self.laboratory.modes[-1]]
        for question in last.asked:
            if question not in self.fixed and question not in self.finished:
                mode = next(mode for mode, trial in trials_of.items() if trial.times[question] == last.times[question])
                without = {other: answer for other, answer in self.answers.items() if other != question}
                return question, mode, self.laboratory.ask(mode, without).asked[question]
        return None

    def _try(self, question: Question, mode: str, config: Answer) -> None:
        before = self.choices.get(question, Choice(question, mode, config, ()))
        if any(candidate.config == config for candidate in before.candidates):
            return
        self.deadline.check()
        candidate = self._measure(question, mode, config)
        self.choices[question] = replace(before, candidates=(*before.candidates, candidate))
        self.report(f"  {describe(candidate)}")
        if candidate.dropped is not None:
            try:
                self.laboratory.synchronize()
            except RuntimeError as error:
                raise DeviceLost(f"the GPU is unusable after {describe(candidate)}") from error

    def _measure(self, question: Question, mode: str, config: Answer) -> Candidate:
        attempt = self.answers | {question: config}
        try:
            self.laboratory.check(attempt)
            watch = self.laboratory.watch(mode, OURS, attempt)
            if watch.kind != self._rival(mode).kind:
                return Candidate(config, dropped=f"can only be timed by {watch.kind}, the rival by another stopwatch")
            return Candidate(config, self._pairs(watch, mode, CANDIDATE_ROUNDS))
        except Exception as error:  # does not compile, does not fit, is wrong: no candidate, and the search goes on
            return Candidate(config, dropped=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def _settle(self, question: Question, in_force: Answer) -> bool:
        """Puts the fastest candidate in force, if one was timed."""
        if question not in self.choices:
            return False
        choice = self.choices[question]
        timed = {c.config: c.timing.ratio for c in choice.candidates if c.timing is not None}
        best = min(timed, key=timed.__getitem__, default=in_force)
        if in_force in timed and timed[in_force] <= timed[best] * (1 + MARGIN):
            best = in_force
        self.choices[question] = replace(choice, config=best)
        return bool(timed)

    def _compare(self) -> tuple[tuple[str, Timing], ...]:
        """Nothing where what is in force is wrong: then time was up before something right was found."""
        try:
            self.laboratory.check(self.answers)
        except Exception as error:
            self.report(f"not compared: {type(error).__name__}: {error}")
            return ()
        compared = []
        for mode in self.laboratory.modes:
            watch = self.laboratory.watch(mode, OURS, self.answers)
            compared.append((mode, self._pairs(watch, mode, FINAL_ROUNDS)))
        return tuple(compared)

    def _rival(self, mode: str) -> Stopwatch:
        if mode not in self.rivals:
            self.rivals[mode] = self.laboratory.watch(mode, self.laboratory.workload.rival, {})
        return self.rivals[mode]

    def _pairs(self, watch: Stopwatch, mode: str, rounds: int) -> Timing:
        """Both in turn, the first of each pair alternating, so that drift and neighbours hit both alike."""
        rival = self._rival(mode)
        ours: list[float] = []
        theirs: list[float] = []
        for turn in range(rounds):
            for mine in (True, False) if turn % 2 else (False, True):
                (ours if mine else theirs).append((watch if mine else rival).sample())
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        low, middle, high = timing.quartiles(ratios)
        return Timing(
            round(1e6 * statistics.median(ours), 3), round(1e6 * statistics.median(theirs), 3),
            round(middle, 5), round(low, 5), round(high, 5),
        )  # fmt: skip


class Interrupted(RuntimeError):
    """The GPU was lost; `point` holds what had been measured, to be saved."""

    def __init__(self, point: Point, reason: str) -> None:
        super().__init__(reason)
        self.point = point


def describe(candidate: Candidate) -> str:
    """A line about a candidate."""
    config = "without this kernel" if candidate.config is None else str(candidate.config)
    if candidate.timing is None:
        return f"dropped {config}: {candidate.dropped}"
    return f"{candidate.timing.us:10.1f} us, {candidate.timing.ratio:.3f} of the rival's: {config}"
