"""`sparse_delta_linear` on a CPU: the product with W stays in PyTorch, what Δ adds and the gradients of the values are
csrc/sparse_delta_linear.cpp's. Over 16 bits, where a product that is rounded before Δ is added would be rounded twice,
that is the gradients of the values alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.kernels import _base
from peft_kernels.kernels.composed import sparse_delta_linear as composed
from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.cpu.lora_linear import DTYPES, place
from peft_kernels.kernels.cpu.philox_dropout import row_major


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; x is on {problem.device}"
    if problem.dtype not in DTYPES or (problem.values_dtype not in DTYPES and problem.deltas):
        return f"no {problem.dtype} with values in {problem.values_dtype}"
    return _native.why_not("_cpu")


def unproven(problem) -> str | None:
    if problem.nnz * 3 > problem.n * problem.k:
        return "pieces of W + Δ are faster where more than about a quarter of the weights is chosen"
    return None


def _alone(x: Tensor, weight) -> bool:
    """Whether the product with W is what `_base` computes, and Δ's comes on top."""
    return x.dtype == torch.float32 and not (isinstance(weight, Tensor) and weight.dtype != x.dtype)


def _tuples(deltas, parts, values, grads, m: int) -> list[tuple]:
    """What csrc/cpu_bindings_sparse_delta.cpp calls DeltaTuples: addresses in tensors that the caller holds."""
    found = []
    for rows, number in parts:
        flat = deltas[number].positions.flat
        found.append((
            flat.data_ptr(), flat.dtype == torch.int64, flat.numel(), _address(values[number]), _address(rows),
            m if rows is None else rows.numel(), _address(grads[number]),
        ))  # fmt: skip
    return found


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _chosen(ids: Tensor | None, deltas) -> list[tuple[Tensor | None, int]]:
    """(numbers of the rows, None for all; that of their delta) for every delta that some row chose."""
    if ids is None:
        return [(None, 0)]
    order = torch.argsort(ids, stable=True)
    numbers, counts = torch.unique_consecutive(ids[order], return_counts=True)
    pairs = zip(order.split(counts.tolist()), numbers.tolist(), strict=True)
    return [(rows, number) for rows, number in pairs if 0 <= number < len(deltas)]


def _floats(deltas) -> list[Tensor]:
    return [delta.values.to(torch.float32).contiguous() for delta in deltas]


def forward(x, weight, deltas, ids, bias):
    if not _alone(x, weight):
        return composed.forward(x, weight, deltas, ids, bias)
    y, x = _base.linear(x, weight, bias), row_major(x)
    parts, values = _chosen(ids, deltas), _floats(deltas)
    tuples = _tuples(deltas, parts, values, [None] * len(deltas), x.shape[0])
    _native.load("_cpu").sparse_delta_forward(
        *weight.shape, tuples, *place(x), y.data_ptr(), torch.get_num_threads()
    )  # fmt: skip
    return y


def backward(grad_y, x, weight, deltas, ids, needs):
    need_x, need_weight, need_bias, need_values = needs
    grad_x, alone = None, _alone(grad_y, weight)
    if need_x and alone:
        grad_x = _base.grad_input(grad_y, weight)
    elif need_x:
        grad_x = composed.grad_input(grad_y, weight, deltas, ids, composed.parts(ids, deltas))
    grads = [
        torch.zeros(delta.values.shape, dtype=torch.float32) if need else None
        for delta, need in zip(deltas, need_values, strict=True)
    ]
    if any(need_values) or (need_x and alone):
        held, rows = row_major(grad_y), row_major(x) if any(need_values) else None
        parts, values = _chosen(ids, deltas), _floats(deltas)
        _native.load("_cpu").sparse_delta_backward(
            *weight.shape, _tuples(deltas, parts, values, grads, grad_y.shape[0]), _native.DTYPES[grad_y.dtype],
            *place(held), *place(rows), _address(grad_x if alone else None), torch.get_num_threads(),
        )  # fmt: skip
    return (
        grad_x,
        composed.grad_weight(grad_y, x, weight) if need_weight else None,
        sum_rows(grad_y) if need_bias else None,
        [None if grad is None else grad.to(delta.values.dtype) for grad, delta in zip(grads, deltas, strict=True)],
    )
