"""The table of `formats/adapter_table.py` inside kernels: where the factors of an adapter are, its rank and scaling.

A pointer or a rank that a kernel loads is opaque to the compiler, which then loads one number at a time. Where the host
knows that all factors of a layer allow it, `multiple_of` says so, and loads are 16 bytes wide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.formats.adapter_table import Adapters, PoolAdapters, Table

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
RANK_STEP = 8
"""Ranks that a 16-byte load of 16-bit numbers holds, and the page of a pool."""


class Factors(NamedTuple):
    """The A or the B of every adapter in one layer, as kernels take them.

    Attributes:
        rows: the table [adapters, layers, 4].
        layer: which of its layers.
        lora_b: whether B is meant, [N, r]; else A, [r, K].
        dtype: of the factors.
        wide: every factor begins at a multiple of 16 bytes and so does each of its rows; for B, ranks are multiples of
            8, or rows go on with zeros up to one.
    """

    rows: Tensor
    layer: int
    lora_b: bool
    dtype: torch.dtype
    wide: bool

    @property
    def arguments(self) -> tuple[Tensor, int, int]:
        return self.rows, self.rows.shape[1], self.layer

    @property
    def options(self) -> dict[str, Any]:
        return {"LORA_B": self.lora_b, "FACTORS": TYPES[self.dtype], "WIDE": self.wide}


def factors(adapters: Adapters, table: Table, projection: int, *, lora_b: bool) -> Factors:
    wide = _are_wide(adapters, projection, lora_b)
    dtype = adapters.dtype
    if dtype is None:
        raise ValueError("a table without adapters has no factors")
    return Factors(table.rows, table.layers[projection], lora_b, dtype, wide)


def _are_wide(adapters: Adapters, projection: int, lora_b: bool) -> bool:
    if isinstance(adapters, PoolAdapters):  # whose pages hold whole steps of ranks; rows of A have K numbers
        return lora_b or adapters.sizes[projection][1] * adapters.dtype.itemsize % 16 == 0
    for factor, output in zip(adapters.lora_Bs if lora_b else adapters.lora_As, adapters.outputs, strict=True):
        if output == projection:
            step = RANK_STEP if lora_b else 1
            if factor.shape[1] % step or factor.shape[1] * factor.itemsize % 16:
                return False
            # Others are copied for the table, to a place that is.
            if factor.stride(1) == 1 and (factor.data_ptr() % 16 or factor.stride(0) * factor.itemsize % 16):
                return False
    return True


@triton.jit
def words_of(table, layers, layer, adapter):
    """Pointer to the four words of an adapter."""
    return table + (adapter.to(tl.int64) * layers + layer) * 4


@triton.jit
def rank_of(words):
    return (tl.load(words + 2) & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def scaling_of(words):
    """float32."""
    return (tl.load(words + 2) >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def factor_of(words, LORA_B: tl.constexpr, FACTORS: tl.constexpr, WIDE: tl.constexpr):
    """(pointer, row stride in elements, int64) of A or B."""
    address, strides = tl.load(words + (1 if LORA_B else 0)), tl.load(words + 3)
    if LORA_B:
        stride = strides >> 32
    else:
        stride = strides & 0xFFFFFFFF
    pointer = address.to(tl.pointer_type(FACTORS))
    if WIDE:
        pointer, stride = tl.multiple_of(pointer, 16), tl.multiple_of(stride, 128 // FACTORS.primitive_bitwidth)
    return pointer, stride


@triton.jit
def ranks_of_rows(rank, LORA_B: tl.constexpr, WIDE: tl.constexpr):
    """How many ranks may be loaded: those of B's rows up to a multiple of 8, where the rest is 0."""
    if LORA_B and WIDE:
        rank = tl.multiple_of((rank + 7) // 8 * 8, 8)
    return rank
