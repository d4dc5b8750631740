"""Specification of NF4's quantisation: the index of the nearest of 16 numbers after division by the block's absmax.

A value on the midpoint of two numbers takes the lower index. Source: bitsandbytes' quantize_4bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import code

_PIECE = 1 << 22


def unsupported(problem) -> str | None:
    return None


def forward(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    values, table = weight.reshape(-1), code(weight.device)
    midpoints = (table[1:] + table[:-1]) / 2
    n = values.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device=weight.device)
    for start in range(0, n, _PIECE):
        piece = values[start : start + _PIECE].float()
        blocks = torch.nn.functional.pad(piece, (0, -len(piece) % blocksize)).view(-1, blocksize)
        scale = blocks.abs().amax(1)
        absmax[start // blocksize : start // blocksize + len(scale)] = scale
        indices = torch.bucketize((blocks / scale.unsqueeze(1)).nan_to_num_(0.0), midpoints).view(-1)[: len(piece)]
        indices = torch.nn.functional.pad(indices.to(torch.uint8), (0, len(piece) % 2), value=7).view(-1, 2)
        packed[start // 2 : start // 2 + len(indices)] = indices[:, 0] << 4 | indices[:, 1]
    return packed, absmax
