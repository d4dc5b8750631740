"""`dora_weight_norm` in one pass over W: no copy of it, and no W + s B A.

A program owns BLOCK_N rows of W and sums their squares and W Aᵀ in float32 while it reads them; B and B (A Aᵀ) [N, r],
from two small launches before, enter at the end. A in float32 over a 16-bit W is taken as the sum of two 16-bit
matrices: the second product costs tensor-core time that the memory hides, and the norm keeps float32's accuracy.

Floor: W once; N=K=4096, bf16, 4.3 TB/s: 7.8 us. Tensor cores by `mma.sync`, because 16 or 32 rows are too few for the
warp-group instructions; it is bound by memory.
"""

from __future__ import annotations

import torch

from peft_kernels import tuning
from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._launch import NOT_OF_4_BITS
from peft_kernels.kernels.triton._measured import unproven as _unproven


def unsupported(problem) -> str | None:
    if problem.nf4:
        return NOT_OF_4_BITS
    if problem.r > MAX_RANK:
        return f"rank {problem.r} is above {MAX_RANK}"
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype, problem.adapter_dtype)


def unproven(problem) -> str | None:
    return _unproven("dora_weight_norm", problem)


def forward(weight, lora_A, lora_B, scaling, weight_norm_squared):
    from peft_kernels.kernels.triton._dora_weight_norm import dora_weight_norm
    from peft_kernels.kernels.triton._down_projection import down_projection

    (n, k), r = weight.shape, lora_A.shape[0]
    out = torch.empty((n,), dtype=torch.float32, device=weight.device)
    if n == 0:
        return out
    wide = lora_A.float().contiguous()
    a = wide.to(weight.dtype)
    rest = None if a.dtype == lora_A.dtype else (wide - a).to(weight.dtype)
    # Small products, in float32: B A Aᵀ, for which A Aᵀ is its own transpose.
    b_gram = down_projection(lora_B.float(), down_projection(wide, wide))
    config = tuning.config(_launch.architecture(weight.device), "dora_weight_norm", weight.dtype, n=n, r=r)
    _launch.launch(
        dora_weight_norm, (_launch.blocks(n, config.block_n),), weight.device,
        weight, a, rest, lora_B, b_gram, weight_norm_squared, out, n, k, r, scaling,
        *weight.stride(), *a.stride(), *lora_B.stride(),
        0 if weight_norm_squared is None else weight_norm_squared.stride(0),
        PRECISION=_launch.dot_precision(weight.dtype),
        **{**config.options(), "BLOCK_R": min(_launch.padded_rank(r), config.block_r)},
    )  # fmt: skip
    return out
