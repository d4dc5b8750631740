"""The kernel of `nf4_dequantize`; its host side is in the file without the underscore."""

from __future__ import annotations

import triton
import triton.language as tl

from peft_kernels.kernels.triton._nf4_tile import codes, weights


@triton.jit
def nf4_dequantize(
    packed, absmax, nested_absmax, nested_map, nested_offset, first, row_stride, out, rows, columns, per_row,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, FORM: tl.constexpr,
    STRADDLES: tl.constexpr, MASKED: tl.constexpr, ENDS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] (contiguous). A program decodes BLOCK of the `per_row` = ceil(columns / SEGMENT) segments
    that each row has. FLAT when there is one row."""
    columns = columns // ENDS * ENDS  # the same number, but the compiler sees how far rows are aligned
    origin = tl.program_id(0).to(tl.int64) * BLOCK
    if FLAT and MASKED:
        # One segment of all is short. Only its program pays for masks, which would take the others' vector accesses,
        # and reads single bytes, because the last word may be cut short too.
        if (origin + BLOCK) * SEGMENT <= columns:
            _segments(
                packed, absmax, nested_absmax, nested_map, nested_offset, first, row_stride, out, origin, rows, columns,
                per_row, BLOCK, SEGMENT, SHIFT, ALIGNED, FORM, STRADDLES, False, ENDS, FLAT,
            )  # fmt: skip
        else:
            _segments(
                packed, absmax, nested_absmax, nested_map, nested_offset, first, row_stride, out, origin, rows, columns,
                per_row, BLOCK, SEGMENT, SHIFT, ALIGNED, "pairs" if FORM == "table" else FORM, STRADDLES, True, ENDS,
                FLAT,
            )  # fmt: skip
    else:
        _segments(
            packed, absmax, nested_absmax, nested_map, nested_offset, first, row_stride, out, origin, rows, columns,
            per_row, BLOCK, SEGMENT, SHIFT, ALIGNED, FORM, STRADDLES, MASKED, ENDS, FLAT,
        )  # fmt: skip


@triton.jit
def _segments(
    packed, absmax, nested_absmax, nested_map, nested_offset, first, row_stride, out, origin, rows, columns, per_row,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, SHIFT: tl.constexpr, ALIGNED: tl.constexpr, FORM: tl.constexpr,
    STRADDLES: tl.constexpr, MASKED: tl.constexpr, ENDS: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """BLOCK segments from number `origin` (int64) on. Numbers within a program have 32 bits."""
    number = tl.arange(0, BLOCK)
    inner = tl.arange(0, SEGMENT)[None, :]
    if FLAT:
        start = first + origin * SEGMENT + number * SEGMENT
        out += origin * SEGMENT
        to = number * SEGMENT
        left = tl.minimum(columns - origin * SEGMENT, BLOCK * SEGMENT).to(tl.int32) - to
        inside = number < tl.minimum(per_row - origin, BLOCK).to(tl.int32)
    else:
        above, number = origin // per_row, (origin % per_row).to(tl.int32) + number
        row, column = number // per_row, number % per_row * SEGMENT
        start = first + (above + row) * row_stride + column
        out += above * columns
        to = row.to(tl.int64) * columns + column
        left = columns - column
        inside = row < tl.minimum(rows - above, BLOCK).to(tl.int32)
    weight = weights(
        packed, absmax, nested_absmax, nested_map, nested_offset, codes(FORM), start, left, inside,
        out.dtype.element_ty, BLOCK, SEGMENT, SHIFT, ALIGNED, FORM, STRADDLES, MASKED, ENDS,
    )  # fmt: skip
    valid = inside[:, None]
    if MASKED:
        valid &= inner < left[:, None]
    tl.store(out + to[:, None] + inner, weight, mask=valid)
