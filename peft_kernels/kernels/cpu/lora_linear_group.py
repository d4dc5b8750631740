"""`lora_linear_group` on a CPU: the base products are those of PyTorch or `nf4_linear`, the low-rank half of all
projections runs in one call into csrc/lora_linear_group.cpp: one pass over x for every S, one over each dY, one over x
and dx for dA and dx.

CPU time of forward and backward over that of `composed`, base matmuls included (M=512, K=1024, r=16, float32, one
thread of an AVX2 server, PyTorch 2.13; medians of runs in turn while the machine was busy with other work): three
outputs of 1024 columns 0.95, with dropout 0.05 0.85; two of them 0.98; 1024, 256 and 256 columns 0.99 (with two threads
on an idle machine 0.95); M=256, K=384, three of 384 1.03.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels import _base
from peft_kernels.kernels.composed import lora_linear_group as composed
from peft_kernels.kernels.cpu.lora_linear import DTYPES, place
from peft_kernels.kernels.cpu.philox_dropout import dropout_arguments, row_major


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; x is on {problem.device}"
    if problem.dtype not in DTYPES or problem.adapter_dtype not in (*DTYPES, None):
        return f"no {problem.dtype} with adapters in {problem.adapter_dtype}"
    if problem.m == 0 or problem.k == 0 or 0 in problem.ns:
        return "nothing to compute"
    if max(problem.rs, default=0) > MAX_RANK:
        return f"rank {max(problem.rs)} is above {MAX_RANK}"
    return _native.why_not("_cpu")


def unproven(problem) -> str | None:
    if max(problem.rs, default=0) > 64:
        return "PyTorch's matmuls are faster above rank 64"
    if not problem.rs:
        return "there is no adapter"
    if not problem.dropout and problem.dtype == torch.float32 and problem.m * (problem.k + sum(problem.ns)) < 1 << 20:
        return "PyTorch's matmuls are as fast on so few elements without dropout"
    return None


def _adapters(columns, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, grad_As, grad_Bs) -> list[tuple]:
    """What csrc/cpu_bindings.cpp calls AdapterTuple, for the adapters that have a column in S."""
    return [
        (
            a.shape[0], output, column, _native.DTYPES[a.dtype], *place(a), *place(b), scaling,
            *dropout_arguments(p, seeds[i : i + 1] if seeds is not None and p else None),
            place(grad_a)[0], place(grad_b)[0],
        )
        for i, (column, a, b, scaling, output, p, grad_a, grad_b) in enumerate(
            zip(columns, lora_As, lora_Bs, scalings, outputs, dropout_ps, grad_As, grad_Bs, strict=True)
        )
        if column is not None
    ]  # fmt: skip


def _columns(lora_As) -> list[int]:
    """Where each adapter's part of S begins; one more at the end."""
    columns = [0]
    for a in lora_As:
        columns.append(columns[-1] + a.shape[0])
    return columns


def forward(x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask):
    ys = [_base.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    *columns, ranks = _columns(lora_As)
    s = x.new_empty(x.shape[0], ranks)
    if not lora_As:
        return ys, s
    token_mask = None if token_mask is None else token_mask.contiguous()
    rows, lora_As, lora_Bs = row_major(x), list(map(row_major, lora_As)), list(map(row_major, lora_Bs))
    no_grads = [None] * len(lora_As)
    _native.load("_cpu").lora_group_forward(
        *x.shape, _native.DTYPES[x.dtype], *place(rows), *place(s), place(token_mask)[0],
        _adapters(columns, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, no_grads, no_grads),
        [(y.shape[1], *place(y)) for y in ys], torch.get_num_threads(),
    )  # fmt: skip
    return ys, s


def backward(
    grad_ys, x, s, weights, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask, needs
):  # fmt: skip
    given = next(grad for grad in grad_ys if grad is not None)
    without_adapters = needs._replace(lora_As=(), lora_Bs=())
    grad_x, grad_weights, grad_biases, _, _ = composed.backward(
        grad_ys, x, s, weights, (), (), (), (), (), None, None, without_adapters
    )
    grad_As, grad_Bs = (
        _empty(lora_As, outputs, grad_ys, needs.lora_As),
        _empty(lora_Bs, outputs, grad_ys, needs.lora_Bs),
    )
    used = [grad_ys[output] is not None for output in outputs]
    if any(used) and (needs.x or any(needs.lora_As) or any(needs.lora_Bs)):
        columns = [column if use else None for column, use in zip(_columns(lora_As)[:-1], used, strict=True)]
        rows = [None if grad is None else row_major(grad) for grad in grad_ys]
        x = row_major(x) if any(needs.lora_As) else None
        s = row_major(s) if any(needs.lora_Bs) else None
        lora_As, lora_Bs = list(map(row_major, lora_As)), list(map(row_major, lora_Bs))
        token_mask = None if token_mask is None else token_mask.contiguous()
        _native.load("_cpu").lora_group_backward(
            given.shape[0], weights[0].shape[1], _native.DTYPES[given.dtype], *place(x), *place(s),
            place(token_mask)[0],
            _adapters(columns, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, grad_As, grad_Bs),
            [(weight.shape[0], *place(grad)) for weight, grad in zip(weights, rows, strict=True)],
            place(grad_x)[0], torch.get_num_threads(),
        )  # fmt: skip
    return grad_x, grad_weights, grad_biases, grad_As, grad_Bs


def _empty(parameters, outputs, grad_ys, needs) -> list[Tensor | None]:
    """Gradients to be written; zero where the adapter's output was not used."""
    return [
        None if not need else torch.zeros_like(p) if grad_ys[output] is None else p.new_empty(p.shape)
        for p, output, need in zip(parameters, outputs, needs, strict=True)
    ]
