"""Segments of an NF4 weight, decoded in registers: what the kernels of the 4-bit ops share.

A segment is up to 64 neighbouring elements of a row. Three forms give the same bits, round(CODE[index] · absmax) with
one float32 product and one rounding:

* "table": a segment lies in one block. Its 16 possible products are rounded first (16 multiplications, 8 conversions),
  and kept as 8 registers of bytes; a permutation of bytes (PRMT) then finds 4 bytes at once. 2.6 instructions a weight
  and half of one for the table, no shared memory. 16-bit dtypes, NVIDIA's assembly: the interpreter cannot.
* "pairs": a byte finds its two float32 codes in a table of 256 pairs; product and rounding for each weight. Any dtype,
  any even start; a segment may run into the next block.
* "nibbles": as "pairs" one weight at a time, for rows that begin at odd elements.

Source of the byte permutation: `prmt` of the PTX ISA; llama.cpp looks 8-bit codes up in the same way.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from peft_kernels.formats.nf4 import CODE, NF4Weight
from peft_kernels.kernels.triton import _launch

WIDEST_SEGMENT = 64
TABLE, PAIRS, NIBBLES = "table", "pairs", "nibbles"
_LEAST_SEGMENT_OF_TABLE = 32  # a table for 16 weights would cost 2 instructions for each


class Layout(NamedTuple):
    """How the kernels address a weight.

    Attributes:
        arguments: the tensors, None for what double quantisation would add, then the first element and the row stride.
        options: keyword arguments of the launch.
        segment: elements of a segment.
        columns: columns that there are.
    """

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    segment: int
    columns: int


def layout_of(q: NF4Weight, *, flat: bool = False) -> Layout:
    """The layout of `q`, a matrix; with `flat`, of a contiguous one, as a single row."""
    n, k, stride, first, blocksize, _ = q.layout
    if flat:
        k, stride = n * k, 0
    # The largest power of two that divides every row's start.
    alignment = math.gcd(stride, first, 1 << 12)
    segment = min(WIDEST_SEGMENT, blocksize, max(alignment, _LEAST_SEGMENT_OF_TABLE))
    within = alignment % segment == 0
    if not within:
        segment = min(WIDEST_SEGMENT, blocksize)
    masked = k % segment != 0
    if alignment % 2:
        form = NIBBLES
    elif within and not _launch.INTERPRETED and q.dtype.itemsize == 2 and not (masked and not flat):
        form = TABLE
    else:
        form = PAIRS
    tensors = (q.packed, q.absmax, q.nested_absmax, q.nested_map, q.nested_offset)
    options = {
        "SEGMENT": segment,
        "SHIFT": blocksize.bit_length() - 1,
        "ALIGNED": min(alignment, WIDEST_SEGMENT),
        "FORM": form,
        "STRADDLES": not within,
        "MASKED": masked,
        "ENDS": math.gcd(k, WIDEST_SEGMENT),
        # A product and a sum that round apart, as the format has it; nothing else here has one to fuse.
        "enable_fp_fusion": False,
    }
    return Layout((*tensors, first, stride), options, segment, k)


def table_assembly(dtype: str) -> str:
    """PTX that makes the 8 table registers of a block from its absmax ($8): the low bytes of products 0-3, 4-7, 8-11,
    12-15, then the high bytes. `dtype` is PTX's name of a pair."""
    lines = ["{", ".reg .b32 u<8>;", ".reg .f32 p, q;"]
    for i in range(8):
        low, high = (_float_bits(CODE[2 * i + half]) for half in (0, 1))
        lines += [f"mul.rn.f32 p, $8, {low};", f"mul.rn.f32 q, $8, {high};", f"cvt.rn.{dtype}.f32 u{i}, q, p;"]
    for byte, selector in enumerate(("0x6420", "0x7531")):
        lines += [f"prmt.b32 ${4 * byte + i}, u{2 * i}, u{2 * i + 1}, {selector};" for i in range(4)]
    return "\n".join([*lines, "}"])


def _float_bits(value: float) -> str:
    return f"0f{torch.tensor(value).view(torch.int32).item() & 0xFFFFFFFF:08X}"


# 4 packed bytes in $4, the registers of their block's table in $5, $9 ... $33: the operands come once for each byte, and
# one of the four is enough. $0, $1: the weights in the high halves of the bytes, $2, $3: in the low ones.
LOOKUP_ASSEMBLY = """{
.reg .b32 s, p, a, b, l, h, m;
and.b32 s, $4, 0x77777777;
shr.u32 p, $4, 1;
and.b32 p, p, 0x44444444;
or.b32 p, p, 0x32103210;
prmt.b32 a, $5, $9, s;
prmt.b32 b, $13, $17, s;
prmt.b32 l, a, b, p;
prmt.b32 a, $21, $25, s;
prmt.b32 b, $29, $33, s;
prmt.b32 h, a, b, p;
prmt.b32 $0, l, h, 0x7351;
prmt.b32 $2, l, h, 0x6240;
shr.u32 s, s, 16;
shr.u32 p, p, 16;
prmt.b32 a, $5, $9, s;
prmt.b32 b, $13, $17, s;
prmt.b32 l, a, b, p;
prmt.b32 a, $21, $25, s;
prmt.b32 b, $29, $33, s;
prmt.b32 h, a, b, p;
prmt.b32 $1, l, h, 0x7351;
prmt.b32 $3, l, h, 0x6240;
}"""

_CODE = tl.constexpr(CODE)
_TABLE_OF_BFLOAT16 = tl.constexpr(table_assembly("bf16x2"))
_TABLE_OF_FLOAT16 = tl.constexpr(table_assembly("f16x2"))
_TABLE_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,f")
_LOOKUP = tl.constexpr(LOOKUP_ASSEMBLY)
_LOOKUP_OPERANDS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 33))


@triton.jit
def _code_of(index):
    """CODE[index], for a few indices."""
    value = tl.full(index.shape, _CODE[0], tl.float32)
    for i in tl.static_range(1, 16):
        value = tl.where(index == i, _CODE[i], value)
    return value


@triton.jit
def codes(FORM: tl.constexpr):
    """What `weights` looks codes up in: made once in a program, from no memory."""
    if FORM == "pairs":
        byte = tl.arange(0, 256)
        high = _code_of(byte >> 4).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        return (_code_of(byte & 15).to(tl.int32, bitcast=True).to(tl.int64) << 32) | high
    else:
        return _code_of(tl.arange(0, 16))


@triton.jit
def _scales(absmax, nested_absmax, nested_map, nested_offset, block, inside):
    """The float32 absmax of these blocks; anything finite where not inside, unless all of them are not finite."""
    if nested_absmax is None:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    else:
        index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        coarse = tl.load(nested_absmax + (block >> 8), mask=inside, other=0.0)
        scale = tl.load(nested_map + index, mask=inside, other=0.0) * coarse + tl.load(nested_offset)
    return scale


@triton.jit
def permuted_columns(BLOCK_K: tl.constexpr, SEGMENT: tl.constexpr):
    """Which column comes at each place of a tile whose weights are permuted (`weights`)."""
    place = tl.arange(0, BLOCK_K)
    chunk, half, lane = place % SEGMENT // 16, place // 8 % 2, place // 2 % 4
    return place // SEGMENT * SEGMENT + lane * (SEGMENT // 4) + chunk * 4 + half * 2 + place % 2


@triton.jit
def _permuted(packed, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr):
    """Bytes so ordered that what a lane of the tensor core's instructions takes was together in memory."""
    parts = tl.reshape(packed, (SEGMENTS, 4, SEGMENT // 16, 2))
    return tl.reshape(tl.permute(parts, (0, 2, 3, 1)), (SEGMENTS, SEGMENT // 2))


@triton.jit
def weights(
    packed, absmax, nested_absmax, nested_map, nested_offset, table, start, left, inside, DTYPE: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, FORM: tl.constexpr,
    STRADDLES: tl.constexpr, MASKED: tl.constexpr, ENDS: tl.constexpr, PERMUTED: tl.constexpr = False,
):  # fmt: skip
    """[SEGMENTS, SEGMENT] of DTYPE: the elements from `start` (int64 [SEGMENTS]) on, `left` of them where `inside`.

    Segments may be cut short only when MASKED; the rest of such a segment is 0. ALIGNED divides every start, ENDS every
    `left`; a visible multiple of it is loaded in wider pieces. With PERMUTED, only where a segment lies in one block and is not MASKED, the columns come in the order of
    `permuted_columns`.
    """
    inside &= left > 0
    block = start >> SHIFT
    scale = _scales(absmax, nested_absmax, nested_map, nested_offset, block, inside)[:, None]
    if STRADDLES:
        boundary = (((block + 1) << SHIFT) - start).to(tl.int32)
        beyond = inside & (boundary < tl.minimum(left, SEGMENT))
        next_scale = _scales(absmax, nested_absmax, nested_map, nested_offset, block + 1, beyond)[:, None]

    if FORM == "nibbles":
        column = tl.arange(0, SEGMENT)[None, :]
        number = start[:, None] + column
        byte = tl.load(packed + (number >> 1), mask=inside[:, None] & (column < left[:, None]), other=0).to(tl.int32)
        index = tl.where(number % 2 == 0, byte >> 4, byte & 15)
        value = tl.reshape(tl.gather(table, tl.reshape(index, (SEGMENTS * SEGMENT,)), 0), (SEGMENTS, SEGMENT))
        if STRADDLES:
            scale = tl.where(column < boundary[:, None], scale, next_scale)
        weight = (value * scale).to(DTYPE)
    else:
        column = tl.arange(0, SEGMENT // 2)[None, :]
        valid = inside[:, None]
        if MASKED:  # half of an even number: the compiler still sees that several bytes are masked alike
            valid &= column < (((left + 1) >> 1) if ENDS % 2 else (left >> 1))[:, None]
        # Said here, where no later rewriting of the sum takes it away.
        first_byte = tl.multiple_of(start >> 1, ALIGNED // 2)
        byte = tl.load(packed + first_byte[:, None] + column, mask=valid, other=0)
        if PERMUTED:
            byte = _permuted(byte, SEGMENTS, SEGMENT)
        if FORM == "table":
            high, low = _looked_up(byte, scale, DTYPE)
        else:
            flat = tl.reshape(byte.to(tl.int32), (SEGMENTS * (SEGMENT // 2),))
            pair = tl.reshape(tl.gather(table, flat, 0), (SEGMENTS, SEGMENT // 2))
            low_scale = scale
            if STRADDLES:
                low_scale = tl.where(2 * column + 1 < boundary[:, None], scale, next_scale)
                scale = tl.where(2 * column < boundary[:, None], scale, next_scale)
            high = (pair.to(tl.int32).to(tl.float32, bitcast=True) * scale).to(DTYPE)
            low = ((pair >> 32).to(tl.int32).to(tl.float32, bitcast=True) * low_scale).to(DTYPE)
        weight = tl.reshape(tl.join(high, low), (SEGMENTS, SEGMENT))
    if MASKED:
        weight = tl.where(tl.arange(0, SEGMENT)[None, :] < left[:, None], weight, tl.zeros_like(weight))
    return weight


@triton.jit
def _looked_up(byte, scale, DTYPE: tl.constexpr):
    """(weights of the high halves, of the low halves) of `byte`, whose rows have one absmax each."""
    table_assembly: tl.constexpr = _TABLE_OF_BFLOAT16 if DTYPE == tl.bfloat16 else _TABLE_OF_FLOAT16
    t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
        table_assembly, _TABLE_OPERANDS, [scale], dtype=(tl.int32,) * 8, is_pure=True, pack=1
    )
    operands = [byte, t0, t1, t2, t3, t4, t5, t6, t7]
    # Spelled twice: the compiler takes no tuple of types that is computed.
    if DTYPE == tl.bfloat16:
        high, low = tl.inline_asm_elementwise(
            _LOOKUP, _LOOKUP_OPERANDS, operands, dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        high, low = tl.inline_asm_elementwise(
            _LOOKUP, _LOOKUP_OPERANDS, operands, dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return high, low
