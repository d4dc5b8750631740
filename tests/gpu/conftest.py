"""What the tests of this folder share. Each is marked `gpu`: without an NVIDIA GPU it is skipped with the reason."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.backends import everywhere


def on_gpu(op: str):
    """Every implementation of `op` on the GPU, as parameters of the fixture `backend`."""
    return [parameter for parameter in everywhere(op) if parameter.values[0].device == "cuda"]


@pytest.fixture
def needs_memory() -> Iterator[Callable[[int], None]]:
    """`needs_memory(bytes)` skips the test where the GPU has less left, and frees afterwards what the test held."""

    def need(wanted: int) -> None:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < wanted:
            pytest.skip(f"needs {wanted / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} GiB are free")

    yield need
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def no_host_sync() -> Iterator[Callable[[], None]]:
    """After `no_host_sync()` any call that makes the host wait for the GPU raises, until the test ends."""
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(before)
