"""`mask_unpack` in one Triton launch.

Floor, 4096 x 4096, 4.3 TB/s: 2 MB read and 17 MB written, 4.4 us. Compiled for sm_80, sm_90 and sm_100 and interpreted
on the CPU; never run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.kernels.triton import _launch


def unsupported(problem) -> str | None:
    return _launch.unavailable(problem.device, problem.device_index)


def unproven(problem) -> str | None:
    # On a GPU the only alternative is the reference, which has a word of 4 bytes for each bit.
    return _launch.INTERPRETER_IS_FOR_TESTS if _launch.INTERPRETED else None


def forward(words: Tensor, columns: int) -> Tensor:
    from peft_kernels.kernels.triton import _mask_passes as passes

    out = torch.empty((words.shape[0], columns), dtype=torch.bool, device=words.device)
    if out.numel():
        target = out.view(torch.uint8)
        passes.launch(passes.mask_unpack, out.shape, target.dtype, out.device, words, target, words.stride(0))
    return out
