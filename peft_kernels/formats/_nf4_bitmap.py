"""NF4 of a pruned weight: one bit for every weight and the 4-bit codes of the kept ones.

The codes stand in the order of the flattened matrix, two to a byte, as NF4's own; the absmax values are those of the
NF4 weight as they are. So each kept weight decodes to exactly the bits that it has in the NF4 weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.mask import WORD_BITS, PackedMask, pack, popcount
from peft_kernels.formats.nf4 import NF4Weight, from_layout

LAYOUT = "nf4+bitmap"
_OWN = 3  # tensors before those of the absmax


class Nf4BitmapWeight(NamedTuple):
    """A matrix in 4 bits of which some weights are kept. Frozen.

    Attributes:
        codes: uint8 [ceil(nnz / 2)], the codes of kept weights, the earlier one of two in the high half.
        words: int32 [out_features, ceil(in_features / 32)]: of the `PackedMask` of the kept weights.
        row_starts: int64 [out_features + 1]: how many weights are kept before each row.
        scales: the NF4 weight without its codes: `packed` is empty.
        kept: nnz, how many weights are kept.
    """

    codes: Tensor
    words: Tensor
    row_starts: Tensor
    scales: NF4Weight
    kept: int

    @property
    def layout(self) -> str:
        return LAYOUT

    @property
    def tensors(self) -> list[Tensor]:
        """[codes, words, row_starts], then absmax, and with double quantisation its three tensors."""
        return [self.codes, self.words, self.row_starts, *self.scales.tensors[1:]]

    @property
    def numbers(self) -> list[int]:
        """nnz, then the `layout` of the NF4 weight, which begins with out_features and in_features."""
        return [self.kept, *self.scales.layout]

    @property
    def shape(self) -> torch.Size:
        return self.scales.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight that was quantised. Products are computed with weights rounded once to the dtype of x."""
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def density(self) -> float:
        """Kept weights / all weights; 1.0 of an empty matrix."""
        return self.kept / self.shape.numel() if self.shape.numel() else 1.0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def mask(self) -> PackedMask:
        """Which weights are kept."""
        return PackedMask(self.words, self.shape)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Nf4BitmapWeight:
        """The same shape over other tensors, in the order of `tensors`."""
        codes, words, row_starts, *scales = tensors
        return self._replace(
            codes=codes, words=words, row_starts=row_starts, scales=self.scales.with_tensors([codes[:0], *scales])
        )

    def to(self, device: torch.device | str) -> Nf4BitmapWeight:
        """The same weight on another device; itself where it is there already."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """[out_features, in_features] with zeros where nothing is kept, in `dtype` (None: what was quantised)."""
        return self._part(slice(0, self.shape[0]), 0, self.shape[1], dtype)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) of `dense`."""
        return self._part(slice(start, stop), 0, self.shape[1], dtype)

    def dense_columns(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Columns [start, stop) of `dense`."""
        return self._part(slice(0, self.shape[0]), start, stop, dtype)

    def _part(self, rows: slice, start: int, stop: int, dtype: torch.dtype | None) -> Tensor:
        from peft_kernels.formats import nf4
        from peft_kernels.kernels.reference.nf4_dequantize import absmax

        first = start // WORD_BITS
        words = self.words[rows]
        wide = torch.ops.peft_kernels.mask_unpack(words[:, first : -(-stop // WORD_BITS)], stop - first * WORD_BITS)
        # The place of a kept weight's code is how many are kept before it.
        before = self.row_starts[rows] + popcount(words[:, :first]).sum(1)
        places = (before.unsqueeze(1) + wide.cumsum(1) - 1)[:, start - first * WORD_BITS :]
        kept = wide[:, start - first * WORD_BITS :]
        places = torch.where(kept, places, 0)
        if self.codes.numel():
            pairs = self.codes[places // 2].int()
            indices = torch.where(places % 2 == 0, pairs >> 4, pairs & 15)
        else:
            indices = torch.zeros_like(places)
        numbers = _numbers(self.scales, rows, start, stop, self.device)
        values = nf4.code(self.device)[indices.long()] * absmax(self.scales, numbers // self.scales.blocksize)
        return torch.where(kept, values, 0).to(dtype or self.dtype)

    def check(self, where: str) -> None:
        """Refuses what is no such weight (waits for the device): for what comes from a file.

        Raises:
            ValueError: a tensor too short or of another dtype, or counts that are not those of the bits.
        """
        from peft_kernels.checks import check_mask, check_nf4

        check_mask(where, "words", self.mask)
        blank = torch.empty(-(-_end(self.scales) // 2), dtype=torch.uint8, device=self.device)
        check_nf4(where, "the NF4 weight", self.scales._replace(packed=blank))
        expected = (-(-self.kept // 2),)
        if self.codes.dtype != torch.uint8 or self.codes.shape != expected:
            raise ValueError(
                f"{where}: codes have dtype {self.codes.dtype} and shape {tuple(self.codes.shape)}; expected "
                f"torch.uint8 and {expected} for {self.kept} kept weights"
            )
        if not torch.equal(self.row_starts, _row_starts(self.words)) or int(self.row_starts[-1]) != self.kept:
            raise ValueError(f"{where}: row_starts are not the counts of the bits")
        if bool((self.mask - (self.mask & _inside(self.mask))).words.any()):
            raise ValueError(f"{where}: bits beyond the last column are set")


def _inside(mask: PackedMask) -> PackedMask:
    from peft_kernels.formats.mask import full

    return full(*mask.shape, device=mask.device)


def _end(q: NF4Weight) -> int:
    """One past the number of the last element."""
    n, k, stride, first, *_ = q.layout
    return first + (n - 1) * stride + k if n and k else 0


def _numbers(q: NF4Weight, rows: slice, start: int, stop: int, device: torch.device) -> Tensor:
    """Numbers of elements in the flattened whole, int64 [rows, stop - start]."""
    _, _, stride, first, *_ = q.layout
    lines = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1) * stride + first
    return lines + torch.arange(start, stop, device=device)


def _row_starts(words: Tensor) -> Tensor:
    return F.pad(popcount(words).sum(1).cumsum(0), (1, 0))


def compress_nf4(q: NF4Weight, mask: PackedMask | None) -> Nf4BitmapWeight:
    """Keeps the weights that are not 0, or those of the mask."""
    from peft_kernels.kernels.reference.nf4_dequantize import forward

    mask = pack(forward(q._replace(dtype=torch.float32))) if mask is None else mask
    n, k = q.shape
    numbers = _numbers(q, slice(0, n), 0, k, q.device)[mask.unpack()]
    pairs = q.packed[numbers // 2]
    codes = F.pad(torch.where(numbers % 2 == 0, pairs >> 4, pairs & 15), (0, len(numbers) % 2)).view(-1, 2)
    packed = codes[:, 0] << 4 | codes[:, 1]
    scales = q._replace(packed=packed[:0])
    return Nf4BitmapWeight(packed, mask.words, _row_starts(mask.words), scales, len(numbers))


def from_numbers(tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype) -> Nf4BitmapWeight:
    """The weight that `tensors` and `numbers` describe; its elements round to `dtype`."""
    codes, words, row_starts = tensors[:_OWN]
    scales = from_layout((codes[:0], *tensors[_OWN:]), numbers[1:], dtype)
    return Nf4BitmapWeight(codes, words, row_starts, scales, numbers[0])
