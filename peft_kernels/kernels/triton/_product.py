"""The main loop that the GEMMs of groups and of DoRA share, over pointers or over TMA descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._extended_gemm_tma import descriptors, fits


class Product:
    """How x_i w_i for pairs of x_i [M, K_i] and w_i [K_i, N_i], or one x for all, reach the kernels.

    Attributes:
        config: the `ExtendedGemm` of the launch.
        xs, ws: descriptors where TMA can address all of them, else the tensors.
        x_strides, w_strides: of the tensors; empty for descriptors, whose kernels then recompile for no stride.
        options: keyword arguments of the launch.
    """

    def __init__(self, xs: Sequence[Tensor], ws: Sequence[Tensor], r: int, dropout: bool) -> None:
        pairs = list(zip(list(xs) * len(ws) if len(xs) == 1 else xs, ws, strict=True))
        x = xs[0]
        arch, sizes = _launch.architecture(x.device), {"m": _launch.bucket(x.shape[0]), "r": r}
        transposed = ws[0].stride(0) == 1
        self.config: Any = None
        if all(fits(x, w) and (w.stride(0) == 1) == transposed for x, w in pairs):
            self.config = tuning.config(arch, "product_tma", x.dtype, dropout=dropout, **sizes)
        tma = self.config is not None
        if tma:
            described = [descriptors(x, w, self.config) for x, w in pairs]
            self.xs: tuple[Any, ...] = tuple(x for x, _ in described[: len(xs)])
            self.ws: tuple[Any, ...] = tuple(w for _, w in described)
        else:
            self.config = tuning.config(arch, "product", x.dtype, dropout=dropout, **sizes)
            self.xs, self.ws = tuple(xs), tuple(ws)
        self.x_strides = ((0, 0),) * len(xs) if tma else tuple(x.stride() for x in xs)
        self.w_strides = ((0, 0),) * len(ws) if tma else tuple(w.stride() for w in ws)
        self.options = {
            **self.config.options(),
            "BLOCK_R": min(_launch.padded_rank(r), self.config.block_r),
            "TMA": tma,
            "W_TRANSPOSED": transposed,
            "PRECISION": _launch.dot_precision(x.dtype),
        }


@triton.jit
def add_product(
    total, x, w, row, column, M, N, K, x_strides, w_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, W_TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x w of a tile [BLOCK_M, BLOCK_N]. With TMA x and w are descriptors, w's of [N, K] when W_TRANSPOSED."""
    if TMA:
        first_row, first_column = row.to(tl.int32), column.to(tl.int32)
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([first_row, k])
            if W_TRANSPOSED:
                w_tile = tl.trans(w.load([first_column, k]))
            else:
                w_tile = w.load([k, first_column])
            total = tl.dot(x_tile, w_tile, total)
    else:
        rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        total = add_product_of_rows(
            total, x, w, rows, rows < M, columns, columns < N, K, x_strides, w_strides, BLOCK_K, PRECISION
        )
    return total


@triton.jit
def add_product_of_rows(
    total, x, w, rows, rows_in, columns, columns_in, K, x_strides, w_strides, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + x[rows] w[:, columns], over pointers."""
    inner = tl.arange(0, BLOCK_K)
    x_pointers = x + rows[:, None] * x_strides[0] + inner[None, :].to(tl.int64) * x_strides[1]
    w_pointers = w + inner[:, None].to(tl.int64) * w_strides[0] + columns[None, :] * w_strides[1]
    x_step, w_step = BLOCK_K * tl.cast(x_strides[1], tl.int64), BLOCK_K * tl.cast(w_strides[0], tl.int64)
    for k in range(0, K, BLOCK_K):
        inner_in = inner < K - k
        x_tile = tl.load(x_pointers, mask=rows_in[:, None] & inner_in[None, :], other=0.0)
        w_tile = tl.load(w_pointers, mask=inner_in[:, None] & columns_in[None, :], other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        x_pointers += x_step
        w_pointers += w_step
    return total
