"""Runs the other tests of this folder in a process where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")


def _interpreter_works() -> bool:
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return True
    try:
        return int(numpy.ones(1)) == 1
    except TypeError:
        return False


# About a minute on a core of its own.
SECONDS = 900


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_the_kernels_in_the_interpreter():
    if not _interpreter_works():
        pytest.skip("the interpreter of Triton before 3.7 needs a NumPy that turns arrays of one element into integers")
    here = Path(__file__).parent
    root = here.parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # A worker of pytest-xdist would pass its own identity on.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
