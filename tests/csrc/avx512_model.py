"""The AVX-512 bodies of csrc/nf4_*.cpp on processors without AVX-512: compiled with a model of their instructions."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = ("cpu_bindings_nf4.cpp", "nf4_dequantize.cpp", "nf4_quantize.cpp", "nf4_linear.cpp")
NAME = "nf4_avx512_model"
MODULE = f"""#include <pybind11/pybind11.h>
void bind_nf4(pybind11::module_& m);
PYBIND11_MODULE({NAME}, m) {{ bind_nf4(m); }}
"""


@functools.cache
def module() -> ModuleType:
    """A module with the functions of `_cpu` that are about NF4. Skips the test where it cannot be built."""
    compiler = shutil.which("g++")
    if platform.machine() != "x86_64" or compiler is None:
        pytest.skip("the model of AVX-512 is compiled by g++ on x86-64")
    pybind11 = pytest.importorskip("pybind11", reason="the build needs pybind11")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{NAME}.so"
        _build(compiler, pybind11.get_include(), target)
        loader = importlib.machinery.ExtensionFileLoader(NAME, str(target))
        spec = importlib.util.spec_from_loader(NAME, loader)
        made = importlib.util.module_from_spec(spec)
        loader.exec_module(made)
        return made


def _build(compiler: str, include: str, target: Path) -> None:
    copy = target.parent / "csrc"
    shutil.copytree(CSRC, copy)
    shutil.copy(Path(__file__).with_name("avx512_model.h"), copy / "simd" / "each.h")
    (copy / "module.cpp").write_text(MODULE)
    flags = ["-O1", "-mavx2", "-mfma", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fopenmp"]
    flags += ["-Wno-psabi", "-Wno-ignored-attributes"]
    includes = [f"-I{include}", f"-I{sysconfig.get_paths()['include']}"]
    objects = []
    for source in (*SOURCES, "module.cpp"):
        objects.append(str(copy / f"{source}.o"))
        subprocess.run([compiler, *flags, *includes, "-c", str(copy / source), "-o", objects[-1]], check=True)
    # OpenMP is not linked, as in setup.py: the runtime is the one that `_cpu` has been bound to.
    subprocess.run([compiler, "-shared", *objects, "-o", str(target)], check=True)
