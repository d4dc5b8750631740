"""`nf4_linear` as dequantisation of a bounded piece of W and PyTorch's matmul on it, piece by piece.

No more than 64 MiB of W are dense at a time. y is cut along N and dx along K, so that each element is summed in one
matmul and rounded once. For many rows this is the right way on a GPU too: the dense piece is written and read once, 10
µs of 4096 x 4096 at 4.3 TB/s, beside a matmul of 348 µs at 8192 rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight

SCRATCH_BYTES = 64 << 20


def unsupported(problem) -> str | None:
    return None


def pieces(count: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the fewest equal parts of `count` rows or columns that fit the scratch memory."""
    most = max(1, SCRATCH_BYTES // bytes_each)
    step = max(1, -(-count // -(-count // most)))
    if step > 64:  # whole tiles of a matmul
        rounded = -(-step // 64) * 64
        step = rounded if rounded <= most else step // 64 * 64
    for start in range(0, count, step):
        yield start, min(count, start + step)


def dense(q: NF4Weight) -> Tensor:
    return torch.ops.peft_kernels.nf4_dequantize(q.tensors, q.layout, q.dtype)


def forward(x, q, bias):
    n, k, *_ = q.layout
    if n * k * x.element_size() <= SCRATCH_BYTES:
        return F.linear(x, dense(q), bias)
    y = x.new_empty(x.shape[0], n)
    for start, stop in pieces(n, k * x.element_size()):
        # The dense piece has no name: it is gone before the next one is there.
        rows, out = q.rows(start, stop), y[:, start:stop]
        if bias is None:
            torch.mm(x, dense(rows).t(), out=out)
        else:
            torch.addmm(bias[start:stop], x, dense(rows).t(), out=out)
    return y


def backward(grad_y, q):
    n, k, *_ = q.layout
    if n * k * grad_y.element_size() <= SCRATCH_BYTES:
        return torch.mm(grad_y, dense(q))
    grad_x = grad_y.new_empty(grad_y.shape[0], k)
    for start, stop in pieces(k, n * grad_y.element_size()):
        torch.mm(grad_y, dense(q.columns(start, stop)), out=grad_x[:, start:stop])
    return grad_x


def add_backward(grad_x, grad_y, q):
    """grad_x += dY W: the sum is rounded once, and grad_x read and written once."""
    n, k, *_ = q.layout
    for start, stop in pieces(k, n * grad_y.element_size()):
        grad_x[:, start:stop].addmm_(grad_y, dense(q.columns(start, stop)))
