"""Builds the optional native parts on Linux: `peft_kernels._cpu` with a C++ compiler, `peft_kernels._cuda` with nvcc.

PEFT_KERNELS_BUILD       1: a missing tool or a failing compile is an error. 0: build nothing. Unset: build what can be
                         built, one line for what cannot; the package works without either part.
PEFT_KERNELS_CUDA_ARCHS  GPU architectures, such as "80;90a;100+PTX" (+PTX: also for GPUs newer than that one).
NVCC, CXX                the compilers, instead of those on PATH.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

MODE = os.environ.get("PEFT_KERNELS_BUILD", "")
ARCHS = os.environ.get("PEFT_KERNELS_CUDA_ARCHS", "80;90a;100+PTX")
CSRC = Path("csrc")
# No maybe-uninitialized: gcc 12 reports its own AVX-512 intrinsics.
# What hands arguments over takes half of the time to compile without being optimised much.
BINDINGS_FLAG = "-O1"
CXX_FLAGS = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized"
)
NVCC_FLAGS = "-O3 -std=c++17 -lineinfo -Xcompiler=-fPIC,-fvisibility=hidden"


def find(variable: str, *names: str) -> str:
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    for name in (os.environ[variable],) if variable in os.environ else names:
        if found := shutil.which(name, path=path):
            return found
    raise CompileError(f"no {variable}: {os.environ.get(variable) or ' or '.join(names)} not found")


def gencode() -> list[str]:
    flags = []
    for arch in ARCHS.split(";"):
        number = arch.removesuffix("+PTX")
        code = f"sm_{number}" if number == arch else f"[sm_{number},compute_{number}]"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def includes() -> list[str]:
    try:
        import pybind11
    except ImportError as error:
        raise CompileError(f"pybind11 is not installed: {error}") from error
    return [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]


def recipe(name: str) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Sources, the compiler command for each suffix, and the linker command."""
    cxx = find("CXX", "g++", "clang++", "c++")
    compile_cxx = [cxx, *CXX_FLAGS.split(), *includes()]
    if name == "_cpu":
        # OpenMP is compiled in but not linked: peft_kernels/_native.py binds it to the runtime that torch has loaded,
        # since a second runtime would bring a second pool of threads. What takes longest to compile begins first.
        sources = ["multi_lora_linear.cpp", "cpu_bindings_all.cpp", "nf4_linear.cpp", "masked_linear.cpp"]
        sources += ["philox_dropout.cpp", "lora_linear.cpp", "lora_linear_group.cpp", "dora_linear.cpp"]
        sources += ["gated_activation.cpp", "nf4_dequantize.cpp", "nf4_quantize.cpp", "mask.cpp", "block_linear.cpp"]
        sources += ["sparse_delta_linear.cpp", "csr_linear.cpp", "select.cpp"]
        return sources, {".cpp": [*compile_cxx, "-fopenmp"]}, [cxx, "-shared"]
    nvcc = find("NVCC", "nvcc")
    commands = {
        ".cpp": [*compile_cxx, f'-DPEFT_KERNELS_CUDA_ARCHS="{ARCHS}"'],
        ".cu": [nvcc, *NVCC_FLAGS.split(), f"-ccbin={cxx}", *gencode()],
    }
    # The runtime is linked in and its symbols hidden, so that the module loads beside any torch and without a driver.
    link = [nvcc, "-shared", "-cudart=static", f"-ccbin={cxx}", "-Xlinker=--exclude-libs,ALL", *gencode()]
    sources = ["nf4_linear.cu", "multi_lora_linear.cu", "bitmap_linear.cu", "csr_linear.cu"]
    sources += ["cuda_bindings_all.cpp", "philox_dropout.cu", "splitk_reduce.cu", "lora_down.cu"]
    return sources, commands, link


def run(command: list[str]) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    sys.stdout.write(result.stdout)
    if result.returncode:
        raise CompileError(f"{command[0]} failed with exit status {result.returncode}")


def build(name: str, target: Path, folder: Path) -> None:
    sources, commands, link = recipe(name)
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    objects = {folder / f"{source}.o": CSRC / source for source in sources}
    more = {source: [BINDINGS_FLAG] if "bindings" in source.name else [] for source in objects.values()}
    compiles = [
        [*commands[source.suffix], *more[source], "-MMD", "-MF", f"{made}.d", "-c", str(source), "-o", str(made)]
        for made, source in objects.items()
    ]
    if not shutil.which("ninja"):
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, compiles))
        return run([*link, *map(str, objects), "-o", str(target)])
    rules = [
        f"builddir = {folder}",
        "rule compile",
        "  command = $command",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
    ]
    rules += ["rule link", "  command = $command", "  description = link $out"]
    for command, (made, source) in zip(compiles, objects.items(), strict=True):
        rules += [f"build {made}: compile {source}", f"  command = {shlex.join(command).replace('$', '$$')}"]
    command = shlex.join([*link, *map(str, objects), "-o", str(target)]).replace("$", "$$")
    quoted = re.sub(r"([$: ])", r"$\1", str(target))
    rules += [f"build {quoted}: link {' '.join(map(str, objects))}", f"  command = {command}", ""]
    (folder / "build.ninja").write_text("\n".join(rules))
    run(["ninja", "-f", str(folder / "build.ninja")])


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        folder = Path("build", f"native-{sysconfig.get_config_var('SOABI')}", name)
        build(name, Path(self.get_ext_fullpath(ext.name)), folder)


if MODE not in ("", "0", "1"):
    raise SystemExit(f"PEFT_KERNELS_BUILD is {MODE!r}; expected 0 or 1")
parts = ["_cpu", "_cuda"] if MODE == "1" or (MODE == "" and sys.platform == "linux") else []
setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[Extension(f"peft_kernels.{part}", sources=[], optional=MODE != "1") for part in parts],
)
