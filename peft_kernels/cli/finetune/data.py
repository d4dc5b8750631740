"""Examples to train on and examples held out: read from JSON lines or collected from the standard library."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from peft_kernels.cli.errors import UsageError
from peft_kernels.cli.finetune.docstrings import collect_pairs

EMBEDDING, CAUSAL_LM = "embedding", "causal-lm"

# The accepted key sets of a line, per task.
FIELDS = {EMBEDDING: (("query", "positive"),), CAUSAL_LM: (("prompt", "completion"), ("text",))}

MAX_HELD_OUT = 1000
# Fixed, so that a seed changes the training and not what it is measured on.
SPLIT_SEED = 0

Example = tuple[str, ...]


class Split(NamedTuple):
    """Disjoint examples: (query, positive), (prompt, completion) or (text,)."""

    train: list[Example]
    held_out: list[Example]
    source: str


def load_examples(task: str, file: str | None) -> Split:
    """The examples of `file`, or the standard library's docstrings when there is none, split for training.

    Args:
        task: "embedding" or "causal-lm".
        file: path of a JSON-lines file, or None.

    Returns:
        The `Split`.

    Raises:
        UsageError: the file cannot be read, a line (its number is named) is not of the task's form, or there are
            too few examples.
    """
    if file is None:
        return split(collect_pairs(), "docstrings of Python's standard library")
    return split(read_jsonl(Path(file), FIELDS[task]), file)


def split(examples: Sequence[Example], source: str) -> Split:
    """Holds out a quarter, at most 1,000, and drops from training whatever shares a text with a held-out example."""
    distinct = list(dict.fromkeys(examples))
    random.Random(SPLIT_SEED).shuffle(distinct)
    held_out = distinct[: min(MAX_HELD_OUT, len(distinct) // 4)]
    known = {text for example in held_out for text in example}
    train = [example for example in distinct[len(held_out) :] if not known.intersection(example)]
    if len(held_out) < 2 or len(train) < 2:
        raise UsageError(
            f"{source}: {len(distinct)} different examples leave {len(train)} for training and {len(held_out)} "
            "held out; at least 2 of each are needed"
        )
    return Split(train, held_out, source)


def read_jsonl(file: Path, fields: tuple[tuple[str, ...], ...]) -> list[Example]:
    """Reads one object per line; each must have all keys of one of `fields`, with text in them.

    Raises:
        UsageError: naming the file, the line's number and what is wrong with it.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    examples = [
        _example(line, fields, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not examples:
        raise UsageError(f"{file} holds no examples")
    return examples


def _example(line: str, fields: tuple[tuple[str, ...], ...], where: str) -> Example:
    wanted = " or ".join("{" + ", ".join(f'"{key}"' for key in keys) + "}" for keys in fields)
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error.msg}, column {error.colno}); expected {wanted}") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: {type(record).__name__}; expected an object {wanted}")
    keys = next((keys for keys in fields if record.keys() >= set(keys)), None)
    if keys is None:
        raise UsageError(f"{where}: has the keys {sorted(record)}; expected {wanted}")
    for key in keys:
        if not isinstance(record[key], str) or not record[key].strip():
            raise UsageError(f"{where}: {key!r} is {record[key]!r}; expected text")
    return tuple(record[key] for key in keys)
