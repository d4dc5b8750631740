"""Where a measurement came from, and whether it still holds: GPU, versions, and a digest of the kernels' sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
UNKNOWN_DRIVER = "unknown"


@dataclass(frozen=True)
class Provenance:
    """The GPU's name, versions, and `digest` of the op's sources. The driver is recorded, but does not make stale."""

    gpu: str
    driver: str
    torch: str
    triton: str
    digest: str

    def stale(self, here: Provenance) -> str | None:
        """Why a measurement of this provenance says nothing `here`, or None."""
        if self.gpu != here.gpu:
            return f"it was made on {self.gpu}, this is {here.gpu}"
        return self.outdated(here)

    def outdated(self, here: Provenance) -> str | None:
        """As `stale`, the GPU's model left out."""
        if self.digest != here.digest:
            return "the kernels have changed since"
        for name in ("torch", "triton"):
            then, now = getattr(self, name), getattr(here, name)
            if _release(then) != _release(now):
                return f"it was made with {name} {then}, this is {now}"
        return None

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def _release(version: str) -> list[str]:
    """Major and minor number: a patch release does not change speeds."""
    return version.split("+")[0].split(".")[:2]


def sources(op: str, backends: Iterable[str], package: Path = PACKAGE) -> list[Path]:
    """The Python files whose change makes a measurement of `op` by these implementations stale: the op, and each one's
    kernels with all that they share."""
    patterns = [(package / "ops", f"{op}.py")]
    for backend in backends:
        patterns += [(package / "kernels" / backend, f"{op}*.py"), (package / "kernels" / backend, "_*.py")]
    return sorted({path for folder, pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def digest(paths: Iterable[Path], root: Path) -> str:
    """The first 16 hex digits of the SHA-256 over the files' contents and their names below `root`."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.relative_to(root).as_posix().encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


@functools.cache
def here(op: str, rival: str, index: int | None) -> Provenance:
    """The provenance of a measurement of `op` against `rival`, made now on the GPU with this index (None: no GPU)."""
    gpu = "cpu" if index is None else torch.cuda.get_device_name(index)
    driver = UNKNOWN_DRIVER if index is None else _driver()
    return Provenance(gpu, driver, torch.__version__, _triton(), digest(sources(op, ("triton", rival)), PACKAGE))


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN_DRIVER
