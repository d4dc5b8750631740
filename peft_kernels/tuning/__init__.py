"""Kernel configurations and measured wins of each GPU architecture: data in `sm_*.json`, look-up here.

The files are described in `tuning/files.py`, what can be tuned about a kernel in `tuning/configs.py`. Nothing is
searched or timed here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from peft_kernels.tuning.configs import Config
from peft_kernels.tuning.files import Rule, TuningError, Win, known_architectures, load, number

__all__ = ["Config", "Rule", "TuningError", "Win", "config", "known_architectures", "measured_win", "nearest", "rules"]


@functools.cache
def nearest(arch: str) -> str:
    """`arch` itself when it has a file, else the nearest older architecture that has one, else the oldest."""
    names = known_architectures()
    older = [name for name in names if number(name) <= number(arch)]
    return older[-1] if older else names[0]


def rules(arch: str, kernel: str) -> tuple[Rule, ...]:
    """Everything that `config` can choose from on `arch`, in order."""
    return load(nearest(arch)).rules[kernel]


@functools.lru_cache(maxsize=4096)
def config(arch: str, kernel: str, dtype: torch.dtype, *, dropout: bool = False, **sizes: int) -> Any:
    """The configuration of `kernel` on `arch`.

    Args:
        arch: such as "sm_90"; one without a file takes the nearest older one's.
        kernel: a key of `configs.CONFIGS`.
        dtype: of the kernel's big operands.
        dropout: whether the kernel recomputes a dropout mask.
        **sizes: what the rules' limits are compared with, such as `m` and `r`.

    Returns:
        A `configs.CONFIGS[kernel]`, the first whose rule holds; None when none does: the kernel is not meant for this
        problem.
    """
    name = str(dtype).removeprefix("torch.")
    return next((rule.config for rule in rules(arch, kernel) if rule.holds(name, dropout, sizes)), None)


def measured_win(arch: str, op: str, problem: Any) -> str | None:
    """The measurement on exactly this architecture that says an op's fused kernel wins for `problem`, or None."""
    if arch not in known_architectures():
        return None
    wins = (win for win in load(arch).measured if win.op == op and win.covers(problem))
    return next((f"measured {win.speedup:.2f}x on {arch} ({win.result})" for win in wins), None)
