"""`mask_apply` on a CPU: csrc/mask.cpp, one pass over W, bound by memory."""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.kernels.cpu.lora_linear import DTYPES, place
from peft_kernels.kernels.cpu.philox_dropout import row_major


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; the weight is on {problem.device}"
    if problem.dtype != problem.out_dtype and not {problem.dtype, problem.out_dtype} <= set(DTYPES):
        return f"no {problem.dtype} to {problem.out_dtype}"
    return _native.why_not("_cpu")


def forward(weight, words, dtype):
    out = torch.empty(weight.shape, dtype=dtype)
    into(out, weight, words)
    return out


def forward_(weight, words):
    if row_major(weight) is weight:
        into(weight, weight, words)
    else:
        weight.copy_(forward(weight, words, weight.dtype))


def into(out, weight, words):
    """out [N, K], of adjacent columns, = W ⊙ M in its dtype; it may be the weight."""
    weight, words = row_major(weight), row_major(words)
    _native.load("_cpu").mask_apply(
        *weight.shape, _native.DTYPES[weight.dtype], *place(weight), *place(words), _native.DTYPES[out.dtype],
        *place(out), torch.get_num_threads(),
    )  # fmt: skip
