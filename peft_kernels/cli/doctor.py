"""`peft-kernels doctor`: what this machine has, what runs on it and why, and whether it computes the right numbers."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

import peft_kernels
from peft_kernels import _native, selfcheck
from peft_kernels._table import table
from peft_kernels.cli.errors import UsageError

SUMMARY = "show GPU, versions and implementations, and check each against float64"

LIBRARIES = ("triton", "safetensors", "peft", "transformers", "accelerate", "bitsandbytes")
TIMEOUT_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the findings to this file")


def run(options: argparse.Namespace) -> int:
    """Returns 0 only if every implementation that can run here agrees with float64 by the accuracy rule.

    Raises:
        UsageError: the JSON file cannot be written.
    """
    facts = environment()
    print(table(facts.items(), ("what", "found")))
    outcomes = selfcheck.check()
    print()
    print(table(map(_row, outcomes), ("op", "device", "implementation", "state", "detail")))
    failures = [outcome for outcome in outcomes if outcome.failure is not None]
    print()
    checked = sum(outcome.checked for outcome in outcomes)
    print(
        f"{checked} problems computed, {len(failures)} implementations wrong: {'FAILED' if failures else 'all agree'}"
    )
    if options.json:
        findings = {"ok": not failures, "environment": facts, "implementations": [asdict(o) for o in outcomes]}
        try:
            Path(options.json).write_text(json.dumps(findings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {options.json}: {error.strerror}") from None
    return 1 if failures else 0


def _row(outcome: selfcheck.Outcome) -> tuple[str, ...]:
    if outcome.failure is not None:
        state, detail = "WRONG", outcome.failure
    elif outcome.unavailable is not None:
        state, detail = "not here", outcome.unavailable
    else:
        state = "ok" if outcome.objection is None else "ok, not default"
        detail = f"{outcome.checked} problems, error at most {outcome.ratio:.2f} of eager PyTorch's"
        detail += "" if outcome.objection is None else f"; {outcome.objection}"
    return outcome.op, outcome.device, outcome.backend, state, detail


def environment() -> dict[str, str]:
    """What the library depends on, by name; a missing thing says that it is missing."""
    facts = {
        "peft_kernels": peft_kernels.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__} ({_torch_build()})",
        "GPU": _gpus(),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "no nvidia-smi",
        "nvcc": _nvcc(),
    }
    facts |= {f"csrc {status.part}": _extension(status) for status in _native.status()}
    facts |= {name: _version(name) for name in LIBRARIES}
    forced = os.environ.get(peft_kernels.dispatch.BACKEND_VARIABLE)
    return facts | ({peft_kernels.dispatch.BACKEND_VARIABLE: forced} if forced else {})


def _torch_build() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that PyTorch can use"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return "; ".join(f"{d.name}, sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices)


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    path = shutil.which("nvcc") or shutil.which(str(Path(home, "bin", "nvcc")))
    if path is None:
        return "not found"
    release = _first_line(path, "--version", containing="release")
    return f"{release.strip()} ({path})" if release else f"{path} does not answer"


def _extension(status: _native.Status) -> str:
    if status.info is None:
        return status.reason or "not loaded"
    return "loaded: " + ", ".join(f"{key} {value}" for key, value in status.info.items())


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _first_line(*command: str, containing: str = "") -> str | None:
    """The first line of a program's output that holds `containing`; None when it is missing, fails or hangs."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line for line in result.stdout.splitlines() if containing in line and line.strip()), None)
