"""Specification of the weights of NF4: w = round(CODE[index] · absmax), one float32 product and one rounding.

Element e of the flattened whole is the high (e even) or low half of byte e // 2, and belongs to block e // blocksize.
With double quantisation absmax_i = float32(float32(map[u_i] · nested_i) + offset): two roundings, not one fused one.
Source: Dettmers et al., "QLoRA", 2023; the same bits as bitsandbytes' dequantize_4bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import NESTED_BLOCKSIZE, NF4Weight, code

# Elements are gathered with 64-bit indices, in pieces so that these stay small beside the result.
_PIECE = 1 << 18


def unsupported(problem) -> str | None:
    return None


def absmax(q: NF4Weight, blocks: Tensor) -> Tensor:
    """The float32 absmax of these blocks."""
    if q.nested_absmax is None or q.nested_map is None or q.nested_offset is None:
        return q.absmax[blocks]
    scaled = q.nested_map[q.absmax[blocks].long()] * q.nested_absmax[blocks // NESTED_BLOCKSIZE]
    return scaled + q.nested_offset


def elements(q: NF4Weight, numbers: Tensor) -> Tensor:
    """The elements with these numbers (int64) in the flattened whole, in float32."""
    pairs = q.packed[numbers // 2].int()
    indices = torch.where(numbers % 2 == 0, pairs >> 4, pairs & 15)
    return code(q.device)[indices.long()] * absmax(q, numbers // q.blocksize)


def dense(weight: Tensor | NF4Weight) -> Tensor:
    """A weight or stack of weights as it is multiplied: itself, or decoded."""
    return forward(weight).view(weight.shape) if isinstance(weight, NF4Weight) else weight


def forward(q: NF4Weight) -> Tensor:
    n, k, stride, first, *_ = q.layout
    weight = torch.empty(n, k, dtype=q.dtype, device=q.device)
    step = max(1, _PIECE // max(1, k))
    for start in range(0, n, step):
        rows = torch.arange(start, min(n, start + step), device=q.device).unsqueeze(1)
        weight[start : start + step] = elements(q, first + rows * stride + torch.arange(k, device=q.device))
    return weight
