"""The second stage of a split reduction as one elementwise Triton kernel: sums over P in the order of P.

Floor: one read of the partials; dB at N=4096, r=16 from 32 blocks of rows: 8.4 MB, 2 us at 4.3 TB/s (less when they
are still in L2, where the first stage has just written them): the launch itself is the larger part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch


def unsupported(problem) -> str | None:
    return _launch.unavailable(problem.device, None, problem.dtype, problem.source)


def unproven(problem) -> str | None:
    # On a GPU the only alternative is the reference, P launches over the whole result.
    return _launch.INTERPRETER_IS_FOR_TESTS if _launch.INTERPRETED else None


def forward(partials: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    from peft_kernels.kernels.triton._splitk_reduce import splitk_reduce

    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    numel = out.numel()
    if numel:
        config = tuning.config(_launch.architecture(out.device), "splitk_reduce", partials.dtype)
        grid = (-(-numel // config.block),)
        arguments = (partials.contiguous(), out, partials.shape[0], numel, scale)
        _launch.launch(splitk_reduce, grid, out.device, *arguments, **config.options())
    return out
