"""`multi_lora_linear` on a CPU: the base products are those of PyTorch or `nf4_linear`, the low-rank half of every row
and projection runs in one call into csrc/multi_lora_linear.cpp, which reads rows and adapters where they are.

What the low-rank half costs as a part of what the `composed` form of it costs (one thread of an AVX2 server, PyTorch
2.13 with MKL; CPU time of the fastest of several runs in turn, base products left out, while the machine was busy with
other work):

    rows x K x N         adapters     r   dtypes of x, adapters   forward   backward
    512 x 1024 x 1024           8     4   float32                    0.33       0.30
    512 x 1024 x 1024           8    16   float32                    0.47       0.49
    the same with dropout 0.1                                        0.45       0.43
    512 x 1024 x 1024           8    64   float32                    0.62       0.76
    512 x 1024 x 1024           8   128   float32                    0.77       0.88
    512 x 1024 x 1024           8   512   float32                    0.97       1.48
    512 x 1024 x 1024           1    16   float32                    0.92       0.64
    512 x 1024 x 1024           1   128   float32                    1.05       1.04
    512 x 1024 x 1024          64    16   float32                    0.31       0.93
    64 x 1024 x 1024           64    16   float32                    0.47       0.98
    64 x 1024 x 1024            8   128   float32                    0.54       1.08
    64 x 384 x 384              8     8   float32                    0.21       0.28
    4 x 64 x 64                 4     8   float32                    0.34       0.42
    512 x 1024 x 1024           8    16   bfloat16, float32          0.08       0.11
    64 x 1024 x 1024           64    16   bfloat16                   0.29       1.09

A row's update has the same bits whatever its neighbours are. The base product's bits are PyTorch's: on that machine a
row's were the same from 4 rows on, and others with fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels import _base
from peft_kernels.kernels.composed import multi_lora_linear as composed
from peft_kernels.kernels.cpu.lora_linear import DTYPES, place
from peft_kernels.kernels.cpu.philox_dropout import row_major
from peft_kernels.kernels.reference.philox_dropout import scale, threshold


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; x is on {problem.device}"
    if problem.dtype not in DTYPES or problem.adapter_dtype not in (*DTYPES, None):
        return f"no {problem.dtype} with adapters in {problem.adapter_dtype}"
    if problem.m == 0 or problem.k == 0 or 0 in problem.ns or problem.per_row == 0:
        return "nothing to compute"
    if max(problem.widths) > MAX_RANK:
        return f"rank {max(problem.widths)} is above {MAX_RANK}"
    return _native.why_not("_cpu")


def unproven(problem) -> str | None:
    if problem.train and problem.dtype == torch.float32 and not problem.dropout and max(problem.widths) > 128:
        return "PyTorch's matmuls are faster in training above rank 128"
    return None


def _batch(x: Tensor | None, m: int, k: int, dtype, ids, mix, adapters, table, dropout_ps, seeds) -> tuple:
    """What csrc/cpu_bindings_multi_lora.cpp calls PEFT_KERNELS_BATCH_PARAMETERS, less the projections."""
    made: dict[float, tuple[int, float]] = {p: (threshold(p), scale(p)) for p in set(dropout_ps)}
    dropouts = [made[p] for p in dropout_ps] if seeds is not None else []
    return (
        m, k, _native.DTYPES[dtype], *place(x), ids.data_ptr(), ids.shape[1], place(mix)[0], table.rows.data_ptr(),
        *table.rows.shape[:2], _native.DTYPES[adapters.dtype], dropouts,
    )  # fmt: skip


def _seed(seeds: Tensor | None, output: int) -> int:
    return 0 if seeds is None else seeds.data_ptr() + output * seeds.stride(0) * seeds.element_size()


def forward(x, weights, biases, adapters, ids, mix, dropout_ps, seeds, keep_s):
    ys = [_base.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    ss = [x.new_zeros(*ids.shape, width) for width in adapters.widths] if keep_s else []
    if adapters.dtype is None:
        return ys, ss
    table, rows = adapters.table(x.device), row_major(x)
    projections = [
        (table.layers[j], y.shape[1], adapters.widths[j], *place(y), ss[j].data_ptr() if keep_s else 0, _seed(seeds, j))
        for j, y in enumerate(ys)
    ]
    _native.load("_cpu").multi_lora_forward(
        *_batch(rows, *x.shape, x.dtype, ids, mix, adapters, table, dropout_ps, seeds), projections,
        torch.get_num_threads(),
    )  # fmt: skip
    return ys, ss


def backward(grad_ys, x, ss, weights, adapters, ids, mix, dropout_ps, seeds, needs):
    given = next(grad for grad in grad_ys if grad is not None)
    if not ss and (needs.adapter_weights or any(needs.lora_Bs)):
        raise ValueError("multi_lora_linear: ss is empty, but wanted gradients need S; expected that of each layer")
    grad_x, grad_weights, grad_biases = composed.base_gradients(grad_ys, x, weights, needs)
    grad_mix = given.new_zeros(ids.shape, dtype=torch.float32) if needs.adapter_weights else None
    used = [output for output, grad in enumerate(grad_ys) if grad is not None]
    grad_As = _empty(adapters.lora_As, adapters.outputs, used, needs.lora_As)
    grad_Bs = _empty(adapters.lora_Bs, adapters.outputs, used, needs.lora_Bs)
    wanted = [
        (used.index(output), adapter, place(grad_a)[0], place(grad_b)[0])
        for output, adapter, grad_a, grad_b in zip(adapters.outputs, adapters.adapters, grad_As, grad_Bs, strict=False)
        if output in used and (grad_a is not None or grad_b is not None)
    ]
    if adapters.dtype is not None and (grad_x is not None or grad_mix is not None or wanted):
        table, rows = adapters.table(given.device), row_major(x) if any(needs.lora_As) else None
        held = [row_major(grad_ys[j]) for j in used]
        projections = [
            (table.layers[j], weights[j].shape[0], adapters.widths[j], *place(grad), ss[j].data_ptr() if ss else 0,
             _seed(seeds, j))
            for j, grad in zip(used, held, strict=True)
        ]  # fmt: skip
        m, k = given.shape[0], weights[0].shape[1]
        _native.load("_cpu").multi_lora_backward(
            *_batch(rows, m, k, given.dtype, ids, mix, adapters, table, dropout_ps, seeds), projections,
            place(grad_x)[0], place(grad_mix)[0], wanted, torch.get_num_threads(),
        )  # fmt: skip
    return grad_x, grad_mix, grad_weights, grad_biases, grad_As, grad_Bs


def _empty(parameters, outputs, used, needs) -> list[Tensor | None]:
    """Gradients to be written; zero where the adapter's projection was not used."""
    return [
        None if not need else p.new_empty(p.shape) if output in used else torch.zeros_like(p)
        for p, output, need in zip(parameters, outputs, needs, strict=False)
    ]
