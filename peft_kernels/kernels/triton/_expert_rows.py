"""Which rows belong to which expert, found on the GPU: the host never reads the offsets.

Tiles of BLOCK_M rows are numbered so that no scan is needed: expert e, which owns the rows from start_e on, has the
numbers from start_e // BLOCK_M + e on. These grow with e and suffice, because the rows from start_e up to end_e need at
most end_e // BLOCK_M - start_e // BLOCK_M + 1 tiles. A program finds its expert by bisection (7 loads for 64 experts,
from two cache lines) and returns where its number was not needed. The rows from the last offset on count as one more
expert, whose results are 0.

Offsets are not checked here; each is clamped to [0, M], so that wrong ones make wrong results but no wrong access.
"""

from __future__ import annotations

import triton
import triton.language as tl


def tile_numbers(m: int, experts: int, block_m: int) -> int:
    """How many numbers tiles can have, used or not."""
    return m // block_m + experts + 1


def bisections(experts: int) -> int:
    """Steps that `locate` takes among `experts` + 1 owners."""
    return experts.bit_length()


@triton.jit
def rows_of(expert, offsets, M, E):
    """(first row, row after the last) of an expert, int64; of the rows that nobody owns for expert = E."""
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0).to(tl.int64)
    end = tl.load(offsets + expert, mask=expert < E, other=M).to(tl.int64)
    return tl.minimum(tl.maximum(start, 0), M), tl.minimum(tl.maximum(end, 0), M)


@triton.jit
def locate(tile, offsets, M, E, steps, BLOCK_M: tl.constexpr):
    """(expert, the tile's first row, row after the expert's last one); the first row is not below the last where the
    number is not needed. Expert E is nobody."""
    low, high = tl.full((), 0, tl.int32), E.to(tl.int32)
    for _ in tl.range(0, steps, num_stages=1):
        middle = (low + high + 1) // 2
        start = tl.minimum(tl.maximum(tl.load(offsets + tl.maximum(middle, 1) - 1), 0), M)
        found = (middle <= low) | (start // BLOCK_M + middle <= tile)
        low = tl.where(found, middle, low)
        high = tl.where(found, high, middle - 1)
    start, end = rows_of(low, offsets, M, E)
    return low, start + (tile - (start // BLOCK_M + low)) * BLOCK_M, end
