"""`nf4_dequantize` in one Triton launch, double quantisation included.

Floor: W written and 4.13 bits an element read; 4096 x 4096 to bf16, 4.3 TB/s: 10 us, 14336 x 4096: 35 us. About 7
instructions a weight, 4 us of an H200's issue slots, stay below that. Three launches in bitsandbytes: absmax, the sum
with the offset, the weights. Compiled for sm_80, sm_90 and sm_100 and interpreted on the CPU; never run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.triton import _launch


def unsupported(problem) -> str | None:
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype)


def unproven(problem) -> str | None:
    # On a GPU the only alternative is the reference, about 15 passes with 64-bit indices.
    return _launch.INTERPRETER_IS_FOR_TESTS if _launch.INTERPRETED else None


def forward(q: NF4Weight) -> Tensor:
    from peft_kernels.kernels.triton._nf4_dequantize import nf4_dequantize
    from peft_kernels.kernels.triton._nf4_tile import layout_of

    n, k, stride, *_ = q.layout
    out = torch.empty((n, k), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    flat = stride == k or n == 1
    layout = layout_of(q, flat=flat)
    config = tuning.config(_launch.architecture(q.device), "nf4_dequantize", q.dtype)
    per_row, block = _launch.blocks(layout.columns, layout.segment), config.block // layout.segment
    if layout.options["MASKED"] and not flat:  # a mask for each element takes registers
        block = max(1, block // 4)
    rows = 1 if flat else n
    _launch.launch(
        nf4_dequantize, (_launch.blocks(rows * per_row, block),), q.device,
        *layout.arguments, out, rows, layout.columns, per_row,
        BLOCK=block, FLAT=flat, num_warps=config.num_warps, **layout.options,
    )  # fmt: skip
    return out
