"""Which kernels a test launched."""

from __future__ import annotations

import pytest

from peft_kernels.kernels.triton import _launch


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from now on."""
    launched, launch = [], _launch.launch

    def record(kernel, *arguments, **options):
        launched.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(_launch, "launch", record)
    return launched
