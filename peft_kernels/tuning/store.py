"""The file that `peft-kernels tune` writes: after each problem, whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_kernels.tuning import files, nearest, points
from peft_kernels.tuning.points import Point
from peft_kernels.tuning.provenance import Provenance
from peft_kernels.tuning.trials import Answer, Question

LINE = 230


class Store:
    """A tuning file being written. What it already holds stays, but for points that are measured again."""

    def __init__(self, path: Path, arch: str) -> None:
        """Reads the file, if there is one.

        Raises:
            TuningError: it is no tuning file of this architecture.
            OSError: it cannot be read.
        """
        self.path = path
        self.content: dict[str, Any] = {"arch": arch, "configs_of": nearest(arch), "measured": [], "tuned": []}
        if path.exists():
            self.content = files.content_of(path)
            files.parse(self.content, f"{arch}.json")
            self.content.setdefault("tuned", [])

    def find(self, op: str, problem: Mapping[str, Any], rival: str, here: Provenance) -> Point | None:
        """What was measured of exactly this problem and still holds, or None."""
        for raw in self.content["tuned"]:
            same = raw["op"] == op and raw["problem"] == problem and raw["rival"] == rival
            if same and points.provenance_of(raw).stale(here) is None:
                return points.from_json(raw)
        return None

    def answers(self, op: str, rival: str, here: Provenance) -> dict[Question, Answer]:
        """The winners of the complete measurements of this op that still hold, the first of a question's."""
        answers: dict[Question, Answer] = {}
        for raw in self.content["tuned"]:
            mine = raw["op"] == op and raw["rival"] == rival and raw["complete"]
            if mine and points.provenance_of(raw).stale(here) is None:
                for choice in points.from_json(raw).choices:
                    answers.setdefault(choice.question, choice.config)
        return answers

    def save(self, point: Point) -> None:
        """Puts the point in the place of an earlier one of the same problem and GPU, and writes the file.

        Raises:
            OSError: it cannot be written; the file is as it was.
        """
        others = [raw for raw in self.content["tuned"] if points.from_json(raw, choices=False).key != point.key]
        self.content["tuned"] = [*others, points.to_json(point)]
        known = [points.from_json(raw, choices=False) for raw in self.content["tuned"]]
        self.content["measured"] = points.measured_ranges(known)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(layout(self.content) + "\n")
            os.chmod(name, 0o644)
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise


def layout(value: Any, indent: int = 0) -> str:
    """JSON in which what fits into a line has one, and lists of objects have one line for each."""
    line = json.dumps(value, ensure_ascii=False)
    objects = isinstance(value, list) and any(isinstance(item, dict) for item in value)
    if not isinstance(value, (dict, list)) or not value or (indent + len(line) <= LINE and not objects and indent):
        return line
    inner = " " * (indent + 2)
    if isinstance(value, list):
        parts = [layout(item, indent + 2) for item in value]
    else:
        parts = [f"{json.dumps(key)}: {layout(item, indent + 2)}" for key, item in value.items()]
    opening, closing = "[]" if isinstance(value, list) else "{}"
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{' ' * indent}{closing}"
