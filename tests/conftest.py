"""What every test runs under: poisoned memory, fixed seeds, no backend left forced, and a reason for each skip."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch

from peft_kernels import dispatch
from tests.backends import Placement

# What the user of this machine has tuned is not what is tested, here and in processes that tests start.
os.environ["PEFT_KERNELS_TUNING"] = str(Path(__file__).parent / "nothing-tuned")

_PACKAGE = "peft_kernels"
_NO_GPU = "needs an NVIDIA GPU: torch.cuda.is_available() is False"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A slow test begun last keeps one worker busy while the others have nothing left to take over.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


def pytest_collection_finish() -> None:
    """Fifteen thousand tests and what they import live to the end: each look at them costs the collector seconds."""
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """An implementation that the fixture `backend` forces may decline a problem: that is a skip, with its reason."""
    try:
        return (yield)
    except RuntimeError as error:
        if "backend" in getattr(item, "fixturenames", ()) and "cannot run this problem" in str(error):
            pytest.skip(str(error))
        raise


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills fresh memory with what no correct result can contain: NaN, the largest integer, or True."""
    if tensor.numel() == 0 or tensor.is_meta or torch._C._len_torch_dispatch_stack():
        return tensor  # nothing to fill, or a fake tensor
    with torch.no_grad():
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, poisoning what the package asks for. Everybody else gets the memory as it is."""

    def allocation(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(tensor) if caller.partition(".")[0] == _PACKAGE else tensor

    return allocation


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel leaves unwritten reads as NaN instead of as whatever was there, mostly zeros."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same random numbers in each test, whatever ran before it and in whichever worker."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(0)
    torch.manual_seed(0)
    yield
    random.setstate(python_state)
    torch.set_rng_state(torch_state)


@pytest.fixture(autouse=True)
def _automatic_backend() -> Iterator[None]:
    """A test that leaves a backend forced fails itself, not the ones after it."""
    before = dispatch._forced
    yield
    leaked, dispatch._forced = dispatch._forced, before
    assert leaked == before, f"the test left use_backend({leaked!r}) in force"


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Placement]:
    """Runs the test by one implementation on one device. Parametrise it indirectly with `backends.everywhere(op)`;
    what cannot run on this machine is skipped with its own reason."""
    placement: Placement = request.param
    placement.skip_unless_runnable()
    with dispatch.use_backend(placement.name):
        yield placement
