"""The files `sm_*.json`, one per GPU architecture, and their validation.

    {
      "arch": "sm_90",                          its own name
      "kernels": {"down_projection": [          rules of each kernel; the first that holds is taken
        {"dtype": "float32", "max_r": 64,       conditions: dtype, dropout, max_<size> ...
         "block_m": 64, "num_warps": 4}         ... and the fields of that kernel's configuration
      ]},
      "measured": [                             what was measured to beat the alternative on this architecture
        {"op": "lora_linear", "speedup": 1.2,   alternative's time / kernel's time
         "rival": "composed",                   the alternative
         "m": [1025, 16384], "dtype": "bfloat16",    bounds on fields of the op's Problem
         "provenance": {...}}                   GPU, versions and sources; when these change, the entry no longer counts
      ],
      "tuned": [...]                            every measurement behind `measured` (tuning/points.py)
    }

`"configs_of": "sm_80"` takes the rules of another architecture for kernels that `kernels` lacks. `measured` and `tuned`
are written by `peft-kernels tune`: by default into a file of this form in the user's folder, whose rules are not used.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft_kernels.tuning.configs import CONFIGS, Config
from peft_kernels.tuning.points import plain, provenance_of
from peft_kernels.tuning.provenance import Provenance

FOLDER = Path(__file__).parent
FOLDER_VARIABLE = "PEFT_KERNELS_TUNING"
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
    """`speedup` over `rival` was measured within `bounds`: (field of the op's Problem, lowest, highest)."""

    op: str
    speedup: float
    rival: str
    provenance: Provenance
    bounds: tuple[tuple[str, Any, Any], ...]

    def covers(self, problem: Any) -> bool:
        return all(lowest <= plain(getattr(problem, name)) <= highest for name, lowest, highest in self.bounds)


@dataclass(frozen=True)
class Architecture:
    """`tuned` holds points as they are in the file: those of changed kernels cannot be read, and need not be."""

    rules: dict[str, tuple[Rule, ...]]
    measured: tuple[Win, ...]
    tuned: tuple[dict[str, Any], ...]


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
    return read(FOLDER / f"{arch}.json")


def read(path: Path) -> Architecture:
    """The file at `path`, named after its architecture.

    Raises:
        TuningError: it is not as described above.
        OSError: it cannot be read.
    """
    return parse(content_of(path), path.name)


def content_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TuningError(f"{path.name}: not JSON: {error}") from error


def user_folder() -> Path:
    """Where `peft-kernels tune` writes: the folder that PEFT_KERNELS_TUNING names, or the user's configuration folder
    of this platform."""
    home = Path.home()
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    if sys.platform == "win32":
        return Path(os.environ.get("APPDATA") or home / "AppData" / "Roaming") / "peft_kernels"
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "peft_kernels"
    return Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "peft_kernels"


def parse(content: Any, name: str) -> Architecture:
    """An architecture from the content of its file `name`."""
    _expect_keys(content, {"arch", "measured"}, {"kernels", "configs_of", "tuned"}, name)
    if f"{content['arch']}.json" != name:
        raise TuningError(f"{name}: arch is {content['arch']!r}; expected {name.removesuffix('.json')!r}")
    measured = tuple(_win(entry, f"{name}: measured[{i}]") for i, entry in enumerate(content["measured"]))
    tuned = tuple(_point(entry, f"{name}: tuned[{i}]") for i, entry in enumerate(content.get("tuned", ())))
    others: dict[str, tuple[Rule, ...]] = {}
    if "configs_of" in content:
        if content["configs_of"] not in known_architectures():
            raise TuningError(f"{name}: configs_of is {content['configs_of']!r}, an architecture without a file")
        others = load(content["configs_of"]).rules
    kernels = content.get("kernels", {})
    _expect_keys(kernels, set(CONFIGS) - set(others), set(CONFIGS), f"{name}: kernels")
    own = {
        kernel: tuple(_rule(kernel, entry, f"{name}: {kernel}[{i}]") for i, entry in enumerate(entries))
        for kernel, entries in kernels.items()
    }
    return Architecture(others | own, measured, tuned)


def _expect_keys(content: Any, required: set[str], optional: set[str], where: str) -> None:
    if not isinstance(content, dict):
        raise TuningError(f"{where}: expected an object, got {type(content).__name__}")
    missing, unknown = required - set(content), set(content) - required - optional
    if missing or unknown:
        raise TuningError(f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}")


def _rule(kernel: str, entry: Any, where: str) -> Rule:
    names = {field.name for field in fields(CONFIGS[kernel])}
    limits = {key: entry[key] for key in entry if key.startswith("max_") and key not in names}
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


_WIN = {"op", "speedup", "rival", "provenance"}
_POINT = {"op", "problem", "rival", "provenance", "extent", "complete", "compared", "kernels"}


def _win(entry: Any, where: str) -> Win:
    bounds = sorted(set(entry) - _WIN) if isinstance(entry, dict) else []
    _expect_keys(entry, _WIN, set(bounds), where)
    if not isinstance(entry["speedup"], (int, float)) or entry["speedup"] <= 1:
        raise TuningError(f"{where}: speedup is {entry['speedup']!r}; expected a number above 1")
    return Win(
        entry["op"], float(entry["speedup"]), entry["rival"], _provenance(entry, where),
        tuple(_bound(name, entry[name], where) for name in bounds),
    )  # fmt: skip


def _point(entry: Any, where: str) -> dict[str, Any]:
    _expect_keys(entry, _POINT, set(), where)
    _provenance(entry, where)
    return entry


def _provenance(entry: Any, where: str) -> Provenance:
    _expect_keys(entry["provenance"], {field.name for field in fields(Provenance)}, set(), f"{where}: provenance")
    return provenance_of(entry)


def _bound(key: str, value: Any, where: str) -> tuple[str, Any, Any]:
    lowest, highest = value if isinstance(value, list) and len(value) == 2 else (value, value)
    if isinstance(value, list) and not (type(lowest) is type(highest) is int and lowest <= highest):
        raise TuningError(f"{where}: {key} is {value!r}; expected a value or [lowest, highest]")
    return key, lowest, highest
