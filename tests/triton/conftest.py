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


def _patch_each_language_once() -> None:
    """Triton's interpreter looks through `triton.language` for what it replaces whenever a kernel calls a function,
    though the kernel's launch has replaced it: a fifth of the time of these tests."""
    import inspect

    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn):
        languages = {value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)}
        if patched and languages <= patched:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        if not patched:  # a launch, which restores at its end; what it calls does not
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.update(languages)
        return scope

    interpreter._patch_lang = patch_once


if INTERPRETED:
    _patch_each_language_once()


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
