"""`nf4_linear` in one Triton launch forward and one backward (two where the sum is split): the weight is decoded in
registers, the same bits in both.

Floor, N=K=4096, nested, bf16, 4.3 TB/s and 790 TFLOP/s: 2.1 us at M=16, 2.7 at M=64, 22 at M=512. Compiled for sm_80,
sm_90 and sm_100 and interpreted on the CPU; never run on a GPU yet (docs/kernels.md).
"""

from __future__ import annotations

from peft_kernels.kernels.triton import _launch, _measured


def unsupported(problem) -> str | None:
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype)


def unproven(problem) -> str | None:
    return _measured.unproven("nf4_linear", problem)


def forward(x, q, bias):
    from peft_kernels.kernels.triton._nf4_gemm import nf4_gemm

    return nf4_gemm(x, q, bias)


def backward(grad_y, q):
    from peft_kernels.kernels.triton._nf4_grad_x import nf4_grad_x

    return nf4_grad_x(grad_y, q)
