"""The AVX-512 bodies of csrc/nf4_*.cpp on processors without AVX-512: compiled with a model of their instructions."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HEADER = Path(__file__).with_name("avx512_model.h")
NAME = "nf4_avx512_model"
# The bindings name functions of integers. What pybind11 would make of them takes longer to compile than the rest.
PYBIND11 = """#pragma once
#include <map>
#include <string>
namespace pybind11 {
struct gil_scoped_release {};
template <class Guard> struct call_guard {};
struct module_ {
  std::map<std::string, void*> functions;
  template <class Function, class... Rest>
  void def(const char* name, Function* function, Rest...) { functions[name] = reinterpret_cast<void*>(function); }
};
}  // namespace pybind11
"""
MODULE = """#include "cpu_bindings_nf4.cpp"
extern "C" __attribute__((visibility("default"))) void* function(const char* name) {
  pybind11::module_ m;
  bind_nf4(m);
  return m.functions.at(name);
}
"""


class Model:
    """The functions of `_cpu` that are about NF4, by their names."""

    def __init__(self, path: Path) -> None:
        self._function = ctypes.CDLL(str(path)).function
        self._function.restype = ctypes.c_void_p

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = ctypes.CFUNCTYPE(None)(self._function(name.encode()))
        # In the calling convention of x86-64 a parameter of 32 bits takes as much room.
        return lambda *arguments: function(*map(ctypes.c_int64, arguments))


@functools.cache
def module(folder: Path) -> Model:
    """The model, built in `folder` by whichever process comes first. Skips the test where it cannot be built."""
    compiler = shutil.which("g++")
    if platform.machine() != "x86_64" or compiler is None:
        pytest.skip("the model of AVX-512 is compiled by g++ on x86-64")
    target = folder / f"{NAME}.so"
    with (folder / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(compiler, target)
    return Model(target)


def _build(compiler: str, target: Path) -> None:
    copy = target.with_suffix(".csrc")
    shutil.copytree(CSRC, copy)
    shutil.copy(HEADER, copy / "simd" / "each.h")
    (copy / "module.cpp").write_text(MODULE)
    (copy / "pybind11").mkdir()
    (copy / "pybind11" / "pybind11.h").write_text(PYBIND11)
    # Such as -O2 contracts products and sums by: fused multiply-adds where they are not wanted must show.
    flags = ["-fexpensive-optimizations", "-mavx2", "-mfma", "-mf16c", "-ffp-contract=fast", "-std=c++17", "-fopenmp"]
    flags += ["-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-ignored-attributes"]
    flags += [f"-I{copy}"]
    objects = []
    for source in ("nf4_dequantize.cpp", "nf4_quantize.cpp", "nf4_linear.cpp", "module.cpp"):
        level = "-O0" if source == "module.cpp" else "-O1"
        objects.append(str(copy / f"{source}.o"))
        subprocess.run([compiler, level, *flags, "-c", str(copy / source), "-o", objects[-1]], check=True)
    # OpenMP is not linked, as in setup.py: the runtime is the one that `_cpu` has been bound to.
    subprocess.run([compiler, "-shared", *objects, "-o", str(target)], check=True)
