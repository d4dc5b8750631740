"""`philox_dropout` by csrc/philox_dropout.cpp: Philox on whole vectors of counters, one pass over x.

512 x 1024 float32 on one AVX2 core: 0.24 ms; `F.dropout` takes 4.0 ms, the specification in PyTorch 11 ms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.kernels.reference.philox_dropout import scale, threshold


def unsupported(problem) -> str | None:
    if problem.device != "cpu":
        return f"for CPU tensors; x is on {problem.device}"
    if problem.dtype not in _native.DTYPES:
        return f"no {problem.dtype}"
    return _native.why_not("_cpu")


def row_major(tensor: Tensor) -> Tensor:
    """The same matrix with adjacent columns: rows may be strided or repeated, columns not."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def dropout_arguments(p: float, seed: Tensor | None) -> tuple[int, int, float]:
    """Address of the seed, smallest lane that is kept, factor of what is kept; address 0 means no dropout."""
    return (0, 0, 1.0) if seed is None else (seed.data_ptr(), threshold(p), scale(p))


def forward(x: Tensor, p: float, seed: Tensor, row_offset: int = 0) -> Tensor:
    x = row_major(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    _native.load("_cpu").philox_dropout(
        x.data_ptr(), x.stride(0), out.data_ptr(), *x.shape, row_offset, _native.DTYPES[x.dtype],
        *dropout_arguments(p, seed), torch.get_num_threads(),
    )  # fmt: skip
    return out
