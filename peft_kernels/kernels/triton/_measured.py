"""Why a fused kernel is not taken by default."""

from __future__ import annotations

from typing import Any

import torch

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch


def unproven(op: str, problem: Any) -> str | None:
    """Why the Triton kernels of `op` are not taken by default for `problem`; None where a measurement says they win."""
    if _launch.INTERPRETED:
        return _launch.INTERPRETER_IS_FOR_TESTS
    arch = _launch.architecture(torch.device(problem.device, problem.device_index))
    return tuning.unproven(arch, op, problem)
