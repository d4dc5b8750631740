"""Training data that every Python carries: its own standard library's names and the first lines of their docstrings.

Sources are parsed, never imported: importing all of the standard library opens windows, prints and starts browsers.
"""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from peft_kernels.cli.errors import UsageError

# Distributions of Python ship these or leave them out, and their names say little.
SKIPPED_FOLDERS = frozenset(("test", "tests", "idle_test"))
MIN_LENGTH = 25


def collect_pairs(folder: Path | None = None) -> list[tuple[str, str]]:
    """(query, positive) of each public function, class and method: name with module, and its docstring's first line.

    Lines of at most 25 characters say too little and are left out. A line or a name that was seen before is left out
    too, so that every positive belongs to exactly one query.

    Args:
        folder: root of the library; this interpreter's own when None.

    Returns:
        Pairs in the order of file paths and lines, the same on every run.

    Raises:
        UsageError: there is no Python source to read.
    """
    folder = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    pairs: list[tuple[str, str]] = []
    queries: set[str] = set()
    positives: set[str] = set()
    for path, module in _modules(folder):
        for name, line in _documented(_parse(path).body, ""):
            query = f"{name} ({module})"
            if query not in queries and line not in positives:
                queries.add(query)
                positives.add(line)
                pairs.append((query, line))
    if not pairs:
        raise UsageError(f"no docstrings found under {folder}: this Python has no library sources; give --data")
    return pairs


def _modules(folder: Path) -> Iterator[tuple[Path, str]]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if _is_public(name) and name not in SKIPPED_FOLDERS)
        parts = Path(root).relative_to(folder).parts
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and _is_public(stem):
                yield Path(root, name), ".".join((*parts, stem))
            elif name == "__init__.py" and parts:
                yield Path(root, name), ".".join(parts)


def _is_public(name: str) -> bool:
    return name.isidentifier() and not name.startswith("_")


def _parse(path: Path) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files have no docstrings to offer
        return ast.Module(body=[], type_ignores=[])


def _documented(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or not _is_public(node.name):
            continue
        text = (ast.get_docstring(node, clean=False) or "").strip()
        line = text.splitlines()[0].strip() if text else ""
        if len(line) > MIN_LENGTH:
            yield prefix + node.name, line
        if isinstance(node, ast.ClassDef):
            yield from _documented(node.body, f"{prefix}{node.name}.")
