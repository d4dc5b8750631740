"""Runs the other tests of this folder in processes where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from tests.triton.conftest import HALF

triton = pytest.importorskip("triton", reason="triton is not installed")


def _interpreter_works() -> bool:
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):
        return True
    try:
        return int(numpy.ones(1)) == 1
    except TypeError:
        return False


# About three minutes of processor time; a machine that others use too takes several times that.
SECONDS = 900


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("half", ["0", "1"])
def test_the_kernels_in_the_interpreter(half):
    """In two halves, which two workers run beside each other."""
    if not _interpreter_works():
        pytest.skip("the interpreter of Triton before 3.7 needs a NumPy that turns arrays of one element into integers")
    here = Path(__file__).parent
    root = here.parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", HALF: half}
    # A worker of pytest-xdist would pass its own identity on.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
