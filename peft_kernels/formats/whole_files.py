"""Writing files so that what was there before stays whole until the new one is."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_aside(folder: Path, name: str, data: bytes) -> Path:
    """Writes to a new temporary name beside `name` and waits until the disk has it."""
    path = _aside(folder, name)
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def _aside(folder: Path, name: str) -> Path:
    return folder / f".{name}.{secrets.token_hex(8)}.tmp"


@contextmanager
def taking_the_place_of(path: Path) -> Iterator[Path]:
    """A new temporary name beside `path`: what the block writes there takes the place of `path` once the disk has it;
    should the block fail, the file that was there is intact."""
    aside = _aside(path.parent, path.name)
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Waits until the disk has the renames in a folder."""
    if os.name == "posix":  # elsewhere a directory cannot be opened, and renames are flushed with the file
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Writes one file, its folder made where there is none; should that fail, the file that was there is intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with taking_the_place_of(path) as aside:
        aside.write_bytes(data)
