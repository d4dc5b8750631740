"""`nf4_linear` for at most 16 rows by csrc/nf4_linear.cu: one launch, the packed weight read once and decoded in
registers.

Floor: the packed weight read once; nested, 14336 x 4096 at 4.3 TB/s is 7.1 µs, 4096 x 4096 2.0 µs. Compiled for sm_80,
sm_90a and sm_100; never run on a GPU yet (docs/kernels.md).

How K is split is a function of N, K and the GPU, not of M: a row has the same bits alone and in a batch. The fast form
takes rows that begin at multiples of 32 elements (for a whole weight K % 32 == 0, whatever the blocksize); any other
row, odd K and odd starts included, takes a form of about twice the instructions.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.composed import nf4_linear as composed
from peft_kernels.kernels.cpu.nf4_dequantize import arguments, contiguous
from peft_kernels.kernels.cuda._availability import next_implementation, not_an_nvidia_gpu, not_built
from peft_kernels.ops.nf4_linear import problem

MAX_ROWS = 16
DTYPES = (torch.float16, torch.bfloat16)
# What indices of 32 bits in the kernel allow: of a matrix, and of the whole of which it is a part.
_MAX_SIZE, _MAX_ELEMENTS = 0x7FFF0000, 32 * 0x7FFF0000


def unsupported(problem) -> str | None:
    if (reason := not_an_nvidia_gpu(problem)) is not None:
        return reason
    if problem.dtype not in DTYPES:
        return f"multiplies in float16 and bfloat16, not in {problem.dtype}"
    if problem.m > MAX_ROWS:
        return f"for at most {MAX_ROWS} rows; the packed weight would be decoded once for each {MAX_ROWS}"
    if problem.m == 0 or problem.n == 0 or problem.k == 0:
        return "nothing to compute"
    if max(problem.n, problem.k) > _MAX_SIZE:
        return f"a side of the weight is above {_MAX_SIZE}"
    return not_built(problem)


def unproven(problem) -> str | None:
    return "not yet measured on a GPU against the alternatives"


def forward(x, q, bias):
    return launch(x, q, bias) if fits(q) else composed.forward(x, q, bias)


def backward(grad_y, q):
    """dx by the implementation that is next in the order: this one has no kernel for it."""
    return next_implementation("nf4_linear", problem(grad_y, q)).backward(grad_y, q)


def fits(q: NF4Weight) -> bool:
    """Whether the kernel can count the elements of the whole weight of which `q` is a part."""
    n, k, stride, first, *_ = q.layout
    return stride <= _MAX_SIZE and first + (n - 1) * stride + k <= _MAX_ELEMENTS


def aligned_rows(x: Tensor) -> Tensor:
    """Itself, or a copy whose rows begin at multiples of 16 bytes."""
    width = 16 // x.element_size()
    unit = x.shape[1] == 1 or x.stride(1) == 1
    if unit and x.data_ptr() % 16 == 0 and (x.shape[0] == 1 or x.stride(0) % width == 0):
        return x
    return x.new_empty(x.shape[0], -(-x.shape[1] // width) * width)[:, : x.shape[1]].copy_(x)


def launch(
    x: Tensor, q: NF4Weight, bias: Tensor | None, s: Tensor | None = None, lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + bias, and with s [M, r] + scaling · s Bᵀ, rounded once; then `lora_down` was launched just before."""
    x, q = aligned_rows(x), contiguous(q)
    n, k, *_ = q.layout
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    low_rank = (0, 0, 0, 0)
    if s is not None and lora_B is not None:
        low_rank = (s.shape[1], s.data_ptr(), lora_B.data_ptr(), lora_B.stride(0))
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _native.load("_cuda").nf4_linear(
            x.device.index, stream, *arguments(q), q.packed.nbytes, plan(x.device.index, n, k), x.shape[0],
            _native.DTYPES[x.dtype], x.data_ptr(), x.stride(0), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
            *low_rank, scaling,
        )  # fmt: skip
    return y


@functools.lru_cache(maxsize=4096)
def plan(device: int, n: int, k: int):
    """How the work on a weight of this shape is divided on this GPU: csrc/nf4_plan.h."""
    return _native.load("_cuda").nf4_plan(n, k, _clusters(device))


@functools.cache
def _clusters(device: int) -> list[int]:
    return _native.load("_cuda").nf4_clusters(device)
