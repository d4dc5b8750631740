"""Which implementation of an op runs, and why.

Every op has one module per implementation, `kernels/<backend>/<op>.py`. Such a module says of a problem

* `unsupported(problem)`: why it cannot compute this problem, or None when it can;
* `unproven(problem)` (optional): why it is not taken by default although it could run: nobody has measured
  that it wins on this device. `use_backend` overrides this, never the first.

`choose` walks `ORDER[op]` and takes the first implementation that raises no objection. Every order ends in an
implementation that supports everything, so a new GPU or an odd shape never raises: it runs slower, and `explain` says
why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

logger = logging.getLogger("peft_kernels")

BACKENDS = ("reference", "composed", "triton", "cuda", "cpu")

# Preference of each op, best first.
ORDER: dict[str, tuple[str, ...]] = {
    "lora_linear": ("triton", "cpu", "composed", "reference"),
    "lora_linear_group": ("triton", "cpu", "composed", "reference"),
    "dora_linear": ("triton", "cpu", "composed", "reference"),
    "dora_weight_norm": ("triton", "composed", "reference"),
    "gated_activation": ("triton", "cpu", "composed", "reference"),
    "lora_swiglu_mlp": ("composed", "reference"),
    "lora_embedding": ("composed", "reference"),
    "lora_expert_linear": ("triton", "composed", "reference"),
    "multi_lora_expert_linear": ("composed", "reference"),
    "multi_lora_linear": ("cuda", "triton", "cpu", "composed", "reference"),
    "nf4_linear": ("cuda", "triton", "cpu", "composed", "reference"),
    "nf4_lora_linear": ("cuda", "triton", "cpu", "composed", "reference"),
    "nf4_dequantize": ("triton", "cpu", "reference"),
    "nf4_quantize": ("cpu", "reference"),
    "mask_pack": ("triton", "cpu", "reference"),
    "mask_unpack": ("triton", "cpu", "reference"),
    "mask_apply": ("triton", "cpu", "reference"),
    "masked_linear": ("triton", "cpu", "composed", "reference"),
    "masked_lora_linear": ("triton", "cpu", "composed", "reference"),
    "multi_mask_linear": ("triton", "composed", "reference"),
    "sparse_delta_linear": ("triton", "cpu", "composed", "reference"),
    "sparse_linear": ("cuda", "triton", "cpu", "composed", "reference"),
    "philox_dropout": ("cuda", "triton", "cpu", "reference"),
    "splitk_reduce": ("cuda", "triton", "reference"),
}

BACKEND_VARIABLE = "PEFT_KERNELS_BACKEND"


class Choice(NamedTuple):
    """The implementation that runs, why, and what was passed over: `rejected` holds (backend, reason) pairs."""

    op: str
    backend: str
    reason: str
    rejected: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.reason})"]
        lines += [f"  not {backend}: {reason}" for backend, reason in self.rejected]
        return "\n".join(lines)


def _checked(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(BACKENDS)}")
    return backend


def _from_environment() -> str | None:
    backend = os.environ.get(BACKEND_VARIABLE)
    return _checked(backend) if backend else None


# Process-wide rather than per context: autograd runs a GPU's backward on threads of its own, which would not see
# a context variable set by the caller.
_forced: str | None = _from_environment()


def implementation(op: str, backend: str) -> ModuleType:
    """The module `kernels/<backend>/<op>.py`, imported on first use so that `import peft_kernels` stays light."""
    return _implementation(op, backend)


@functools.cache
def _implementation(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"peft_kernels.kernels.{backend}.{op}")


@functools.cache
def _warn_once(op: str, backend: str, error: str) -> None:
    logger.warning("%s: the implementation %r breaks when imported and is passed over: %s", op, backend, error)


def objection(op: str, backend: str, problem: Any, *, forced: bool = False) -> str | None:
    """Why `backend` is not to be used for `problem`, or None. With `forced`, only what it cannot compute counts."""
    try:
        module = implementation(op, backend)
    except ImportError as error:
        return f"not importable: {error}"
    except Exception as error:  # another Triton, a stale extension: the other implementations still run
        _warn_once(op, backend, f"{type(error).__name__}: {error}")
        return f"breaks when imported: {type(error).__name__}: {error}"
    reason = module.unsupported(problem)
    if reason is None and not forced and hasattr(module, "unproven"):
        reason = module.unproven(problem)
    return reason


@functools.lru_cache(maxsize=4096)
def _choose(op: str, problem: Any, forced: str | None) -> Choice:
    if forced is not None and forced in ORDER[op]:
        reason = objection(op, forced, problem, forced=True)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {forced!r} was asked for but cannot run this problem: {reason}")
        return Choice(op, forced, "asked for by use_backend", ())
    rejected: list[tuple[str, str]] = []
    for backend in ORDER[op]:
        reason = objection(op, backend, problem)
        if reason is None:
            why = "first choice" if not rejected else "first that raises no objection"
            return Choice(op, backend, why, tuple(rejected))
        rejected.append((backend, reason))
    raise RuntimeError(f"{op}: no implementation for {problem}: {rejected}")


def choose(op: str, problem: Any) -> Choice:
    """Chooses the implementation of `op` for `problem`.

    Args:
        op: the op's name, a key of `ORDER`.
        problem: the op's `Problem` tuple (hashable): device, dtypes and sizes.

    Returns:
        The `Choice`.

    Raises:
        RuntimeError: `use_backend` asked for an implementation that cannot compute this problem.
    """
    return _choose(op, problem, _forced)


def select(op: str, problem: Any) -> ModuleType:
    """The module of the implementation that `choose` takes: what an op calls."""
    return _implementation(op, _choose(op, problem, _forced).backend)


_selected: dict[tuple, ModuleType] = {}


def select_memoised(op: str, key: tuple, problem: Callable[..., Any], *args: Any) -> ModuleType:
    """`select(op, problem(*args))` for ops that are called on tiny tensors, where building the problem would cost as
    much as a matmul: it is built once per `key`.

    Args:
        op: the op's name.
        key: hashable, cheap to make, and enough to determine `problem(*args)`.
        problem: makes the op's problem from `args`.
    """
    entry = (op, _forced, key)
    module = _selected.get(entry)
    if module is None:
        module = select(op, problem(*args))
        if len(_selected) >= 4096:
            _selected.clear()
        _selected[entry] = module
    return module


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Runs every op inside the `with` block by one implementation, in all threads of the process.

    An op that has no implementation of that name keeps its own choice; one that has it but cannot compute the
    problem raises RuntimeError. A backward pass outside the block keeps the implementation of its forward, unless a
    compiled graph runs it. The environment variable PEFT_KERNELS_BACKEND does the same for a whole process.

    Args:
        backend: "reference", "composed", "triton", "cuda", "cpu", or None for the automatic choice.

    Raises:
        ValueError: no such backend.
    """
    global _forced
    before = _forced
    _forced = None if backend is None else _checked(backend)
    try:
        yield
    finally:
        _forced = before


def forget() -> None:
    """Drops remembered choices, for when tuning files or the loaded extension changed in this process."""
    _choose.cache_clear()
    _selected.clear()


def explain(op: str, *args: Any, **kwargs: Any) -> Choice:
    """Says which implementation an op would run for these arguments and why the others would not.

    Args:
        op: the op's name, such as "lora_linear".
        *args, **kwargs: what would be passed to `peft_kernels.functional.<op>`; nothing is computed.

    Returns:
        A `Choice` that prints as one line for the choice and one for each implementation passed over.

    Raises:
        ValueError: no such op.
    """
    if op not in ORDER:
        raise ValueError(f"unknown op {op!r}; expected one of {', '.join(ORDER)}")
    module = importlib.import_module(f"peft_kernels.ops.{op}")
    return choose(op, module.problem(*args, **kwargs))
