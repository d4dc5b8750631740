"""What a command raises when the user has to change something: printed as one line, without a traceback."""

from __future__ import annotations

import argparse
import importlib.util
import math

from peft_kernels.checks import MAX_RANK


class UsageError(Exception):
    """The command cannot run as asked: exit code 2."""


class CommandError(Exception):
    """The command ran and failed: exit code 1."""


def require_packages(command: str, names: dict[str, str], extra: str) -> None:
    """Refuses to start when a package is missing, and names all of them at once.

    Args:
        command: the command that needs them.
        names: module name -> distribution name.
        extra: the extra of peft-kernels that brings them.

    Raises:
        UsageError: one of them is not installed.
    """
    missing = [distribution for module, distribution in names.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f'{command} needs {", ".join(missing)}; install with: pip install "peft-kernels[{extra}]"')


def positive_int(text: str) -> int:
    return _at_least(1, text)


def text_length(text: str) -> int:
    """Room for a token of a prompt, one to predict and what tokenizers put around them."""
    return _at_least(8, text)


def _at_least(minimum: int, text: str) -> int:
    value = _number(text, int, "an integer")
    if value < minimum:
        raise argparse.ArgumentTypeError(f"{value} is not at least {minimum}")
    return value


def rank(text: str) -> int:
    value = _number(text, int, "an integer")
    if not 1 <= value <= MAX_RANK:
        raise argparse.ArgumentTypeError(f"{value} is not a rank in 1..{MAX_RANK}")
    return value


def positive_float(text: str) -> float:
    value = _number(text, float, "a number")
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def probability(text: str) -> float:
    value = _number(text, float, "a number")
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability in [0, 1)")
    return value


def name_list(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of module names")
    return names


def _number(text: str, kind: type, what: str):
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
