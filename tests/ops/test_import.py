"""`import peft_kernels`: light, quiet, and possible without a GPU, Triton, transformers or PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import peft_kernels

USE = """
    import torch, peft_kernels
    layer = peft_kernels.FusedLoRALinear(16, 8, r=2, lora_dropout=0.1)
    layer(torch.ones(3, 16)).sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0
    print(peft_kernels.explain("lora_linear", torch.ones(3, 16), layer.weight, layer.lora_A, layer.lora_B))
"""

# Imports the library and reports what that did to the process: four times, each in a fork of one that has torch only.
# The first of them compiles, as an installation does beforehand: where no bytecode may be written beside the sources,
# compiling took half of the time.
OBSERVE = """
    import gc, json, os, sys, threading, time
    import torch
    sys.pycache_prefix, sys.dont_write_bytecode = os.environ["BYTECODE"], False
    gc.collect()  # of the objects of torch, which the allocations of whatever comes next would set off

    def observe():
        before, threads, events = set(sys.modules), threading.active_count(), []

        def audit(event, arguments):
            kind = event.split(".")[0]
            system = event.startswith(("os.system", "os.posix", "os.fork"))
            starts = system or kind in ("subprocess", "socket", "urllib")
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if starts or writes:
                events.append(f"{event} {arguments}")

        sys.addaudithook(audit)
        start = time.process_time()
        import peft_kernels
        seconds = time.process_time() - start
        print(json.dumps({
            "seconds": seconds,
            "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
            "events": events,
            "threads": threading.active_count() - threads,
            "cuda": torch.cuda.is_initialized(),
            "files": sorted(os.listdir(os.environ["HOME"])),
        }), flush=True)

    for _ in range(4):
        child = os.fork()
        if not child:
            observe()
            os._exit(0)
        os.waitpid(child, 0)
"""


def run(code: str, **options) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def observations(tmp_path_factory) -> list[dict]:
    """Three processes with an empty home directory as their working directory, and the library's bytecode at hand."""
    home, bytecode = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("bytecode")
    path = str(Path(peft_kernels.__file__).parents[1])
    environment = {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PYTHONPATH": path, "BYTECODE": str(bytecode)}
    _compiles, *observed = [json.loads(line) for line in run(OBSERVE, env=environment, cwd=home).splitlines()]
    assert len(observed) == 3
    return observed


@pytest.mark.parametrize(
    "absent", [("triton",), ("transformers", "peft", "bitsandbytes", "accelerate", "numpy")], ids=str
)
def test_works_without(absent):
    """A module set to None in sys.modules raises ImportError on import, as one that is not installed. Nor is a GPU
    visible in these processes."""
    block = f"import os, sys; os.environ['CUDA_VISIBLE_DEVICES'] = ''\nfor n in {absent!r}: sys.modules[n] = None\n"
    assert run(block + textwrap.dedent(USE)).startswith(("lora_linear: composed", "lora_linear: cpu"))


def test_import_time(observations):
    """Under 0.3 s of processor time on top of `import torch`; the least of three, as what else runs only adds to it."""
    assert min(observation["seconds"] for observation in observations) < 0.3


def test_optional_packages_are_not_imported(observations):
    optional = {
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "matplotlib",
        "rich",
        "tqdm",
        "triton",
        "pybind11",
    }
    assert not optional & set(observations[0]["modules"])


def test_import_starts_nothing(observations):
    """No subprocess, no socket, no file written, no thread and no CUDA context."""
    observation = observations[0]
    assert observation["events"] == []
    assert observation["files"] == []
    assert observation["threads"] == 0
    assert not observation["cuda"]


def test_public_names():
    """`__all__` is sorted and complete, and each name explains itself."""
    public = {name for name, value in vars(peft_kernels).items() if callable(value) and not name.startswith("_")}
    assert public <= set(peft_kernels.__all__)
    assert peft_kernels.__all__ == sorted(peft_kernels.__all__)
    assert all(getattr(peft_kernels, name).__doc__ for name in peft_kernels.__all__)
