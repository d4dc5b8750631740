"""Ids that a block of code puts in force for the modules that run inside of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import Tensor

BASE_NAME = "__base__"
"""Of rows that run the base layer alone, as in Hugging Face PEFT: their id is -1."""


class OpenIds(threading.local):
    """The ids of the blocks that this thread has open, the innermost last."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []

    @property
    def active(self) -> Tensor | None:
        """Those of the innermost block, or None."""
        return self.ids[-1] if self.ids else None

    @contextlib.contextmanager
    def opened(self, ids: Tensor) -> Iterator[Tensor]:
        """A block in which these are active."""
        self.ids.append(ids)
        try:
            yield ids
        finally:
            self.ids.pop()
