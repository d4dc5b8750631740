"""Kernel configurations and measured wins of each GPU architecture: data in `sm_*.json`, look-up here.

The files are described in `tuning/files.py`, what can be tuned about a kernel in `tuning/configs.py`. `peft-kernels
tune` (`tuning/search.py`) measures on the machine it runs on and writes a file of the user's own, which comes first.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch

from peft_kernels.tuning import points, provenance, trials
from peft_kernels.tuning.configs import Config
from peft_kernels.tuning.files import (
    Architecture,
    Rule,
    TuningError,
    Win,
    known_architectures,
    load,
    number,
    read,
    user_folder,
)
from peft_kernels.tuning.trials import Answer, Question

__all__ = [
    "Config", "Rule", "TuningError", "Win", "config", "forget", "known_architectures", "measured_win", "nearest",
    "rules", "unproven", "user_folder",
]  # fmt: skip

logger = logging.getLogger("peft_kernels")


@functools.cache
def nearest(arch: str) -> str:
    """`arch` itself when it has a file, else the nearest older architecture that has one, else the oldest."""
    names = known_architectures()
    older = [name for name in names if number(name) <= number(arch)]
    return older[-1] if older else names[0]


def rules(arch: str, kernel: str) -> tuple[Rule, ...]:
    """The rules that `config` can choose from on `arch`, in order."""
    return load(nearest(arch)).rules[kernel]


def config(arch: str, kernel: str, dtype: torch.dtype, *, dropout: bool = False, **sizes: int) -> Any:
    """The configuration of `kernel` on `arch`.

    Args:
        arch: such as "sm_90"; one without a file takes the nearest older one's rules.
        kernel: a key of `configs.CONFIGS`.
        dtype: of the kernel's big operands.
        dropout: whether the kernel recomputes a dropout mask.
        **sizes: what the rules' limits and the tuned sizes are compared with, such as `m` and `r`.

    Returns:
        A `configs.CONFIGS[kernel]`: what was tuned for these sizes on this architecture, else that of the first rule
        that holds; None when none does: the kernel is not meant for this problem.
    """
    question = Question.of(kernel, points.dtype_name(dtype), dropout, sizes)
    if trials.active is not None:
        return trials.active.answer(question, lambda: _config(arch, question))
    return _config(arch, question)


@functools.lru_cache(maxsize=4096)
def _config(arch: str, question: Question) -> Answer:
    tuned = _tuned(arch)
    if question.bucketed() in tuned:
        return tuned[question.bucketed()]
    sizes = dict(question.sizes)
    candidates = rules(arch, question.kernel)
    return next((rule.config for rule in candidates if rule.holds(question.dtype, question.dropout, sizes)), None)


@functools.cache
def _tuned(arch: str) -> dict[Question, Answer]:
    """The winners of every measurement on `arch` that still holds, the user's before the library's. The GPU's model
    does not matter: a winner of another model is a configuration as good as a rule's."""
    answers: dict[Question, Answer] = {}
    for raw in _measurements(arch, "tuned"):
        made = points.provenance_of(raw)
        if made.outdated(provenance.here(raw["op"], raw["rival"], None)) is None:
            for choice in points.from_json(raw).choices:
                answers.setdefault(choice.question.bucketed(), choice.config)
    return answers


def _measurements(arch: str, section: str) -> Iterator[Any]:
    if (own := _user_file(arch)) is not None:
        yield from getattr(own, section)
    if arch in known_architectures():
        yield from getattr(load(arch), section)


@functools.cache
def _user_file(arch: str) -> Architecture | None:
    """The user's file; None where there is none. A broken one is reported and passed over: training goes on."""
    path = user_folder() / f"{arch}.json"
    if not path.is_file():
        return None
    try:
        return read(path)
    except (TuningError, OSError) as error:
        logger.warning("%s is passed over: %s", path, error)
        return None


def measured_win(arch: str, op: str, problem: Any) -> str | None:
    """The measurement on exactly this architecture and GPU that says an op's fused kernel wins for `problem`, or None.

    Measurements of other kernel sources, GPUs or versions of torch and triton do not count.
    """
    for win in _measurements(arch, "measured"):
        if win.op == op and win.covers(problem) and _stale(win.provenance, op, win.rival, problem) is None:
            return f"measured {win.speedup:.2f}x of {win.rival} on {win.provenance.gpu}"
    return None


def unproven(arch: str, op: str, problem: Any) -> str | None:
    """Why an op's fused kernel is not taken by default for `problem`; None when a measurement says that it wins."""
    if measured_win(arch, op, problem) is not None:
        return None
    reason = f"no measurement on {arch} says that it beats the alternative at this shape (peft-kernels tune makes one)"
    fields = points.fields_of(problem)
    for raw in _measurements(arch, "tuned"):
        if raw["op"] == op and points.covers(raw["problem"], fields):
            stale = _stale(points.provenance_of(raw), op, raw["rival"], problem)
            if stale is None:
                return points.from_json(raw, choices=False).verdict
            reason = f"its measurement at this shape is stale: {stale}; run peft-kernels tune again"
    return reason


def _stale(made: provenance.Provenance, op: str, rival: str, problem: Any) -> str | None:
    return made.stale(provenance.here(op, rival, problem.device_index))


def forget() -> None:
    """Drops what was read, for when a file changed in this process. `dispatch.forget` is needed too."""
    for cache in (load, known_architectures, nearest, _config, _tuned, _user_file, provenance.here):
        cache.cache_clear()
