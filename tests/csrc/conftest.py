"""What the tests of the compiled parts share: each part, skipped with its reason where it is not built."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from peft_kernels import _native

WIDTHS = ("portable", "avx2", "avx512")


def _loaded(part: str) -> ModuleType:
    reason = _native.why_not(part)
    if reason is not None:
        pytest.skip(reason)
    return _native.load(part)


@pytest.fixture
def cpu() -> ModuleType:
    return _loaded("_cpu")


@pytest.fixture
def cuda() -> ModuleType:
    return _loaded("_cuda")


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, cpu: ModuleType) -> Iterator[str]:
    """Runs the test by code of one vector width."""
    info = cpu.build_info()
    if request.param not in info["vector_widths"]:
        pytest.skip(f"this processor does not run {request.param} code")
    cpu.set_vector_width(request.param)
    yield request.param
    cpu.set_vector_width(info["vector_width"])
