"""Compressed pruned weights, frozen but for block values: what `sparse_linear` multiplies with.

Layouts, and what a weight takes at density d (bytes of a 16-bit weight, 2 dense):

    "bitmap"  1 bit for every weight and the kept numbers: 0.125 + 2 d, and padding (`formats.bitmap`)
    "csr"     the kept numbers and their columns: 4 d, and padding (`formats.csr`)
    "2:4"     two of four neighbours, with two bits each for their places: 1.125
    "block"   whole blocks of 32, 64 or 128: 2 d', d' the density of blocks
    bitmap over NF4: 1 bit for every weight, 4 bits for the kept ones, and the absmax values: 0.125 + 0.5 d + 0.016

Every weight has `layout`, `tensors` and `numbers` (what the op is given), `shape`, `dtype`, `device`, `density`,
`nbytes`, `dense`, `to` and `with_tensors`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels.formats import _block, _nf4_bitmap, _semi_structured, bitmap, csr
from peft_kernels.formats._block import BlockWeight
from peft_kernels.formats._nf4_bitmap import Nf4BitmapWeight
from peft_kernels.formats._semi_structured import SemiStructuredWeight
from peft_kernels.formats.bitmap import BitmapWeight, compress_bitmap
from peft_kernels.formats.csr import CsrWeight, compress_csr
from peft_kernels.formats.mask import PackedMask
from peft_kernels.formats.nf4 import NF4Weight

BITMAP = "bitmap"
LAYOUTS = (BITMAP, csr.LAYOUT, _semi_structured.LAYOUT, _block.LAYOUT)

__all__ = [
    "LAYOUTS", "BitmapWeight", "BlockWeight", "CsrWeight", "Nf4BitmapWeight", "SemiStructuredWeight", "SparseWeight",
    "compress", "from_numbers", "load", "save",
]  # fmt: skip


SparseWeight = BitmapWeight | CsrWeight | SemiStructuredWeight | BlockWeight | Nf4BitmapWeight
"""A compressed weight [out_features, in_features], immutable."""


def compress(
    weight: Tensor | NF4Weight,
    layout: str = BITMAP,
    *,
    block: int = 64,
    mask: PackedMask | None = None,
    keep_transpose: bool = True,
) -> SparseWeight:
    """Compresses a pruned weight, once for the many calls that use it (waits for the device).

    Numbers that are kept keep their bits, infinities and NaN too. -0 outside the mask counts as 0.

    Args:
        weight: [out_features, in_features], floating-point, any strides; or with layout "bitmap" an `NF4Weight`, whose
            kept weights stay in the same 4 bits.
        layout: "bitmap", "csr", "2:4" or "block".
        block: of layout "block": the side of a block, 32, 64 or 128.
        mask: which weights are kept, on the weight's device; None keeps those that are not 0. With layout "block"
            every block that holds one is kept whole, zeros where the mask keeps nothing.
        keep_transpose: of layout "2:4": whether a GPU may hold a transposed copy beside the weight, so that dx too is
            a sparse product. Only weights that are 2:4 along rows and columns allow one.

    Returns:
        A compressed weight. Later changes of `weight` do not reach it.

    Raises:
        ValueError: no matrix, no such layout or block, a mask of another shape or device, or a weight that is not 2:4.
        TypeError: no floating-point weight, or an `NF4Weight` with another layout than "bitmap".
    """
    from peft_kernels.checks import check_floating, check_mask_of, check_nf4, shape_text

    if layout not in LAYOUTS:
        raise ValueError(f"compress: layout is {layout!r}; expected one of {', '.join(map(repr, LAYOUTS))}")
    if isinstance(weight, NF4Weight):
        check_nf4("compress", "weight", weight)
        if layout != BITMAP:
            raise TypeError(f"compress: weight is an NF4Weight, which only layout 'bitmap' takes; got {layout!r}")
    else:
        check_floating("compress", "weight", weight)
    if len(weight.shape) != 2:
        raise ValueError(f"compress: weight has shape {shape_text(weight.shape)}; expected (out_features, in_features)")
    if mask is not None:
        check_mask_of("compress", "mask", mask, weight)
    if isinstance(weight, NF4Weight):
        return _nf4_bitmap.compress_nf4(weight, mask)
    with torch.no_grad():
        return _compress(weight.detach(), layout, block, mask, keep_transpose)


def _compress(weight, layout, block, mask, keep_transpose) -> SparseWeight:
    if layout == BITMAP:
        return compress_bitmap(weight, mask)
    if layout == csr.LAYOUT:
        return compress_csr(weight, mask)
    kept = None if mask is None else mask.unpack()
    if kept is not None:
        weight = torch.where(kept, weight, 0)
    if layout == _block.LAYOUT:
        return _block.compress_blocks(weight, block, kept)
    return _semi_structured.compress_2_4(weight, kept, keep_transpose)


def from_numbers(layout: str, tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype) -> SparseWeight:
    """The weight whose `layout`, `tensors` and `numbers` these are. Nothing is checked.

    Args:
        dtype: what the elements of a weight in 4 bits round to; others have a dtype of their own.

    Raises:
        ValueError: no such layout.
    """
    if layout == _block.LAYOUT:
        values, indices, starts = tensors
        return BlockWeight(values, indices, starts, torch.Size(numbers[:2]))
    if layout == _semi_structured.LAYOUT:
        values, places = tensors
        return SemiStructuredWeight(values, places, torch.Size(numbers[:2]), bool(numbers[2]))
    if layout == _nf4_bitmap.LAYOUT:
        return _nf4_bitmap.from_numbers(tensors, numbers, dtype)
    if layout == BITMAP:
        return bitmap.from_numbers(tensors, numbers)
    if layout == csr.LAYOUT:
        return csr.from_numbers(tensors, numbers)
    raise ValueError(f"sparse weight: no layout {layout!r}")


def save(weights, path) -> None:
    """Writes weights to a file: see `formats._sparse_files.save`."""
    from peft_kernels.formats import _sparse_files

    _sparse_files.save(weights, path)


def load(path, device: torch.device | str = "cpu") -> dict[str, SparseWeight]:
    """Reads what `save` wrote: see `formats._sparse_files.load`."""
    from peft_kernels.formats import _sparse_files

    return _sparse_files.load(path, device)
