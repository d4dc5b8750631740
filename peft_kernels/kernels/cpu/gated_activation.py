"""`gated_activation` by csrc/gated_activation.cpp: one pass each way, in float32 and rounded once.

Time over that of `composed` (512 x 2816, one thread of an AVX2 server, PyTorch 2.13; the machine was busy with other
work, and each ratio is the median of pairs that ran one right after the other, in CPU time):

    forward, backward    float32        float16        bfloat16
    silu                 0.72, 0.37     0.80, 0.44     1.12, 0.71
    gelu                 0.99, 0.45     0.78, 0.36     0.93, 0.52
    gelu_tanh            0.30, 0.18     0.36, 0.21     0.53, 0.35
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.kernels.cpu.lora_linear import DTYPES, place
from peft_kernels.kernels.cpu.philox_dropout import row_major

_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}  # csrc/cpu_kernels.h


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; gate is on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"no {problem.dtype}"
    return _native.why_not("_cpu")


def unproven(problem) -> str | None:
    if problem.m * problem.n < 16384:
        return "PyTorch's kernels are as fast on few elements"
    return None


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate, up = row_major(gate), row_major(up)
    out = torch.empty(gate.shape, dtype=gate.dtype)
    _native.load("_cpu").gated_forward(
        *gate.shape, _native.DTYPES[gate.dtype], _ACTIVATIONS[activation], *place(gate), *place(up), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def backward(grad_h: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad_h, gate, up = row_major(grad_h), row_major(gate), row_major(up)
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    _native.load("_cpu").gated_backward(
        *gate.shape, _native.DTYPES[gate.dtype], _ACTIVATIONS[activation], *place(grad_h), *place(gate), *place(up),
        grad_gate.data_ptr(), grad_up.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_gate, grad_up
