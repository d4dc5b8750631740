"""The Triton kernels on CPU tensors, in Triton's interpreter.

Triton decides when a kernel is defined whether to interpret it, so TRITON_INTERPRET must be set before the process
imports the kernels. `test_own_process.py` starts such a process; in any other the tests here are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_kernels import use_backend
from peft_kernels.kernels.triton._launch import INTERPRETED

HERE = Path(__file__).parent
STARTER = "test_own_process.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        if item.path.name == STARTER:
            if INTERPRETED:
                item.add_marker(pytest.mark.skip(reason="this is the process with TRITON_INTERPRET=1"))
        elif not INTERPRETED:
            reason = f"needs TRITON_INTERPRET=1 from the start; tests/triton/{STARTER} runs it in a process of its own"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _by_triton(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.name == STARTER:
        yield
        return
    with use_backend("triton"):
        yield
