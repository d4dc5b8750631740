"""Counting which path ran."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("peft", reason="needs Hugging Face PEFT: pip install 'peft-kernels[peft]'")

from peft_kernels import functional


class Calls:
    """How often `functional.lora_linear` was called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        """The number of calls since the last time."""
        count, self.count = self.count, 0
        return count


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls, original = Calls(), functional.lora_linear

    def counted(*args, **kwargs):
        calls.count += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "lora_linear", counted)
    return calls
