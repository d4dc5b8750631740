"""Which implementations of an op can run here: `everywhere(op)` gives the parameters of the fixture `backend`."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch

from peft_kernels import dispatch
from peft_kernels.formats.mask import full
from tests.problems import PLAIN, Problem
from tests.problems.nf4 import part_of

# The Triton kernels run on CPU tensors too, in Triton's interpreter: slowly, so tests/triton has a set of its own.
_INTERPRETED = "triton"


def probe(op: str, device: str) -> Any:
    """The op's Problem for arguments that every implementation takes, unless the device itself is the obstacle."""
    if op in PLAIN:
        return PLAIN[op](device).dispatched()
    x, square = torch.zeros(32, 64, device=device), torch.zeros(64, 64, device=device)
    arguments = {
        "nf4_dequantize": (part_of("whole", 64, 64, device=device),),
        "nf4_quantize": (square,),
        "mask_pack": (square,),
        "mask_unpack": (full(64, 64, device=device),),
        "mask_apply": (square, full(64, 64, device=device)),
        "dora_weight_norm": (square, torch.zeros(16, 64, device=device), torch.zeros(64, 16, device=device)),
        "philox_dropout": (x, 0.5),
        "splitk_reduce": (x,),
    }
    return importlib.import_module(f"peft_kernels.ops.{op}").problem(*arguments[op])


class Placement(NamedTuple):
    """An implementation on a device."""

    op: str
    name: str
    device: str

    def objection(self) -> str | None:
        return dispatch.objection(self.op, self.name, probe(self.op, self.device), forced=True)

    def skip_unless_runnable(self, problem: Any = None) -> None:
        """Skips the test when the implementation cannot compute `problem` (None: any at all), saying why."""
        reason = dispatch.objection(self.op, self.name, problem or probe(self.op, self.device), forced=True)
        if reason is not None:
            pytest.skip(f"{self.op} by {self.name} on {self.device}: {reason}")

    def skip_unless_lora_linear(self, problem: Problem) -> None:
        self.skip_unless_runnable(problem.dispatched())


def on_cpu(op: str) -> list[str]:
    """Names of the implementations of `op` that take CPU tensors on this machine."""
    names = [name for name in dispatch.ORDER[op] if name != _INTERPRETED]
    return [name for name in names if Placement(op, name, "cpu").objection() is None]


def across(*ops: str) -> list[Any]:
    """Parameters for the fixture `backend` over several ops: `backend.op` says which."""
    return [pytest.param(*p.values, id=f"{op}-{p.id}", marks=p.marks) for op in ops for p in everywhere(op)]


def everywhere(op: str) -> list[Any]:
    """Parameters for the fixture `backend`: what runs on this CPU, and every implementation on a GPU (one skipped
    parameter stands for them where there is none)."""
    here = [pytest.param(Placement(op, name, "cpu"), id=name) for name in on_cpu(op)]
    names = [name for name in dispatch.ORDER[op] if name != "cpu"] if torch.cuda.is_available() else ["reference"]
    there = [pytest.param(Placement(op, name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu) for name in names]
    return here + there
