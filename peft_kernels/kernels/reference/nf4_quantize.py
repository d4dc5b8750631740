"""Specification of NF4's quantisation: of each block the absmax, then the nearest of 16 numbers to x / absmax.

The bytes are those of bitsandbytes' quantize_4bit on a CPU, rounding by rounding: in whole blocks x is multiplied by
the float32 reciprocal of absmax, in a short last block it is divided; an absmax below 1e-38 counts as 1e-38, which a
short last block also keeps as its own. On the float32 midpoint of two numbers the lower one is taken. In blocks of
zeros, and beside the last of an odd number of elements, index 7 is written, which is 0.

Where bitsandbytes' own backends disagree, this is the rule on all devices. On CUDA it takes an approximate reciprocal,
so that values within a rounding of a midpoint may get the other index, and multiplies in a short block too; for blocks
of zeros it writes index 0 with absmax 0, that is -0, and after double quantisation, where absmax is no longer 0, other
numbers.

Source: bitsandbytes 0.50, backends/default/ops.py and csrc/kernels.cu.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import code

_PIECE = 1 << 22
_LEAST = 1e-38


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
        whole = len(piece) // blocksize * blocksize
        scale, normed = _normed(piece[:whole].view(-1, blocksize), piece[whole:])
        absmax[start // blocksize : start // blocksize + len(scale)] = scale
        indices = torch.bucketize(normed, midpoints)
        indices = torch.nn.functional.pad(indices.to(torch.uint8), (0, len(piece) % 2), value=7).view(-1, 2)
        packed[start // 2 : start // 2 + len(indices)] = indices[:, 0] << 4 | indices[:, 1]
    return packed, absmax


def _normed(blocks: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """(absmax of each block, all values over it), where `rest`, the short block, may be empty."""
    scale = blocks.abs().amax(1)
    normed = (blocks * (1.0 / scale.clamp(min=_LEAST)).unsqueeze(1)).view(-1)
    if rest.numel() == 0:
        return scale, normed
    last = rest.abs().amax(0, keepdim=True).clamp(min=_LEAST)
    return torch.cat((scale, last)), torch.cat((normed, rest / last))
