"""The kernel of `splitk_reduce`; its host side is in the file without the underscore."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["parts"])
def splitk_reduce(partials, out, parts, numel, scale, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """out [numel] = scale * (((0 + partials[0]) + partials[1]) + ...), partials [parts, numel] contiguous."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    pointers = partials + index
    total = tl.zeros((BLOCK,), dtype=partials.dtype.element_ty)
    # Unrolled so that several loads are in flight: the additions keep their order.
    for _ in tl.range(0, parts, loop_unroll_factor=UNROLL):
        total += tl.load(pointers, mask=inside, other=0.0)
        pointers += numel
    tl.store(out + index, (total.to(tl.float32) * scale).to(out.dtype.element_ty), mask=inside)
