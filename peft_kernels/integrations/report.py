"""What `accelerate` returns: which layers are fused, why others are not, and what fell back later."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from peft_kernels._table import table

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Row(NamedTuple):
    """One layer: its name in the model, whether it is fused, and if not, why."""

    layer: str
    fused: bool
    reason: str = ""


class Block(NamedTuple):
    """Layers of one module that are computed together: the module, the layers' names in it, and by which function of
    `peft_kernels.functional`."""

    module: str
    layers: tuple[str, ...]
    function: str


@dataclass
class Calls:
    """What happened after `accelerate`; the layers of a model share one.

    Attributes:
        strict: whether calls of PEFT's own code raise.
        fallbacks: those calls: reason -> layer -> count.
        ended: blocks whose layers run one by one since: module -> reason.
    """

    strict: bool = False
    fallbacks: dict[str, Counter[str]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The layers that `accelerate` found, in the model's order; `str(report)` is a table.

    Attributes:
        rows: one `Row` per layer.
        calls: the later calls that ran PEFT's own code; it counts on.
        blocks: layers that are computed together, where their state allows it at a call.
    """

    rows: tuple[Row, ...]
    calls: Calls = field(default_factory=Calls)
    blocks: tuple[Block, ...] = ()

    @property
    def fused(self) -> int:
        """How many layers are fused."""
        return sum(row.fused for row in self.rows)

    @property
    def skipped(self) -> int:
        """How many layers run PEFT's own code."""
        return len(self.rows) - self.fused

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Why layers are not fused: reason -> names of the layers."""
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if not row.fused:
                reasons.setdefault(row.reason, []).append(row.layer)
        return reasons

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls since then that ran PEFT's own code (uncompiled ones): reason -> count."""
        return {reason: layers.total() for reason, layers in self.calls.fallbacks.items() if layers}

    def __str__(self) -> str:
        rows = [
            (name, count, "yes" if fused else "no", reason) for (name, fused, reason), count in _collapse(self.rows)
        ]
        lines = [
            table(rows, ("layer", "count", "fused", "why not")),
            f"{self.fused} of {len(self.rows)} layers fused",
        ]
        if self.blocks:
            lines.append(table(_block_rows(self.blocks), ("computed together", "count", "layers", "by")))
        lines += [f"{count} calls ran PEFT's own code: {reason}" for reason, count in self.fallbacks.items()]
        lines += [f"{module} runs its layers one by one: {reason}" for module, reason in self.calls.ended.items()]
        return "\n".join(lines)


def _collapse(rows: tuple[Row, ...]) -> list[tuple[Row, int]]:
    """Puts layers that differ in their index alone into one row: `layers.{0-31}.q_proj`."""
    groups: dict[tuple[str, bool, str], list[str]] = {}
    for layer, fused, reason in rows:
        groups.setdefault((_NUMBER.sub("*", layer), fused, reason), []).append(layer)
    return [(Row(_pattern(names), fused, reason), len(names)) for (_, fused, reason), names in groups.items()]


def _block_rows(blocks: tuple[Block, ...]) -> list[tuple]:
    modules: dict[tuple, list[str]] = {}
    for module, layers, function in blocks:
        modules.setdefault((_NUMBER.sub("*", module), ", ".join(layers), function), []).append(module)
    return [(_pattern(names), len(names), layers, function) for (_, layers, function), names in modules.items()]


def _pattern(names: list[str]) -> str:
    """One name for names that are equal up to their numbers."""
    columns = [_ranges(column) for column in zip(*map(_NUMBER.findall, names), strict=True)]
    numbers = iter(columns)
    return _NUMBER.sub(lambda _: next(numbers), names[0])


def _ranges(numbers: tuple[str, ...]) -> str:
    """`{0-3,7}` for 0, 1, 2, 3, 7; the number alone when there is one."""
    values = sorted({int(number) for number in numbers})
    starts = [value for value in values if value - 1 not in values]
    ends = [value for value in values if value + 1 not in values]
    spans = [f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)]
    return f"{{{','.join(spans)}}}" if len(values) > 1 else spans[0]
