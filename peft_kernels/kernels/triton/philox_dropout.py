"""Dropout with the recomputable mask as one elementwise Triton kernel.

Floor: one read and one write of x; at 4.3 TB/s, M=8192, K=4096, bf16: 31 us. The kernel has about 23 instructions an
element, 0.18 clocks of an SM's 128 lanes against 0.22 for the memory, so the Philox rounds hide behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch


def unsupported(problem) -> str | None:
    return _launch.unavailable(problem.device, None, problem.dtype)


def unproven(problem) -> str | None:
    # On a GPU the only alternative is the reference, about 100 passes in int64.
    return _launch.INTERPRETER_IS_FOR_TESTS if _launch.INTERPRETED else None


def forward(x: Tensor, p: float, seed: Tensor, row_offset: int = 0) -> Tensor:
    from peft_kernels.kernels.triton._philox_dropout import philox_dropout

    m, k = x.shape
    out = torch.empty((m, k), dtype=x.dtype, device=x.device)
    config = tuning.config(_launch.architecture(x.device), "philox_dropout", x.dtype)
    block_k = min(config.block_k, max(LANES, 1 << (k - 1).bit_length()))
    block_m = config.block // block_k
    # One dimension: the number of row blocks may pass the 65535 that the other grid axes allow.
    grid = (_launch.blocks(m, block_m) * _launch.blocks(k, block_k),)
    _launch.launch(
        philox_dropout, grid, x.device,
        x, out, seed, m, k, -(-k // LANES), x.stride(0), x.stride(1), row_offset, threshold(p), scale(p),
        BLOCK_M=block_m, BLOCK_K=block_k, num_warps=config.num_warps,
    )  # fmt: skip
    return out
