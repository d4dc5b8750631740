"""The library's dropout mask inside a kernel: Philox 4x32-10, one call for 8 neighbours of a row.

Specification: `kernels/reference/philox_dropout.py`. One call per 8 elements costs about 16 instructions an element,
close to what a pass over memory hides; one call per element (`tl.rand`) costs 54.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept(seed, rows, column, groups, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which elements of a tile [BLOCK_M, BLOCK_K] dropout keeps.

    `seed` is the int64 value; `rows` [BLOCK_M] int64 row numbers; `column` the tile's first column, a multiple of 8;
    `groups` = ceil(K / 8); `threshold` = round(65536 p).
    """
    group = column // 8 + tl.arange(0, BLOCK_K // 8)
    counter = rows[:, None] * groups + group[None, :]
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero, zero)
    # `join` adds the fastest dimension, so the order is: upper bit of the word, lower bit of the word, half.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes, (BLOCK_M, BLOCK_K)).to(tl.int32) >= threshold
