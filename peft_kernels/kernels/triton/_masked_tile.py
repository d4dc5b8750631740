"""Tiles of masks, which are read as bytes of 8 columns: what kernels over pruned weights share.

A tile of bytes is expanded in registers, by shifts that the compiler knows. Of 16-bit weights two at once get their
mask: each bit is shifted to where a byte has its sign, `prmt` repeats the two signs over 16 bits each, and one `and`
follows: 2 instructions a weight. Selected one by one, as the compiler does it, a weight costs 5 to 7.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.kernels.triton import _launch

ASSEMBLY = "{\n.reg .b32 m;\nprmt.b32 m, $2, $3, 0xCC88;\nand.b32 $0, $1, m;\n}"
"""PTX that clears each of the two 16-bit weights in $1 unless byte 0 of $2, or of $3, has its highest bit."""
_ASSEMBLY = tl.constexpr(ASSEMBLY)


def octets(words: Tensor) -> Tensor:
    """The words [N, ceil(K / 32)] of a mask as bytes [N, 4 · ceil(K / 32)], in the same memory."""
    return words.view(torch.uint8)


def in_pairs(dtype: torch.dtype) -> bool:
    """Whether `masked` can take two weights at once, which the interpreter cannot."""
    return dtype.itemsize == 2 and not _launch.INTERPRETED


@triton.jit
def expanded(octet, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS]: the bits of bytes [ROWS, COLUMNS / 8]."""
    bits = octet[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]
    return (tl.reshape(bits, (ROWS, COLUMNS)) & 1) != 0


@triton.jit
def masked(weight, octet, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN_PAIRS: tl.constexpr):
    """A tile of a weight [ROWS, COLUMNS] in `dtype`, 0 where the bytes keep nothing."""
    weight = weight.to(dtype)
    if IN_PAIRS:
        signs = octet.to(tl.int32)[:, :, None] << (7 - tl.arange(0, 8))[None, None, :]
        return tl.inline_asm_elementwise(
            _ASSEMBLY,
            "=r,r,r,r",
            [weight, tl.reshape(signs, (ROWS, COLUMNS))],
            dtype=weight.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        return tl.where(expanded(octet, ROWS, COLUMNS), weight, tl.zeros_like(weight))
