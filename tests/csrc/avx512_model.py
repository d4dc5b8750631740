"""The AVX-512 bodies of csrc/nf4_*.cpp on processors without AVX-512: compiled with a model of their instructions."""

from __future__ import annotations

import fcntl
import functools
import importlib.machinery
import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HEADER = Path(__file__).with_name("avx512_model.h")
NAME = "nf4_avx512_model"
MODULE = f"""#include "cpu_bindings_nf4.cpp"
PYBIND11_MODULE({NAME}, m) {{ bind_nf4(m); }}
"""


@functools.cache
def module(folder: Path) -> ModuleType:
    """A module with the functions of `_cpu` that are about NF4, built in `folder` by whichever process comes first.
    Skips the test where it cannot be built."""
    compiler = shutil.which("g++")
    if platform.machine() != "x86_64" or compiler is None:
        pytest.skip("the model of AVX-512 is compiled by g++ on x86-64")
    pybind11 = pytest.importorskip("pybind11", reason="the build needs pybind11")
    target = folder / f"{NAME}.so"
    with (folder / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(compiler, pybind11.get_include(), target)
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(target))
    spec = importlib.util.spec_from_loader(NAME, loader)
    made = importlib.util.module_from_spec(spec)
    loader.exec_module(made)
    return made


def _build(compiler: str, include: str, target: Path) -> None:
    copy = target.with_suffix(".csrc")
    shutil.copytree(CSRC, copy)
    shutil.copy(HEADER, copy / "simd" / "each.h")
    (copy / "module.cpp").write_text(MODULE)
    # Such as -O2 contracts products and sums by: fused multiply-adds where they are not wanted must show.
    flags = ["-fexpensive-optimizations", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=fast", "-std=c++17", "-fopenmp"]
    flags += ["-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-ignored-attributes"]
    flags += [f"-I{include}", f"-I{sysconfig.get_paths()['include']}"]
    objects = []
    for source in ("nf4_dequantize.cpp", "nf4_quantize.cpp", "nf4_linear.cpp", "module.cpp"):
        level = "-O0" if source == "module.cpp" else "-O1"
        objects.append(str(copy / f"{source}.o"))
        subprocess.run([compiler, level, *flags, "-c", str(copy / source), "-o", objects[-1]], check=True)
    # OpenMP is not linked, as in setup.py: the runtime is the one that `_cpu` has been bound to.
    subprocess.run([compiler, "-shared", *objects, "-o", str(target)], check=True)
