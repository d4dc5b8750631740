"""Plain-text and Markdown tables with aligned columns: what `doctor`, `accelerate` and the benchmark report print."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# A number with an optional short unit ("1.5x", "12 µs", "-3%"), or nothing to show.
_NUMBER = re.compile(r"([-+]?[\d.,]+(e[-+]?\d+)?\s?[^\d\s]{0,3}|-?)")


def table(rows: Iterable[Sequence[object]], headers: Sequence[str], *, markdown: bool = False) -> str:
    """Lays rows out in aligned columns; numbers to the right, text to the left.

    Args:
        rows: one sequence per row, as long as `headers`. None shows as an empty cell; format floats yourself.
        headers: the column titles.
        markdown: a Markdown table instead of a plain one.

    Returns:
        The table as text without a final newline.

    Raises:
        ValueError: a row is not as long as `headers`.
    """
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [len(column) > 1 and all(map(_NUMBER.fullmatch, column[1:])) for column in columns]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded).rstrip()

    rule = ["-" * (w - 1) + ":" if markdown and r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(headers), line(rule), *map(line, cells)])
