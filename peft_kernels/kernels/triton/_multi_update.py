"""out += Σ_i factor · drop(s_i b_a), each choice i of a row with the factors of its adapter: where no GEMM can take the
expand as one more step, because W is of 4 bits, or because a row has several adapters.

A program owns a tile of rows and columns, walks the choices, and for each the adapters that its rows chose: each meets
the whole tile, and only the rows that chose it take the result. out is read and written once, rounded once, no atomics,
and a row's sum has the order of its choices. With one choice per row rows come sorted by adapter, so that most tiles
have one; with several they come as they are, and a tile of 64 rows costs as many steps of size r as it has adapters.

Floor: out read and written; M=8192, N=4096, bf16, 4.3 TB/s: 134 MB, 31.2 us.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import store_rows, tile_of
from peft_kernels.kernels.triton._multi_gemm import add_low_rank_of, factored
from peft_kernels.kernels.triton._multi_rows import SortedPlaces
from peft_kernels.kernels.triton._multi_table import Factors, rank_of, words_of


def multi_update(
    out: Tensor,
    s: Tensor,
    factors: Factors,
    ids: Tensor,
    places: SortedPlaces,
    mix: Tensor | None = None,
    dropout: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """out [M, N], contiguous, += Σ_i s_a mix · drop(s b_a), a = ids[m, i]; arguments as for `multi_gemm`, with s
    [M, k, width], ids int64 [M, k] and mix [M, k], all contiguous."""
    (m, n), width = out.shape, s.shape[2]
    if out.numel() == 0:
        return
    config = tuning.config(
        _launch.architecture(out.device), "multi_update", out.dtype, dropout=seed is not None, n=n, r=width
    )
    options = {**config.options(), "BLOCK_R": min(_launch.padded_rank(width), config.block_r)}
    order = places.order if places.per_row == 1 else None
    _launch.launch(
        _multi_update, (_launch.blocks(m, config.block_m) * _launch.blocks(n, config.block_n),), out.device,
        out, s, *factors.arguments, ids, mix, order, dropout, seed, m, places.count, n, width, places.per_row,
        -(-n // LANES), PRECISION=_launch.dot_precision(out.dtype), **options, **factors.options,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layers", "layer", "M", "count"])
def _multi_update(
    out, s, table, layers, layer, ids, mix, order, dropout, seed, M, count, N, W, per_row, groups,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr, LORA_B: tl.constexpr, FACTORS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row + tl.arange(0, BLOCK_M)
    rows_in = rows < M
    if order is not None:
        rows = tl.load(order + rows, mask=rows_in, other=0)
    columns = column + tl.arange(0, BLOCK_N)
    columns_in = columns < N
    pointers = out + rows[:, None] * N + columns[None, :]
    total = tl.load(pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0).to(tl.float32)
    for i in range(0, per_row):
        places = rows * per_row + i
        chosen = tl.load(ids + places, mask=rows_in, other=-1)
        waiting = tl.where((chosen < 0) | (chosen >= count), count, chosen)
        adapter = tl.min(waiting, 0)
        while adapter < count:
            own = waiting == adapter
            words = words_of(table, layers, layer, adapter)
            part = add_low_rank_of(
                tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32), s, words, rank_of(words), places, own, columns,
                columns_in, W, BLOCK_R, PRECISION, LORA_B, FACTORS, WIDE,
            )  # fmt: skip
            weights = mix
            if mix is not None:
                weights = mix + places
            part = factored(part, words, adapter, weights, own, dropout, seed, rows, column, groups, BLOCK_M, BLOCK_N)
            # Not by a product with 0: a factor that is not finite must not reach other adapters' rows.
            total += tl.where(own[:, None], part, 0.0)
            waiting = tl.where(own, count, waiting)
            adapter = tl.min(waiting, 0)
    store_rows(total, out, rows, rows_in, columns, columns_in, N)
