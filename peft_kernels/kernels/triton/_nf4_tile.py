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
import struct
from typing import Any, NamedTuple

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

    def whole(self, block_k: int) -> bool:
        """Whether tiles of so many columns consist of segments that are whole and lie in one block: loads then need no
        masks."""
        return not self.options["STRADDLES"] and self.columns % block_k == 0


def layout_of(q: NF4Weight, *, flat: bool = False, widest: int = WIDEST_SEGMENT) -> Layout:
    """The layout of `q`, a matrix, in segments of at most `widest`; `flat`: it is contiguous, taken as a single row."""
    n, k, stride, first, blocksize, _ = q.layout
    if flat:
        k, stride = n * k, 0
    # The largest power of two that divides every row's start, and the one that divides every row's end too.
    starts = math.gcd(stride, first, 1 << 12)
    ends = starts if flat else math.gcd(starts, k)
    longest = min(widest, WIDEST_SEGMENT, blocksize)
    segment = min(longest, ends if ends >= _LEAST_SEGMENT_OF_TABLE else starts)
    if segment < min(longest, _LEAST_SEGMENT_OF_TABLE):
        segment = longest
    within = starts % segment == 0
    if starts % 2:
        form = NIBBLES
    elif within and (flat or k % segment == 0) and _in_words(q, segment) and not _launch.INTERPRETED:
        form = TABLE
    else:
        form = PAIRS
    tensors = (q.packed, q.absmax, q.nested_absmax, q.nested_map, q.nested_offset)
    options = {
        "SEGMENT": segment,
        "SHIFT": blocksize.bit_length() - 1,
        "ALIGNED": min(starts, WIDEST_SEGMENT),
        "FORM": form,
        "STRADDLES": not within,
        "MASKED": k % segment != 0,
        "ENDS": math.gcd(k, WIDEST_SEGMENT),
        # A product and a sum that round apart, as the format has it; nothing else here has one to fuse.
        "enable_fp_fusion": False,
    }
    return Layout((*tensors, first, stride), options, segment, k)


def aligned(q: NF4Weight) -> bool:
    """Whether `layout_of` gives "table" for `q`, a matrix, outside the interpreter. Kernels have other configurations
    where not."""
    _, k, stride, first, blocksize, _ = q.layout
    return _in_words(q, min(WIDEST_SEGMENT, blocksize, math.gcd(stride, first, k, 1 << 12)))


def _in_words(q: NF4Weight, segment: int) -> bool:
    """Whether "table" can decode such segments: its words of 8 weights are 4-byte loads."""
    return segment >= _LEAST_SEGMENT_OF_TABLE and q.dtype.itemsize == 2 and q.packed.data_ptr() % 4 == 0


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
    return f"0f{struct.pack('>f', value).hex().upper()}"


def lookup_assembly() -> str:
    """PTX that looks up the 8 weights $0 ... $7 of a word $8 of packed bytes in the table registers $9 ... $16.

    The three low bits of an index select a byte in each half of a table, its high bit the half. `prmt` takes the
    selectors of 4 results, so the word serves in two steps.
    """
    lines = ["{", ".reg .b32 s, p, a, b, l, h;", "and.b32 s, $8, 0x77777777;", "shr.u32 p, $8, 1;"]
    lines += ["and.b32 p, p, 0x44444444;", "or.b32 p, p, 0x32103210;"]
    for step in (0, 4):
        if step:
            lines += ["shr.u32 s, s, 16;", "shr.u32 p, p, 16;"]
        for byte, t in (("l", 9), ("h", 13)):
            lines += [f"prmt.b32 a, ${t}, ${t + 1}, s;", f"prmt.b32 b, ${t + 2}, ${t + 3}, s;"]
            lines += [f"prmt.b32 {byte}, a, b, p;"]
        # The high half of a byte is the earlier weight.
        for pair, selector in ((0, "0x4051"), (2, "0x6273")):
            lines += [f"prmt.b32 a, l, h, {selector};", f"mov.b32 {{${step + pair}, ${step + pair + 1}}}, a;"]
    return "\n".join([*lines, "}"])


_CODE = tl.constexpr(CODE)
_TABLE_OF_BFLOAT16 = tl.constexpr(table_assembly("bf16x2"))
_TABLE_OF_FLOAT16 = tl.constexpr(table_assembly("f16x2"))
_TABLE_OPERANDS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,f")
_LOOKUP = tl.constexpr(lookup_assembly())
_LOOKUP_OPERANDS = tl.constexpr(",".join(["=&h"] * 8 + ["r"] * 9))


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
def _load(pointers, inside):
    """0 where not inside; `inside` None: everywhere."""
    if inside is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit
def _scales(absmax, nested_absmax, nested_map, nested_offset, block, inside):
    """The float32 absmax of these blocks; where not inside, a number that is finite if the nested offset is."""
    if nested_absmax is None:
        scale = _load(absmax + block, inside)
    else:
        index = _load(absmax + block, inside).to(tl.int32)
        scale = _load(nested_map + index, inside) * _load(nested_absmax + (block >> 8), inside)
        scale += tl.load(nested_offset)
    return scale


@triton.jit
def permuted(weight, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile [ROWS, COLUMNS] whose columns are so ordered that what a lane of sm_90's warp-group instructions takes of
    a row, 4 of every 16, was together in memory: a lane then makes the tables of few blocks."""
    parts = tl.permute(tl.reshape(weight, (ROWS, 4, COLUMNS // 16, 2, 2)), (0, 2, 3, 1, 4))
    return tl.reshape(parts, (ROWS, COLUMNS))


@triton.jit
def permuted_columns(COLUMNS: tl.constexpr):
    """Which column comes at each place of a tile that is `permuted`."""
    place = tl.arange(0, COLUMNS)
    chunk, half, lane = place // 16, place // 8 % 2, place // 2 % 4
    column = lane * (COLUMNS // 4) + chunk * 4 + half * 2 + place % 2
    return tl.max_contiguous(tl.multiple_of(column, 2), 2)


@triton.jit
def weights(
    packed, absmax, nested_absmax, nested_map, nested_offset, table, start, left, inside, DTYPE: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, FORM: tl.constexpr,
    STRADDLES: tl.constexpr, MASKED: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """[SEGMENTS, SEGMENT] of DTYPE: the elements from `start` (int64 [SEGMENTS]) on, `left` of them where `inside`;
    `inside` None: all of every segment.

    Segments may be cut short only when MASKED; the rest of such a segment is 0. ALIGNED divides every start, ENDS every
    `left`; where the compiler sees that it does, several bytes are loaded at once.
    """
    block = start >> SHIFT
    scale = _scales(absmax, nested_absmax, nested_map, nested_offset, block, inside)[:, None]
    column = tl.arange(0, SEGMENT)[None, :]
    if FORM == "table":
        weight = _by_table(packed, scale, start, inside, DTYPE, SEGMENTS, SEGMENT, ALIGNED)
    else:
        if STRADDLES:
            boundary = (((block + 1) << SHIFT) - start).to(tl.int32)
            reaches = inside & (boundary < tl.minimum(left, SEGMENT))
            next_scale = _scales(absmax, nested_absmax, nested_map, nested_offset, block + 1, reaches)[:, None]
            scale = tl.where(column < boundary[:, None], scale, next_scale)
        if FORM == "pairs":
            code = _by_pairs(packed, table, start, left, inside, SEGMENTS, SEGMENT, ALIGNED, MASKED, ENDS)
        else:
            code = _by_nibbles(packed, table, start, left, inside, SEGMENTS, SEGMENT)
        weight = (code * scale).to(DTYPE)
    if MASKED:
        weight = tl.where(column < left[:, None], weight, tl.zeros_like(weight))
    return weight


@triton.jit
def _by_nibbles(packed, table, start, left, inside, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr):
    column = tl.arange(0, SEGMENT)[None, :]
    number = start[:, None] + column
    byte = tl.load(packed + (number >> 1), mask=inside[:, None] & (column < left[:, None]), other=0).to(tl.int32)
    index = tl.where(number % 2 == 0, byte >> 4, byte & 15)
    return tl.reshape(tl.gather(table, tl.reshape(index, (SEGMENTS * SEGMENT,)), 0), (SEGMENTS, SEGMENT))


@triton.jit
def _by_pairs(
    packed, table, start, left, inside, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, SEGMENT // 2)[None, :]
    # Said here, where no later rewriting of the sum takes it away.
    pointers = packed + tl.multiple_of(start >> 1, ALIGNED // 2)[:, None] + column
    if MASKED:  # half of an even number: the compiler still sees that several bytes are masked alike
        valid = inside[:, None] & (column < (((left + 1) >> 1) if ENDS % 2 else (left >> 1))[:, None])
        byte = _load(pointers, valid).to(tl.int32)
    else:
        byte = _load(pointers, None if inside is None else inside[:, None]).to(tl.int32)
    pair = tl.gather(table, tl.reshape(byte, (SEGMENTS * (SEGMENT // 2),)), 0)
    high, low = pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(high, low), (SEGMENTS, SEGMENT))


@triton.jit
def _by_table(
    packed, scale, start, inside, DTYPE: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Weights, already multiplied by their segment's `scale` [SEGMENTS, 1].

    Words of 8 weights, one in each operand: were 4 bytes packed into an operand by the compiler, they could be of
    several segments, whatever its layout puts side by side, and the tables of three of them would be ignored.
    """
    first_word = tl.multiple_of(start >> 3, ALIGNED // 8)
    pointers = packed.to(tl.pointer_type(tl.int32)) + first_word[:, None] + tl.arange(0, SEGMENT // 8)[None, :]
    word = _load(pointers, None if inside is None else inside[:, None])
    making: tl.constexpr = _TABLE_OF_BFLOAT16 if tl.bfloat16 == DTYPE else _TABLE_OF_FLOAT16
    t0, t1, t2, t3, t4, t5, t6, t7 = tl.inline_asm_elementwise(
        making, _TABLE_OPERANDS, [scale], dtype=(tl.int32,) * 8, is_pure=True, pack=1
    )
    operands = [word, t0, t1, t2, t3, t4, t5, t6, t7]
    # Spelled twice: the compiler takes no tuple of types that is computed.
    if tl.bfloat16 == DTYPE:
        e0, e1, e2, e3, e4, e5, e6, e7 = tl.inline_asm_elementwise(
            _LOOKUP, _LOOKUP_OPERANDS, operands, dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1
        )
    else:
        e0, e1, e2, e3, e4, e5, e6, e7 = tl.inline_asm_elementwise(
            _LOOKUP, _LOOKUP_OPERANDS, operands, dtype=(tl.float16,) * 8, is_pure=True, pack=1
        )
    # `join` adds the fastest dimension, so the order is: bit 2 of the number, bit 1, bit 0.
    quads = tl.join(tl.join(e0, e4), tl.join(e2, e6)), tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.reshape(tl.join(quads[0], quads[1]), (SEGMENTS, SEGMENT))
