"""The kernel of `philox_dropout`; its host side is in the file without the underscore."""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.kernels.triton._philox import kept


@triton.jit(do_not_specialize=["M", "row_offset", "threshold"])
def philox_dropout(
    x, out, seed, M, K, groups, stride_m, stride_k, row_offset, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [M, K] (contiguous) = x where kept, times `scale`; else 0."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    column = (pid % blocks_k) * BLOCK_K
    rows = (pid // blocks_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    keep = kept(tl.load(seed), rows + row_offset, column, groups, threshold, BLOCK_M, BLOCK_K)

    values = tl.load(x + rows[:, None] * stride_m + columns[None, :].to(tl.int64) * stride_k, mask=inside, other=0.0)
    dropped = tl.where(keep, values.to(tl.float32) * scale, 0.0)
    tl.store(out + rows[:, None] * K + columns[None, :], dropped.to(out.dtype.element_ty), mask=inside)
