"""Tiles of masks, in words of 32 columns: what kernels over pruned weights share.

A tile of words is expanded in registers: the 8 bits of a byte go to where a register has its sign, by shifts that the
compiler knows. Of 16-bit weights two at once get their mask: `prmt` repeats the two signs over 16 bits each, and one
`and` follows, 2 instructions a weight; selected one by one, as the compiler does it, a weight costs 5 to 7. Masks are
not loaded as bytes, which compile as well on sm_90: on sm_80 the compiler lays the operands of a product out for the
narrowest load behind them, and for bytes `ldmatrix` is lost to both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peft_kernels.kernels.triton import _launch

ASSEMBLY = "{\n.reg .b32 m;\nprmt.b32 m, $2, $3, 0xFFBB;\nand.b32 $0, $1, m;\n}"
"""PTX that clears the lower of the two 16-bit weights in $1 where $2 has no sign, the upper where $3 has none."""
_ASSEMBLY = tl.constexpr(ASSEMBLY)


def in_pairs(dtype: torch.dtype) -> bool:
    """Whether `masked` can take two weights at once, which the interpreter cannot."""
    return dtype.itemsize == 2 and not _launch.INTERPRETED


@triton.jit
def signs_of(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """int32 [ROWS, COLUMNS], negative where the words [ROWS, COLUMNS / 32] keep a weight."""
    octets = words[:, :, None] << (24 - 8 * tl.arange(0, 4))[None, None, :]
    octets = tl.reshape(octets, (ROWS, COLUMNS // 8))
    return tl.reshape(octets[:, :, None] << (7 - tl.arange(0, 8))[None, None, :], (ROWS, COLUMNS))


@triton.jit
def masked(weight, words, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, IN_PAIRS: tl.constexpr):
    """A tile of a weight [ROWS, COLUMNS] in `dtype`, 0 where the words keep nothing."""
    weight = weight.to(dtype)
    signs = signs_of(words, ROWS, COLUMNS)
    if IN_PAIRS:
        return tl.inline_asm_elementwise(
            _ASSEMBLY, "=r,r,r,r", [weight, signs], dtype=weight.dtype, is_pure=True, pack=2
        )
    else:
        return tl.where(signs < 0, weight, tl.zeros_like(weight))
