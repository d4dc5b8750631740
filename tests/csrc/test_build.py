"""`setup.py build_ext` in a copy of the sources: with and without tools, with and without ninja, asked for and not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HAS_CXX = shutil.which("g++") or shutil.which("clang++")

# Without pybind11, whose headers take seconds to compile.
STUB = """#include <Python.h>
static PyObject* answer_of(PyObject*, PyObject*) {{ return PyLong_FromLong({answer}); }}
static PyMethodDef methods[] = {{{{"answer", answer_of, METH_NOARGS, nullptr}}, {{nullptr, nullptr, 0, nullptr}}}};
static PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{module}", nullptr, -1, methods}};
PyMODINIT_FUNC PyInit_{module}() {{ return PyModule_Create(&module); }}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The build script with a binding and otherwise empty sources, which compile in seconds."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc").mkdir()
    for source in [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc").glob("*.cu")]:
        (tmp_path / "csrc" / source.name).write_text("")
    (tmp_path / "csrc" / "cpu_bindings_all.cpp").write_text(STUB.format(module="_cpu", answer=42))
    (tmp_path / "peft_kernels").mkdir()
    (tmp_path / "peft_kernels" / "__init__.py").write_text("")
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    pytest.importorskip("pybind11", reason="the build needs pybind11")
    pytest.importorskip("setuptools", reason="the build needs setuptools")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**{k: v for k, v in os.environ.items() if not k.startswith("PEFT_KERNELS")}, **environment}
    return subprocess.run(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )


def built(tree: Path) -> set[str]:
    return {path.name.partition(".")[0] for path in (tree / "peft_kernels").glob("*.so")}


def lines_about(output: str, part: str) -> list[str]:
    return [line for line in output.splitlines() if f"peft_kernels.{part}" in line]


NO_TOOLS = {"NVCC": "no-such-nvcc", "CXX": "no-such-compiler"}


def test_without_compilers_it_says_so_in_a_line_each_and_succeeds(tree):
    result = build(tree, **NO_TOOLS)
    assert result.returncode == 0, result.stdout
    assert built(tree) == set()
    for part in ("_cpu", "_cuda"):
        (line,) = lines_about(result.stdout, part)
        assert "no-such-compiler not found" in line


@pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler")
def test_without_nvcc_only_the_cpu_part_is_built(tree):
    result = build(tree, NVCC="no-such-nvcc")
    assert result.returncode == 0, result.stdout
    assert built(tree) == {"_cpu"}
    (line,) = lines_about(result.stdout, "_cuda")
    assert "no-such-nvcc not found" in line


def test_asked_for_a_missing_tool_is_an_error(tree):
    result = build(tree, PEFT_KERNELS_BUILD="1", **NO_TOOLS)
    assert result.returncode != 0
    assert "no-such-compiler not found" in result.stdout


@pytest.mark.parametrize("asked", ["", "1"])
def test_a_failing_compile_is_a_warning_unless_asked_for(tree, asked):
    result = build(tree, PEFT_KERNELS_BUILD=asked, CXX="false", NVCC="no-such-nvcc")
    assert (result.returncode != 0) == (asked == "1"), result.stdout
    assert "failed" in result.stdout
    assert built(tree) == set()


def test_switched_off(tree):
    result = build(tree, PEFT_KERNELS_BUILD="0")
    assert result.returncode == 0, result.stdout
    assert built(tree) == set()
    assert lines_about(result.stdout, "_c") == []


def test_nonsense_switch(tree):
    result = build(tree, PEFT_KERNELS_BUILD="yes")
    assert result.returncode != 0
    assert "expected 0 or 1" in result.stdout


@pytest.mark.skipif(not HAS_CXX, reason="no C++ compiler")
@pytest.mark.parametrize("ninja", [True, False])
def test_builds_loads_and_notices_changes(tree, ninja):
    """With ninja and without: what changed is compiled anew, through headers too with ninja; the rest is not."""
    if ninja and not shutil.which("ninja"):
        pytest.skip("no ninja on PATH")
    environment = {"NVCC": "no-such-nvcc"}
    if not ninja:
        tools = tree / "tools"
        tools.mkdir()
        for name in ("g++", "clang++", "as", "ld", "uname"):
            if found := shutil.which(name):
                (tools / name).symlink_to(found)
        environment["PATH"] = str(tools)
    (tree / "csrc" / "answer.h").write_text("constexpr int answer = 1;\n")
    (tree / "csrc" / "cpu_bindings_all.cpp").write_text(
        '#include "answer.h"\n' + STUB.format(module="_cpu", answer="answer")
    )

    def answer() -> str:
        result = build(tree, **environment)
        assert result.returncode == 0, result.stdout
        code = "from peft_kernels import _cpu; print(_cpu.answer())"
        return subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True).stdout

    assert answer() == "1\n"
    if ninja:
        assert "no work to do" in build(tree, **environment).stdout
    (tree / "csrc" / "answer.h").write_text("constexpr int answer = 2;\n")
    assert answer() == "2\n"
