"""y_j[m] += Σ_i w[m, i] s_aj B_aj (A_aj x[m]), a = ids[m, i], for a few tokens of each adapter (decoding), unsorted.

A program owns a row, or a part of one, so ids need no sorting. Two forms:

- one launch: a program computes all of A x for itself and then its columns of y. A comes from L2 but for the first
  program of its row. For a few rows and low ranks.
- two launches: partial sums of A x over `block_k` columns each, in float32, then y. Every byte of A is read once.

Both add the same partial sums in the same order: ranks in chunks of `CHUNK`, the columns of A in steps of `block_k`, k
choices one after the other. No tile depends on M, the ids, the ranks of others or the form: a row's result has the same
bits alone, in any batch, and beside any other adapters of the table. No atomics, no memory to be cleared, no value read
by the host: both forms can be captured in a CUDA graph, which ids and table may change under.

Floor, K=N=4096, r=16, bf16, 64 tokens of as many adapters: A, B and y, 17 + 1 MB, 4.2 us at 4.3 TB/s and a launch of 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from peft_kernels import tuning
from peft_kernels.formats.adapter_table import Table
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import pick
from peft_kernels.kernels.triton._multi_table import TYPES, rank_of, scaling_of

CHUNK = 16
"""Ranks that are summed together."""

_CHUNK = tl.constexpr(CHUNK)
_MOST_REGISTERS = 255


def multi_decode(
    x: Tensor,
    ys: Sequence[Tensor],
    table: Table,
    widths: Sequence[int],
    ids: Tensor,
    mix: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Adds the low-rank updates to the base products `ys` in place, summed in float32 and rounded once.

    Args:
        x: [M, K], any strides.
        ys: [M, N_j] each, contiguous, of x's dtype.
        table: its `layers[j]` is that of ys[j].
        widths: of each projection, the largest rank in use. Ranks beyond it, rounded up to `CHUNK`, are left out.
        ids: int64 [M, k]; those outside of the table add nothing.
        mix: float32 [M, k], or None for ones.
        dtype: of the adapters.
    """
    (m, k), per_row = x.shape, ids.shape[1]
    taken = [j for j, y in enumerate(ys) if y.shape[1] and widths[j]]
    if not taken or 0 in (m, k, per_row, table.rows.shape[0]):
        return
    config = tuning.config(_launch.architecture(x.device), "multi_decode", dtype, k=k)
    outs = tuple(ys[j] for j in taken)
    sizes = tuple(y.shape[1] for y in outs)
    # The layer as an address: as a number it would be a constant of the compiled kernel wherever it is 1.
    heads = tuple(table.rows[:, table.layers[j]] for j in taken)
    chunks = _launch.blocks(max(widths), CHUNK)
    rows = (*ids.stride(), *((0, 0) if mix is None else mix.stride()), table.rows.shape[0], table.rows.stride(0))
    blocks = sum(_launch.blocks(n, config.block_n) for n in sizes)
    # Products of 16-bit numbers are exact in float32, so that an FMA has the bits of a product and a sum. Others are
    # not, and the forms would differ. Left alone, ptxas spills a few bytes to fit into a smaller number of registers.
    exact = torch.float32 not in (x.dtype, dtype)
    options = {
        "TYPE": TYPES[dtype], "num_warps": config.num_warps, "enable_fp_fusion": exact, "maxnreg": _MOST_REGISTERS,
    }  # fmt: skip
    if m <= config.rows and chunks * CHUNK <= config.ranks:
        _launch.launch(
            _multi_decode, (m, blocks), x.device, x, outs, heads, ids, mix, sizes, chunks, k, per_row, *x.stride(),
            *rows, BLOCK_K=config.block_k, BLOCK_N=config.block_n, STAGES=config.num_stages, **options,
        )  # fmt: skip
        return
    parts = len(taken) * chunks
    partials = torch.empty(
        (_launch.blocks(k, config.block_k), m, per_row, parts, CHUNK), dtype=torch.float32, device=x.device
    )
    _launch.launch(
        _multi_shrink, (m * per_row, parts, partials.shape[0]), x.device, x, partials, heads, ids, chunks, k, per_row,
        *x.stride(), *rows, BLOCK_K=config.block_k, TRIGGER=_launch.overlaps(x.device), **options,
    )  # fmt: skip
    _launch.launch(
        _multi_expand, (m, blocks), x.device, partials, outs, heads, ids, mix, sizes, chunks, partials.shape[0],
        per_row, *rows, BLOCK_N=config.block_n, **options, **_launch.overlapping(True, x.device),
    )  # fmt: skip


@triton.jit
def _place(block, sizes, BLOCK_N: tl.constexpr):
    """(projection, first column) of a block of columns; the blocks of one projection follow those of the one before."""
    j, first = 0, 0
    for i in tl.static_range(1, len(sizes)):
        first += tl.cdiv(sizes[i - 1], BLOCK_N)
        j = tl.where(block >= first, i, j)
    passed = 0
    for i in tl.static_range(len(sizes) - 1):
        passed += tl.where(i < j, tl.cdiv(sizes[i], BLOCK_N), 0)
    return j, (block - passed) * BLOCK_N


@triton.jit
def _adapter_of(ids, head, row, choice, stride_im, stride_ii, count, stride_entry):
    """The table's entry of a row's adapter; that of adapter 0, and False, where it has none."""
    adapter = tl.load(ids + row * stride_im + choice * stride_ii)
    known = (adapter >= 0) & (adapter < count)
    return head + tl.where(known, adapter, 0) * stride_entry, known


@triton.jit
def _rank(entry, known, most):
    return tl.minimum(tl.where(known, rank_of(entry), 0), most)


@triton.jit
def _factors(entry, TYPE: tl.constexpr):
    """(addresses of A and B, their row strides, whether 16 bytes of A can be loaded at a time, and of A and B)."""
    a, b, strides = tl.load(entry), tl.load(entry + 1), tl.load(entry + 3)
    stride_a, stride_b = strides & 0x7FFFFFFF, strides >> 32
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    wide_a = ((a | stride_a * SIZE) & 15) == 0
    wide_b = wide_a & (((b | stride_b * SIZE) & 15) == 0)
    return a, b, stride_a, stride_b, wide_a, wide_b


@triton.jit
def _rows(address, stride, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """(pointer, row stride), in the branch that uses them: hints stick to an operation and would hold in the other."""
    pointer = address.to(tl.pointer_type(TYPE))
    if WIDE:
        PIECE: tl.constexpr = 128 // TYPE.primitive_bitwidth
        pointer, stride = tl.multiple_of(pointer, 16), stride // PIECE * PIECE
    return pointer, stride


@triton.jit
def _partial(
    x, a, column, ranks, r, K, stride_xk, stride_a, TYPE: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr
):
    """A x of `ranks` over the columns from `column` on, [CHUNK] in float32."""
    a, stride_a = _rows(a, stride_a, TYPE, WIDE)
    columns = column + tl.arange(0, BLOCK_K)
    columns_in = columns < K
    values = tl.load(x + columns.to(tl.int64) * stride_xk, mask=columns_in, other=0.0)
    tile = tl.load(
        a + ranks[:, None].to(tl.int64) * stride_a + columns[None, :],
        mask=(ranks < r)[:, None] & columns_in[None, :],
        other=0.0,
    )
    return tl.sum(tile.to(tl.float32) * values.to(tl.float32)[None, :], axis=1)


@triton.jit
def _load_b(b, columns, ranks, r, N, stride_b, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """`ranks` of B's rows `columns`. Loads of 16 bytes end with a piece that the row's stride holds."""
    b, stride_b = _rows(b, stride_b, TYPE, WIDE)
    stop = r
    if WIDE:
        PIECE: tl.constexpr = 128 // TYPE.primitive_bitwidth
        stop = tl.cdiv(r, PIECE) * PIECE
    return tl.load(
        b + columns[:, None].to(tl.int64) * stride_b + ranks[None, :],
        mask=(columns < N)[:, None] & (ranks < stop)[None, :],
        other=0.0,
    )


@triton.jit
def _update(tile, low, factor, ranks, r):
    """B (factor · A x) of a chunk of ranks. What was loaded beyond r may be anything. The selection also keeps products
    and sums apart: which of two products becomes part of an FMA is the compiler's choice, in each kernel anew."""
    return tl.sum(tl.where((ranks < r)[None, :], tile.to(tl.float32) * (low * factor)[None, :], 0.0), axis=1)


@triton.jit
def _own_low(
    x, a, ranks, r, K, stride_xk, stride_a,
    TYPE: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    low = tl.zeros((_CHUNK,), dtype=tl.float32)
    for column in tl.range(0, K, BLOCK_K, num_stages=STAGES if WIDE else 1):
        low += _partial(x, a, column, ranks, r, K, stride_xk, stride_a, TYPE, BLOCK_K, WIDE)
    return low


@triton.jit
def _own_update(
    x, a, b, columns, ranks, r, N, K, stride_xk, stride_a, stride_b, factor,
    TYPE: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, WIDE_A: tl.constexpr, WIDE_B: tl.constexpr,
):  # fmt: skip
    if WIDE_B:
        tile = _load_b(b, columns, ranks, r, N, stride_b, TYPE, True)
    low = _own_low(x, a, ranks, r, K, stride_xk, stride_a, TYPE, BLOCK_K, STAGES, WIDE_A)
    if not WIDE_B:
        tile = _load_b(b, columns, ranks, r, N, stride_b, TYPE, False)
    return _update(tile, low, factor, ranks, r)


@triton.jit
def _factor(entry, mix, row, choice, stride_wm, stride_wi):
    factor = scaling_of(entry)
    if mix is not None:
        factor *= tl.load(mix + row * stride_wm + choice * stride_wi)
    return factor


@triton.jit(do_not_specialize=["chunks", "count"])
def _multi_decode(
    x, ys, heads, ids, mix, sizes, chunks, K, per_row, stride_xm, stride_xk, stride_im, stride_ii, stride_wm, stride_wi,
    count, stride_entry,
    TYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Block `program_id(1)` of row `program_id(0)` of one of ys."""
    row = tl.program_id(0).to(tl.int64)
    j, first = _place(tl.program_id(1), sizes, BLOCK_N)
    N, head = pick(sizes, j), pick(heads, j)
    columns = first + tl.arange(0, BLOCK_N)
    y = pick(ys, j) + row * N + columns
    base = tl.load(y, mask=columns < N, other=0.0)
    total, changed = tl.zeros((BLOCK_N,), dtype=tl.float32), False
    for choice in range(per_row):
        entry, known = _adapter_of(ids, head, row, choice, stride_im, stride_ii, count, stride_entry)
        r = _rank(entry, known, chunks * _CHUNK)
        if r > 0:
            changed = True
            a, b, row_a, row_b, wide_a, wide_b = _factors(entry, TYPE)
            factor = _factor(entry, mix, row, choice, stride_wm, stride_wi)
            x_row = x + row * stride_xm
            for rank in range(0, r, _CHUNK):
                ranks = rank + tl.arange(0, _CHUNK)
                if wide_b:
                    total += _own_update(x_row, a, b, columns, ranks, r, N, K, stride_xk, row_a, row_b, factor,
                                         TYPE, BLOCK_K, STAGES, True, True)  # fmt: skip
                elif wide_a:
                    total += _own_update(x_row, a, b, columns, ranks, r, N, K, stride_xk, row_a, row_b, factor,
                                         TYPE, BLOCK_K, STAGES, True, False)  # fmt: skip
                else:
                    total += _own_update(x_row, a, b, columns, ranks, r, N, K, stride_xk, row_a, row_b, factor,
                                         TYPE, BLOCK_K, STAGES, False, False)  # fmt: skip
    tl.store(y, (base.to(tl.float32) + total).to(y.dtype.element_ty), mask=(columns < N) & changed)


@triton.jit(do_not_specialize=["chunks", "count"])
def _multi_shrink(
    x, partials, heads, ids, chunks, K, per_row, stride_xm, stride_xk, stride_im, stride_ii, stride_wm, stride_wi,
    count, stride_entry,
    TYPE: tl.constexpr, BLOCK_K: tl.constexpr, TRIGGER: tl.constexpr,
):  # fmt: skip
    """partials [steps of K, row, choice, projection, chunk, CHUNK]: those of chunks that the row's adapter has."""
    if TRIGGER:
        gdc_launch_dependents()
    number, part, step = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, choice = (number // per_row).to(tl.int64), number % per_row
    head, rank = pick(heads, part // chunks), part % chunks * _CHUNK
    entry, known = _adapter_of(ids, head, row, choice, stride_im, stride_ii, count, stride_entry)
    r = _rank(entry, known, chunks * _CHUNK)
    if rank < r:
        a, _, row_a, _, wide, _ = _factors(entry, TYPE)
        ranks, x_row, column = rank + tl.arange(0, _CHUNK), x + row * stride_xm, step * BLOCK_K
        if wide:
            low = _partial(x_row, a, column, ranks, r, K, stride_xk, row_a, TYPE, BLOCK_K, True)
        else:
            low = _partial(x_row, a, column, ranks, r, K, stride_xk, row_a, TYPE, BLOCK_K, False)
        place = (step.to(tl.int64) * tl.num_programs(0) + number) * tl.num_programs(1) + part
        tl.store(partials + place * _CHUNK + tl.arange(0, _CHUNK), low)


@triton.jit
def _summed_update(
    partials, b, columns, ranks, r, N, stride_b, steps, stride_step, factor,
    TYPE: tl.constexpr, WIDE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if WIDE:  # what other rows take, a register for each number, is too much to hold meanwhile
        tile = _load_b(b, columns, ranks, r, N, stride_b, TYPE, True)
    if OVERLAP:
        gdc_wait()
    low = tl.zeros((_CHUNK,), dtype=tl.float32)
    for step in tl.range(0, steps, loop_unroll_factor=8):
        low += tl.load(partials + step * stride_step + tl.arange(0, _CHUNK))
    if not WIDE:
        tile = _load_b(b, columns, ranks, r, N, stride_b, TYPE, False)
    return _update(tile, low, factor, ranks, r)


@triton.jit(do_not_specialize=["chunks", "count"])
def _multi_expand(
    partials, ys, heads, ids, mix, sizes, chunks, steps, per_row, stride_im, stride_ii, stride_wm, stride_wi,
    count, stride_entry,
    TYPE: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As `_multi_decode`, from the partials of `_multi_shrink`."""
    row = tl.program_id(0).to(tl.int64)
    j, first = _place(tl.program_id(1), sizes, BLOCK_N)
    N, head = pick(sizes, j), pick(heads, j)
    columns = first + tl.arange(0, BLOCK_N)
    y = pick(ys, j) + row * N + columns
    base = tl.load(y, mask=columns < N, other=0.0)
    total, changed = tl.zeros((BLOCK_N,), dtype=tl.float32), False
    parts = len(sizes) * chunks
    stride_step = tl.num_programs(0).to(tl.int64) * per_row * parts * _CHUNK
    for choice in range(per_row):
        entry, known = _adapter_of(ids, head, row, choice, stride_im, stride_ii, count, stride_entry)
        r = _rank(entry, known, chunks * _CHUNK)
        if r > 0:
            changed = True
            _, b, _, row_b, _, wide = _factors(entry, TYPE)
            factor = _factor(entry, mix, row, choice, stride_wm, stride_wi)
            own = partials + ((row * per_row + choice) * parts + j * chunks) * _CHUNK
            for rank in range(0, r, _CHUNK):
                ranks = rank + tl.arange(0, _CHUNK)
                if wide:
                    total += _summed_update(own + rank, b, columns, ranks, r, N, row_b, steps, stride_step, factor,
                                            TYPE, True, OVERLAP)  # fmt: skip
                else:
                    total += _summed_update(own + rank, b, columns, ranks, r, N, row_b, steps, stride_step, factor,
                                            TYPE, False, OVERLAP)  # fmt: skip
    if OVERLAP:
        gdc_wait()
    tl.store(y, (base.to(tl.float32) + total).to(y.dtype.element_ty), mask=(columns < N) & changed)
