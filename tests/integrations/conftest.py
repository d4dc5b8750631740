"""Counting which path ran; a process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("peft", reason="needs Hugging Face PEFT: pip install 'peft-kernels[peft]'")

from peft_kernels import functional
from peft_kernels.integrations import _peft_groups

OPS = [name for name in functional.__all__ if "lora" in name or name == "dora_linear"]


class Calls:
    """How often the functions of `functional` were called, and for how many layers."""

    def __init__(self) -> None:
        self.layers = 0
        self._ops: Counter[str] = Counter()

    def __call__(self) -> int:
        """The number of layers that were computed since the last time: a group counts each adapted projection."""
        layers, self.layers = self.layers, 0
        return layers

    def ops(self) -> dict[str, int]:
        """Name of each function of `functional` that was called -> how often, since the last time."""
        ops, self._ops = self._ops, Counter()
        return dict(ops)

    def watch(self, name: str, original):
        def counted(*args, **kwargs):
            self._ops[name] += 1
            several = name in ("lora_linear_group", "lora_swiglu_mlp", "multi_lora_linear_group")
            self.layers += sum(lora_A is not None for lora_A in args[2]) if several else 1
            return original(*args, **kwargs)

        return counted


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    calls = Calls()
    for name in OPS:
        monkeypatch.setattr(functional, name, calls.watch(name, getattr(functional, name)))
    return calls


@pytest.fixture
def world(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("needs a torch with distributed, in a process that has not begun to use it")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session", autouse=True)
def together_at_any_size() -> Iterator[None]:
    """Groups and whole blocks although the tests' tensors are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_peft_groups, "SMALL_ON_CPU", 0)
        yield
