"""The Triton kernels on CPU tensors, in Triton's interpreter.

Triton decides when a kernel is defined whether to interpret it, so TRITON_INTERPRET must be set before the process
imports the kernels. `test_own_process.py` starts such processes; in any other the tests here are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_kernels import use_backend
from peft_kernels.kernels.triton._launch import INTERPRETED

HERE = Path(__file__).parent
STARTER = "test_own_process.py"
# "0" or "1": this process runs that half of the tests here.
HALF = "PEFT_KERNELS_HALF_OF_THE_TESTS"


if INTERPRETED:
    from tests.triton.interpreter import speed_up

    speed_up()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HALF in os.environ:
        # Of four neighbours the outer two and the inner two, since every second case of a grid is often the slower.
        outer = os.environ[HALF] == "0"
        halves = {True: [], False: []}
        for i, item in enumerate(items):
            halves[(i % 4 in (0, 3)) == outer].append(item)
        items[:] = halves[True]
        config.hook.pytest_deselected(items=halves[False])
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
