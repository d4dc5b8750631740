"""The files `sm_*.json`, one per GPU architecture, and their validation.

    {
      "arch": "sm_90",                          its own name
      "kernels": {"down_projection": [          rules of each kernel; the first that holds is taken
        {"dtype": "float32", "max_r": 64,       conditions: dtype, dropout, max_<size> ...
         "block_m": 64, "num_warps": 4}         ... and the fields of that kernel's configuration
      ]},
      "measured": [                             what was measured to beat the alternative on this architecture
        {"op": "lora_linear", "speedup": 1.2,   alternative's time / kernel's time
         "result": "benchmarks/results/...",    the file that shows it
         "m": [1024, 16384], "dtype": "bfloat16"}    bounds on fields of the op's Problem
      ]
    }

`"configs_of": "sm_80"` in place of `kernels` takes the rules of another architecture.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft_kernels.tuning.configs import CONFIGS, Config

FOLDER = Path(__file__).parent
_DTYPES = ("float32", "float16", "bfloat16")


class TuningError(ValueError):
    """A tuning file does not say what it should; the message names the file and the place."""


@dataclass(frozen=True)
class Rule:
    """`config` serves where dtype and dropout agree, when given, and no size passes its limit."""

    config: Config
    dtype: str | None
    dropout: bool | None
    limits: tuple[tuple[str, int], ...]

    def holds(self, dtype: str, dropout: bool, sizes: dict[str, int]) -> bool:
        return (
            self.dtype in (None, dtype)
            and self.dropout in (None, dropout)
            and all(sizes[name] <= limit for name, limit in self.limits)
        )


@dataclass(frozen=True)
class Win:
    """`speedup` over the alternative was measured within `bounds`: (field of the op's Problem, lowest, highest)."""

    op: str
    speedup: float
    result: str
    bounds: tuple[tuple[str, Any, Any], ...]

    def covers(self, problem: Any) -> bool:
        return all(lowest <= _plain(getattr(problem, name)) <= highest for name, lowest, highest in self.bounds)


@dataclass(frozen=True)
class Architecture:
    rules: dict[str, tuple[Rule, ...]]
    measured: tuple[Win, ...]


def _plain(value: Any) -> Any:
    """Numbers as they are; a torch.dtype by its name, as the files spell it."""
    return value if isinstance(value, int) else str(value).removeprefix("torch.")


def number(arch: str) -> int:
    prefix, _, digits = arch.partition("_")
    if prefix != "sm" or not digits.isdigit():
        raise ValueError(f"{arch!r} is not an architecture; expected a name such as 'sm_90'")
    return int(digits)


@functools.cache
def known_architectures() -> tuple[str, ...]:
    """Architectures that have a file, oldest first."""
    return tuple(sorted((path.stem for path in FOLDER.glob("sm_*.json")), key=number))


@functools.cache
def load(arch: str) -> Architecture:
    """The file of `arch`. Raises TuningError where it is not as described above."""
    path = FOLDER / f"{arch}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TuningError(f"{path.name}: not JSON: {error}") from error
    return parse(content, path.name)


def parse(content: Any, name: str) -> Architecture:
    """An architecture from the content of its file `name`."""
    _expect_keys(content, {"arch", "measured"}, {"kernels", "configs_of"}, name)
    if f"{content['arch']}.json" != name:
        raise TuningError(f"{name}: arch is {content['arch']!r}; expected {name.removesuffix('.json')!r}")
    if ("kernels" in content) == ("configs_of" in content):
        raise TuningError(f"{name}: expected either 'kernels' or 'configs_of'")
    measured = tuple(_win(entry, f"{name}: measured[{i}]") for i, entry in enumerate(content["measured"]))
    if "configs_of" in content:
        return Architecture(load(content["configs_of"]).rules, measured)
    kernels = content["kernels"]
    _expect_keys(kernels, set(CONFIGS), set(), f"{name}: kernels")
    return Architecture(
        {
            kernel: tuple(_rule(kernel, entry, f"{name}: {kernel}[{i}]") for i, entry in enumerate(entries))
            for kernel, entries in kernels.items()
        },
        measured,
    )


def _expect_keys(content: Any, required: set[str], optional: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise TuningError(f"{where}: expected an object, got {type(content).__name__}")
    missing, unknown = required - set(content), set(content) - required - optional
    if missing or unknown:
        raise TuningError(f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}")


def _rule(kernel: str, entry: Any, where: str) -> Rule:
    names = {field.name for field in fields(CONFIGS[kernel])}
    limits = {key: entry[key] for key in entry if key.startswith("max_")}
    _expect_keys(entry, names, {"dtype", "dropout", *limits}, where)
    values = {key: entry[key] for key in names}
    for key, value in (values | limits).items():
        if type(value) is not int or value < 1:
            raise TuningError(f"{where}: {key} is {value!r}; expected a positive integer")
        if key not in limits and key.startswith(("block", "num_warps")) and value & (value - 1):
            raise TuningError(f"{where}: {key} is {value}; expected a power of two")
    if entry.get("dtype", "float32") not in _DTYPES:
        raise TuningError(f"{where}: dtype is {entry['dtype']!r}; expected one of {', '.join(_DTYPES)}")
    if type(entry.get("dropout", False)) is not bool:
        raise TuningError(f"{where}: dropout is {entry['dropout']!r}; expected true or false")
    return Rule(
        CONFIGS[kernel](**values),
        entry.get("dtype"),
        entry.get("dropout"),
        tuple((key.removeprefix("max_"), value) for key, value in limits.items()),
    )


def _win(entry: Any, where: str) -> Win:
    bounds = set(entry) - {"op", "speedup", "result"} if isinstance(entry, dict) else set()
    _expect_keys(entry, {"op", "speedup", "result"}, bounds, where)
    if not isinstance(entry["speedup"], (int, float)) or entry["speedup"] <= 1:
        raise TuningError(f"{where}: speedup is {entry['speedup']!r}; expected a number above 1")
    return Win(entry["op"], float(entry["speedup"]), entry["result"], tuple(_bound(k, entry[k], where) for k in bounds))


def _bound(key: str, value: Any, where: str) -> tuple[str, Any, Any]:
    lowest, highest = value if isinstance(value, list) and len(value) == 2 else (value, value)
    if isinstance(value, list) and not (type(lowest) is type(highest) is int and lowest <= highest):
        raise TuningError(f"{where}: {key} is {value!r}; expected a value or [lowest, highest]")
    return key, lowest, highest
