"""`sparse_delta_linear` with the gradients of the values gathered in the epilogue of dYᵀ x (`_grad_at`), in Triton; the
rest is `composed`: Triton cannot scatter Δ into a tile of W in shared memory.

Floor of the gradients, M=8192, K=N=4096, bf16: 348 us, as a dense dW, and nothing of W's size is written. Interpreted
on the CPU; never run on a GPU yet (docs/kernels_sparse.md).
"""

from __future__ import annotations

from peft_kernels.kernels.composed import sparse_delta_linear as composed
from peft_kernels.kernels.triton import _launch, _measured

forward = composed.forward


def unsupported(problem) -> str | None:
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype)


def unproven(problem) -> str | None:
    return _measured.unproven("sparse_delta_linear", problem)


def backward(grad_y, x, weight, deltas, ids, needs):
    from peft_kernels.kernels.triton._grad_at import grad_at

    return composed.backward(grad_y, x, weight, deltas, ids, needs, grad_at)
