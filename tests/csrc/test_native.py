"""Loading of the compiled parts: late, once, without a second OpenMP runtime, and with a reason when it fails."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peft_kernels import _native


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_of_the_package_loads_neither():
    assert (
        python("import sys, peft_kernels; print([m for m in sys.modules if m.startswith('peft_kernels._c')])") == "[]\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime(cpu):
    """Two runtimes would keep two pools of threads. Ours must be the one that torch brought."""
    code = """
import re, torch
from peft_kernels import _native, functional, use_backend
with use_backend("cpu"):
    functional.philox_dropout(torch.ones(64, 1024), 0.5, seed=1)
print(*sorted(set(re.findall(r"/\\S*/lib(?:gomp|iomp5|omp)[-.]\\S*", open("/proc/self/maps").read()))), sep="\\n")
"""
    assert len(python(code).split()) == 1


def test_status_says_how_each_part_was_built_or_why_not():
    rows = _native.status()
    assert [row.part for row in rows] == list(_native.PARTS)
    for row in rows:
        assert (row.info is None) == (row.reason is not None)
        if row.info is not None:
            assert row.info["compiler"]


@pytest.mark.parametrize("part", _native.PARTS)
def test_a_missing_part_is_a_reason_and_not_an_error(monkeypatch, part):
    _native._load.cache_clear()
    monkeypatch.setitem(sys.modules, f"peft_kernels.{part}", None)
    try:
        assert "not built" in _native.why_not(part)
        with pytest.raises(ImportError, match="not built"):
            _native.load(part)
        assert next(row for row in _native.status() if row.part == part).info is None
    finally:
        _native._load.cache_clear()


def test_a_broken_part_is_remembered(monkeypatch):
    calls = []

    def broken(name):
        calls.append(name)
        raise ImportError("undefined symbol: nonsense")

    _native._load.cache_clear()
    monkeypatch.setattr(_native.importlib, "import_module", broken)
    try:
        for _ in range(3):
            assert "undefined symbol: nonsense" in _native.why_not("_cuda")
        assert calls == ["peft_kernels._cuda"]
    finally:
        _native._load.cache_clear()
