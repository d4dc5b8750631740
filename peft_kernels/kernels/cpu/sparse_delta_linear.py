"""`sparse_delta_linear` on a CPU.

Few chosen weights over float32: the product with W stays in PyTorch, what Δ adds and the gradients of the values are
csrc/sparse_delta_linear.cpp's. Many, or 16 bits, where a product that is rounded before Δ is added would be rounded
twice: csrc/masked_linear.cpp, which adds Δ to each row of W in the L2 cache and gathers dYᵀ x at the places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.positions import STRIP
from peft_kernels.formats.sparse_delta import SparseDelta
from peft_kernels.kernels import _base
from peft_kernels.kernels.composed import sparse_delta_linear as composed
from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.cpu import masked_linear
from peft_kernels.kernels.cpu.lora_linear import DTYPES, place
from peft_kernels.kernels.cpu.nf4_linear import matrix_instructions
from peft_kernels.kernels.cpu.philox_dropout import row_major

# CPU time of a step of 1024 x 4096 weights in float32, place by place and by csrc/masked_linear.cpp, ms of one thread
# of a busy AVX2 server (the fastest of 7): 16 rows, 20 % chosen 21 and 39, 40 % 58 and 55; 64 rows, 20 % 46 and 61,
# 40 % 127 and 63; 256 rows, 10 % 116 and 127, 20 % 142 and 135, 40 % 500 and 134.
MANY, MANY_OF_LONG, LONG = 1 / 3, 1 / 7, 128


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; x is on {problem.device}"
    if problem.dtype not in DTYPES or (problem.values_dtype not in DTYPES and problem.deltas):
        return f"no {problem.dtype} with values in {problem.values_dtype}"
    if problem.weight_dtype not in (None, *DTYPES):
        return f"no weight in {problem.weight_dtype}"
    return _native.why_not("_cpu")


def _alone(x: Tensor, weight) -> bool:
    """Whether the product with W is what `_base` computes, and Δ's may come on top."""
    return x.dtype == torch.float32 and not (isinstance(weight, Tensor) and weight.dtype != x.dtype)


def _many(x: Tensor, deltas: list[SparseDelta]) -> bool:
    """Whether a dense pass of multiplications costs less than going from place to place."""
    part = MANY_OF_LONG if x.shape[0] >= LONG else MANY
    return any(delta.values.numel() > part * delta.shape.numel() for delta in deltas)


class _Changed(masked_linear.Operand):
    """W + Δ as csrc takes it."""

    def __init__(self, weight, delta: SparseDelta | None) -> None:
        changes = masked_linear.NO_CHANGES
        if delta is not None and delta.values.numel():
            self.held = flat, starts, values = _contiguous(delta)
            changes = (flat.data_ptr(), flat.dtype == torch.int64, starts.data_ptr(), STRIP, values.data_ptr())
        super().__init__(weight, None, True, weight.shape[1], changes)


def _contiguous(delta: SparseDelta) -> tuple[Tensor, Tensor, Tensor]:
    places = delta.positions
    return places.flat.contiguous(), places.starts.contiguous(), delta.values.to(torch.float32).contiguous()


def _linear(x, weight, delta, bias):
    if composed.is_plain(delta) and (_alone(x, weight) or isinstance(weight, NF4Weight)):
        return _base.linear(x, weight, bias)
    return masked_linear.product(x, _Changed(weight, delta), masked_linear.NO_UPDATE, bias)


def _grad_input(grad_y, weight, delta):
    if composed.is_plain(delta) and (_alone(grad_y, weight) or isinstance(weight, NF4Weight)):
        return _base.grad_input(grad_y, weight)
    return masked_linear.grad_product(grad_y, _Changed(weight, delta), masked_linear.NO_UPDATE)


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


def _by_pieces(x: Tensor) -> bool:
    """Whether PyTorch's matmuls on pieces of W + Δ are faster than csrc's."""
    return x.shape[0] > 16 and bool(matrix_instructions(x.dtype))


def forward(x, weight, deltas, ids, bias):
    if _by_pieces(x):
        return composed.forward(x, weight, deltas, ids, bias)
    if _many(x, deltas) or not _alone(x, weight):
        return composed.forward(x, weight, deltas, ids, bias, _linear)
    y, x = _base.linear(x, weight, bias), row_major(x)
    parts, values = _chosen(ids, deltas), _floats(deltas)
    tuples = _tuples(deltas, parts, values, [None] * len(deltas), x.shape[0])
    _native.load("_cpu").sparse_delta_forward(
        *weight.shape, tuples, *place(x), y.data_ptr(), torch.get_num_threads()
    )  # fmt: skip
    return y


def backward(grad_y, x, weight, deltas, ids, needs):
    need_x, need_weight, need_bias, need_values = needs
    many = _many(grad_y, deltas)
    together = many or not _alone(grad_y, weight)
    found = composed.parts(ids, deltas) if together else []
    grad_x = grad_values = None
    if need_x and together:
        one = composed.grad_input_of if _by_pieces(grad_y) else _grad_input
        grad_x = composed.grad_input(grad_y, weight, deltas, ids, found, one)
    elif need_x:
        grad_x = _base.grad_input(grad_y, weight)
    if many:
        grad_values = composed.grad_values(grad_y, x, deltas, found, need_values, masked_linear.grad_values)
    else:
        grad_values = _few_gradients(grad_y, x, weight, deltas, ids, need_values, None if together else grad_x)
    return (
        grad_x,
        composed.grad_weight(grad_y, x, weight) if need_weight else None,
        sum_rows(grad_y) if need_bias else None,
        grad_values,
    )


def _few_gradients(grad_y, x, weight, deltas, ids, need_values, grad_x: Tensor | None) -> list[Tensor | None]:
    """Gradients of the values, place by place; grad_x (None: no such) += dY Δ."""
    grads = [
        torch.zeros(delta.values.shape, dtype=torch.float32) if need else None
        for delta, need in zip(deltas, need_values, strict=True)
    ]
    if any(need_values) or grad_x is not None:
        held, rows = row_major(grad_y), row_major(x) if any(need_values) else None
        parts, values = _chosen(ids, deltas), _floats(deltas)
        _native.load("_cpu").sparse_delta_backward(
            *weight.shape, _tuples(deltas, parts, values, grads, grad_y.shape[0]), _native.DTYPES[grad_y.dtype],
            *place(held), *place(rows), _address(grad_x), torch.get_num_threads(),
        )  # fmt: skip
    return [None if grad is None else grad.to(delta.values.dtype) for grad, delta in zip(grads, deltas, strict=True)]
