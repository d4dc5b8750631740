"""Where a number came from: the digest of the sources it measures, the versions and the device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from peft_kernels.tuning import provenance

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "triton", "peft", "transformers", "bitsandbytes", "unsloth", "lorafusion")


# Ops that call others, or have no kernels of their own besides.
MADE_OF = {
    "lora_swiglu_mlp": ("lora_linear", "lora_linear_group", "gated_activation"),
    "nf4_linear": ("nf4_dequantize",),
    "nf4_lora_linear": ("nf4_linear", "nf4_dequantize", "lora_linear"),
}


def sources(op: str, backend: str, root: Path = ROOT) -> list[Path]:
    """The files whose change makes a measurement of `op` by `backend` stale: the op, its kernels with what they share,
    the tuning tables, and the same of ops that it is made of."""
    package = root / "peft_kernels"
    names = (op, *MADE_OF.get(op, ()))
    found = {path for name in names for path in provenance.sources(name, (backend,), package)}
    patterns = [(package / "tuning", "*.json")]
    if backend in ("cuda", "cpu"):
        patterns += [(root / "csrc", pattern) for name in names for pattern in (f"**/{name}*", "**/*.h", "**/*.cuh")]
    return sorted(found | {path for folder, pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def digest(op: str, backend: str, root: Path = ROOT) -> str:
    """The first 16 hex digits of the SHA-256 over the names and contents of `sources`."""
    return provenance.digest(sources(op, backend, root), root)


def versions() -> dict[str, str]:
    """Versions of Python and of those libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def results_folder() -> Path:
    """`benchmarks/results/<device>`, such as `nvidia-h200` or `cpu`."""
    return ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def machine() -> dict[str, object]:
    """What the report says of the machine. The host's name stays out: results are published."""
    facts: dict[str, object] = {"device": device_name(), "cpu_threads": torch.get_num_threads(), "versions": versions()}
    facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    facts["cores"] = os.cpu_count()
    facts["load_average"] = round(os.getloadavg()[1], 1)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["driver"] = _driver()
        facts["cuda"] = torch.version.cuda
        facts["memory_bytes"] = properties.total_memory
        facts["l2_bytes"] = properties.L2_cache_size
        facts["multiprocessors"] = properties.multi_processor_count
    return facts


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


if __name__ == "__main__":
    print(results_folder().relative_to(ROOT))
