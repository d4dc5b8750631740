"""What `peft-kernels tune` measured at one problem: every candidate with its time, the winners, the comparison.

In a tuning file such a point is

    {"op": "lora_linear", "problem": {"m": 8192, ...},       the op's Problem without its device
     "rival": "composed", "provenance": {...},               what it is compared with; where it was measured, of what
     "extent": "small", "complete": true,      how far it was searched; false: time was up, or the GPU was lost
     "compared": [{"mode": "forward", "us": 380.1, "rival_us": 395.0,       tuned kernels and rival, medians
                   "ratio": 0.962, "low": 0.960, "high": 0.965}],           median and quartiles of us / rival_us
     "kernels": [{"kernel": "down_projection", "dtype": "bfloat16", "dropout": false, "sizes": {"m": 8192, "r": 16},
                  "mode": "forward", "config": {...},                       judged in this mode; the winner
                  "candidates": [{"config": {...}, "us": 381.0, "rival_us": ..., "ratio": ..., "low": ..., "high": ...},
                                 {"config": {...}, "dropped": "why"}]}]}

Times are of a whole call of the op in that mode, with this candidate and the winners of the kernels before it. A
config of null means that the kernel is not used and the op does without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peft_kernels.tuning.configs import CONFIGS
from peft_kernels.tuning.provenance import Provenance
from peft_kernels.tuning.trials import Answer, Question, bucket

NONE, SMALL, FULL = "none", "small", "full"
EXTENTS = (NONE, SMALL, FULL)  # how far a search goes; each holds the one before it
FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
MODES = (FORWARD, FORWARD_BACKWARD)


def plain(value: Any) -> Any:
    """A field of a Problem as a file holds it: numbers as they are, a dtype by its name, several sizes as "3,4"."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return value if isinstance(value, (int, float)) else str(value).removeprefix("torch.")


def fields_of(problem: Any) -> dict[str, Any]:
    """The Problem's fields, without those that say on which device it is."""
    return {name: plain(value) for name, value in problem._asdict().items() if not name.startswith("device")}


@dataclass(frozen=True)
class Timing:
    """Medians in microseconds, ours and the rival's, and median and quartiles of their ratio, pair by pair."""

    us: float
    rival_us: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Candidate:
    """A configuration with its time, or why it has none."""

    config: Answer
    timing: Timing | None = None
    dropped: str | None = None


@dataclass(frozen=True)
class Choice:
    """What became of one question: the winner of those candidates that were tried."""

    question: Question
    mode: str
    config: Answer
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Point:
    op: str
    problem: tuple[tuple[str, Any], ...]
    rival: str
    provenance: Provenance
    complete: bool
    compared: tuple[tuple[str, Timing], ...] = ()
    choices: tuple[Choice, ...] = ()
    extent: str = SMALL

    @property
    def key(self) -> tuple:
        """A file holds one point for each key: measuring again replaces it."""
        return self.op, self.problem, self.rival, self.provenance.gpu

    @property
    def speedup(self) -> float:
        """The rival's time over ours for a training step's work, or for a call where there is no backward."""
        return 1 / self.compared[-1][1].ratio

    @property
    def wins(self) -> bool:
        """Whether three quarters of the pairs show it faster than its rival, in every mode."""
        return bool(self.compared) and all(timing.high < 1 for _, timing in self.compared)

    def searched(self, extent: str) -> bool:
        """Whether nothing is left to measure of this extent."""
        return self.complete and EXTENTS.index(self.extent) >= EXTENTS.index(extent)

    @property
    def verdict(self) -> str:
        if not self.compared and self.complete:
            return "none of its configurations gave right results at this shape"
        if not self.compared:
            return f"its measurement against {self.rival} at this shape was not finished; run peft-kernels tune again"
        shown = ", ".join(f"{mode} in {timing.ratio:.3f} of its time" for mode, timing in self.compared)
        return f"{'measured faster' if self.wins else 'not measured faster'} than {self.rival} at this shape: {shown}"


def covers(measured: Mapping[str, Any], problem: Mapping[str, Any]) -> bool:
    """Whether the fields of a problem are in the buckets of those that were measured."""
    return problem.keys() == measured.keys() and all(_within(name, problem[name], measured[name]) for name in measured)


def _within(name: str, value: Any, measured: Any) -> bool:
    if type(measured) is not int or type(value) is not int:
        return value == measured
    lowest, highest = bucket(name, measured)
    return lowest <= value <= highest


def to_json(point: Point) -> dict[str, Any]:
    """The point as its file holds it."""
    return {
        "op": point.op,
        "problem": dict(point.problem),
        "rival": point.rival,
        "provenance": point.provenance.as_dict(),
        "extent": point.extent,
        "complete": point.complete,
        "compared": [{"mode": mode, **asdict(timing)} for mode, timing in point.compared],
        "kernels": [_choice_to_json(choice) for choice in point.choices],
    }


def _choice_to_json(choice: Choice) -> dict[str, Any]:
    question = choice.question
    return {
        "kernel": question.kernel, "dtype": question.dtype, "dropout": question.dropout,
        "sizes": dict(question.sizes), "mode": choice.mode,
        "config": None if choice.config is None else asdict(choice.config),
        "candidates": [_candidate_to_json(candidate) for candidate in choice.candidates],
    }  # fmt: skip


def _candidate_to_json(candidate: Candidate) -> dict[str, Any]:
    config = None if candidate.config is None else asdict(candidate.config)
    if candidate.timing is None:
        return {"config": config, "dropped": candidate.dropped}
    return {"config": config, **asdict(candidate.timing)}


def provenance_of(content: Mapping[str, Any]) -> Provenance:
    """Of a point or a win in a file. Raises KeyError or TypeError where it has none or another."""
    return Provenance(**content["provenance"])


def from_json(content: Mapping[str, Any], *, choices: bool = True) -> Point:
    """The point that `to_json` wrote, on request without its choices, which only the sources that made them can read.

    Raises:
        KeyError, TypeError, ValueError: it is none, or its kernels are configured by other fields now.
    """
    return Point(
        content["op"],
        tuple(content["problem"].items()),
        content["rival"],
        provenance_of(content),
        content["complete"],
        tuple((entry["mode"], _timing(entry)) for entry in content["compared"]),
        tuple(_choice(entry) for entry in content["kernels"]) if choices else (),
        content["extent"],
    )


def _timing(entry: Mapping[str, Any]) -> Timing:
    return Timing(*(float(entry[name]) for name in ("us", "rival_us", "ratio", "low", "high")))


def _choice(entry: Mapping[str, Any]) -> Choice:
    kernel = entry["kernel"]
    candidates = []
    for candidate in entry["candidates"]:
        config, dropped = _config(kernel, candidate["config"]), candidate.get("dropped")
        candidates.append(Candidate(config, None if dropped else _timing(candidate), dropped))
    question = Question.of(kernel, entry["dtype"], entry["dropout"], entry["sizes"])
    return Choice(question, entry["mode"], _config(kernel, entry["config"]), tuple(candidates))


def _config(kernel: str, fields: Mapping[str, Any] | None) -> Answer:
    return None if fields is None else CONFIGS[kernel](**fields)


def measured_ranges(points: Iterable[Point]) -> list[dict[str, Any]]:
    """The entries of a file's `measured`: where the points win, neighbouring buckets of m and then of r joined.

    A bucket in which nothing was measured, or where the rival was as fast, belongs to no range.
    """
    runs: list[dict[str, Any]] = []
    for point in sorted((point for point in points if point.wins), key=_order):
        runs.append(
            {"op": point.op, "rival": point.rival, "speedup": round(point.speedup, 3)}
            | {name: _range(name, value) for name, value in point.problem}
            | {"provenance": point.provenance.as_dict()}
        )
    return _joined(_joined(runs, "m"), "r")


def _order(point: Point) -> tuple:
    sizes = dict(point.problem)
    others = [(name, str(value)) for name, value in point.problem if name not in ("m", "r")]
    return point.op, str(point.provenance), others, sizes.get("r", 0), sizes.get("m", 0)


def _range(name: str, value: Any) -> Any:
    return list(bucket(name, value)) if name in ("m", "r") else value


def _joined(runs: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Adjacent ranges of `name` made one where all else but the speed-up is equal; the smaller speed-up is claimed."""
    joined: list[dict[str, Any]] = []
    for run in runs:
        for other in joined:
            rest = [{key: entry[key] for key in entry if key not in (name, "speedup")} for entry in (run, other)]
            if name in run and rest[0] == rest[1] and other[name][1] + 1 == run[name][0]:
                other |= {name: [other[name][0], run[name][1]], "speedup": min(other["speedup"], run["speedup"])}
                break
        else:
            joined.append(dict(run))
    return joined


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
