"""The machine code in the installed `_cuda`: for which GPUs, with which resources and accesses. Needs no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

KERNELS = ("philox_dropout_kernel", "splitk_reduce_kernel")


@cache
def _cuobjdump() -> str:
    """Triton's wheel carries one; a CUDA toolkit may."""
    spec = find_spec("triton")
    places = [Path(p) / "backends" / "nvidia" / "bin" for p in spec.submodule_search_locations] if spec else []
    for found in (*(str(p / "cuobjdump") for p in places if (p / "cuobjdump").exists()), shutil.which("cuobjdump")):
        if found:
            return found
    pytest.skip("no cuobjdump")


@cache
def dump(path: str, *options: str) -> str:
    return subprocess.run([_cuobjdump(), *options, path], capture_output=True, text=True, check=True).stdout


@cache
def functions(path: str, source: str) -> list[tuple[str, str, str]]:
    """(architecture, mangled name, SASS) of each function of `csrc/<source>.cu`. Only its cubins are disassembled, out
    of the module's: of all of them at once that takes longer than any test."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        command = [_cuobjdump(), "-xelf", f"{source}.sm_", path]
        subprocess.run(command, capture_output=True, check=True, cwd=folder)
        for cubin in sorted(Path(folder).iterdir()):
            text = subprocess.run([_cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
            arch = cubin.suffixes[-2].removeprefix(".")
            parts = re.split(r"\n\s*Function : ", text)[1:]
            found += [(arch, function.partition("\n")[0].strip(), function) for function in parts]
    return found


def archs(cuda) -> list[str]:
    return [arch.removesuffix("+PTX") for arch in cuda.build_info()["archs"].split(";")]


def test_every_architecture_that_it_names(cuda):
    elf = dump(cuda.__file__, "--list-elf")
    for source in ("philox_dropout", "splitk_reduce"):
        assert set(re.findall(rf"{source}\.sm_(\w+)\.cubin", elf)) == set(archs(cuda))
    newest = cuda.build_info()["archs"].split(";")[-1]
    if newest.endswith("+PTX"):
        assert f"sm_{newest.removesuffix('+PTX')}.ptx" in dump(cuda.__file__, "--list-ptx")


def test_no_spills_and_few_registers(cuda):
    """Both kernels are bound by memory: they need every thread that a multiprocessor can hold, 32 registers each."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", dump(cuda.__file__, "-res-usage"))
    usage = [row for row in usage if any(kernel in row[0] for kernel in KERNELS)]
    assert len(usage) == 12 * len(archs(cuda))
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= (32 if "philox" in name else 64), name


def test_wide_accesses(cuda):
    both = functions(cuda.__file__, "philox_dropout") + functions(cuda.__file__, "splitk_reduce")
    wide = [(name, sass) for _, name, sass in both if "philox_dropout_kernel" in name and "Lb1E" in name]
    wide += [(name, sass) for _, name, sass in both if "splitk_reduce_kernel" in name and "Li4E" in name]
    assert len(wide) == 6 * len(archs(cuda))
    for name, sass in wide:
        assert re.search(r"LDG\.E(\.\w+)*\.128", sass), name


def test_no_cuda_runtime_shows(cuda):
    """The runtime is linked in and hidden: torch's own, of whatever version, must neither be needed nor be replaced."""
    if not shutil.which("nm"):
        pytest.skip("no nm")
    symbols = subprocess.run(["nm", "-D", cuda.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search(r" [UTW] _*cu(da|[A-Z])", symbols)
