"""What the tests of the compiled parts share: each part, skipped with its reason where it is not built."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from peft_kernels import _native
from tests.csrc import avx512_model

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


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all of its processes see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(params=[*WIDTHS, "model of avx512"])
def nf4_width(
    request: pytest.FixtureRequest, cpu: ModuleType, monkeypatch: pytest.MonkeyPatch, shared_folder: Path
) -> Iterator[str]:
    """Runs the test by the NF4 code of one vector width, on a processor without AVX-512 by a model of it too."""
    info = cpu.build_info()
    if request.param == "model of avx512":
        if "avx512" in info["vector_widths"]:
            pytest.skip("this processor runs avx512 code itself")
        if "avx2" not in info["vector_widths"]:
            pytest.skip("the model of avx512 is compiled for processors with avx2")
        model = avx512_model.module(shared_folder)
        monkeypatch.setattr(_native, "load", lambda part: model if part == "_cpu" else _loaded(part))
        yield request.param
        return
    if request.param not in info["vector_widths"]:
        pytest.skip(f"this processor does not run {request.param} code")
    cpu.set_vector_width(request.param)
    yield request.param
    cpu.set_vector_width(info["vector_width"])
