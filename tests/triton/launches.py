"""Which kernels a test launched."""

from __future__ import annotations

import pytest

from peft_kernels.kernels.triton import _launch


def record_launches(monkeypatch: pytest.MonkeyPatch, *, run: bool = True) -> list[str]:
    """Names of the kernels launched from now on; without `run` nothing more than the names, results are undefined."""
    launched, launch = [], _launch.launch

    def record(kernel, *arguments, **options):
        launched.append(kernel.__name__)
        if run:
            launch(kernel, *arguments, **options)

    monkeypatch.setattr(_launch, "launch", record)
    return launched
