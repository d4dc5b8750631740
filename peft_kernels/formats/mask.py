"""Masks of one bit a weight.

Bit k % 32 of word [n, k // 32] says whether weight (n, k) is kept; bits beyond the last column are 0. Seen as bytes
(little-endian), byte k // 8 of a row holds columns 8·(k // 8) and up, lowest bit first. A tile of W that is 32 columns
wide or a multiple is a tile of whole words, whichever way round the tile is multiplied: the same words serve W and Wᵀ.
32 times fewer bytes than a float32 mask, as `torch.nn.utils.prune` keeps one beside each weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.formats.positions import Positions, positions

WORD_BITS = 32


def words_of(columns: int) -> int:
    """Words in a row of a mask."""
    return -(-columns // WORD_BITS)


class PackedMask(NamedTuple):
    """Which weights of a matrix are kept. Immutable: set operations make new ones.

    Attributes:
        words: int32 [out_features, ceil(in_features / 32)], on the weight's device; rows may be strided.
        shape: of the weight, [out_features, in_features].
    """

    words: Tensor
    shape: torch.Size

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    def kept(self) -> Tensor:
        """How many weights are kept: int64 [], on the device, without a wait for it."""
        return popcount(self.words).sum()

    def density(self) -> float:
        """Kept weights / all weights, a number on the host (which waits for the device); 1.0 of an empty matrix."""
        return int(self.kept()) / self.shape.numel() if self.shape.numel() else 1.0

    def equal(self, other: PackedMask) -> bool:
        """Whether both keep the same weights of matrices of the same shape (waits for the device)."""
        return self.shape == other.shape and torch.equal(self.words, other.words.to(self.device))

    def unpack(self) -> Tensor:
        """bool [out_features, in_features]."""
        return unpack(self)

    def to(self, device: torch.device | str) -> PackedMask:
        """The same mask on another device; itself where it is there already."""
        return self._replace(words=self.words.to(device))

    def rows(self, start: int, stop: int) -> PackedMask:
        """Rows [start, stop), sharing the memory."""
        return PackedMask(self.words[start:stop], torch.Size((stop - start, self.shape[1])))

    def positions(self) -> Positions:
        """The kept weights' places in the flattened matrix, ascending: the order of compact gradients."""
        return positions(self.unpack().flatten().nonzero().squeeze(1), self.shape)

    def __and__(self, other: PackedMask) -> PackedMask:  # type: ignore[override]
        return self._replace(words=self.words & self._beside(other).words)

    def __or__(self, other: PackedMask) -> PackedMask:  # type: ignore[override]
        return self._replace(words=self.words | self._beside(other).words)

    def __xor__(self, other: PackedMask) -> PackedMask:
        return self._replace(words=self.words ^ self._beside(other).words)

    def __sub__(self, other: PackedMask) -> PackedMask:
        """What this keeps and `other` does not."""
        return self._replace(words=self.words & ~self._beside(other).words)

    def __invert__(self) -> PackedMask:
        """What this does not keep."""
        return full(*self.shape, device=self.device) - self

    def _beside(self, other: PackedMask) -> PackedMask:
        if not isinstance(other, PackedMask):
            raise TypeError(f"PackedMask: the other mask is {type(other).__name__}; expected a PackedMask")
        if other.shape != self.shape:
            raise ValueError(f"PackedMask: shapes {tuple(self.shape)} and {tuple(other.shape)}; expected the same")
        if other.device != self.device:
            raise ValueError(f"PackedMask: devices {self.device} and {other.device}; expected the same")
        return other


class PackedMaskStack(NamedTuple):
    """Masks of one matrix, one behind another, as `multi_mask_linear` reads them.

    Attributes:
        words: int32 [masks, out_features, ceil(in_features / 32)].
        shape: of the matrix, [out_features, in_features].
    """

    words: Tensor
    shape: torch.Size

    @property
    def device(self) -> torch.device:
        return self.words.device

    def __len__(self) -> int:
        """How many masks."""
        return self.words.shape[0]

    def mask(self, i: int) -> PackedMask:
        """Mask i, sharing the memory."""
        return PackedMask(self.words[i], self.shape)

    def to(self, device: torch.device | str) -> PackedMaskStack:
        return self._replace(words=self.words.to(device))


def stack(masks: Sequence[PackedMask]) -> PackedMaskStack:
    """Copies masks into one tensor.

    Raises:
        ValueError: no mask, or masks of several shapes or devices.
    """
    if not masks:
        raise ValueError("stack: no masks; expected at least one")
    for i, mask in enumerate(masks):
        if (mask.shape, mask.device) != (masks[0].shape, masks[0].device):
            raise ValueError(
                f"stack: masks[{i}] has shape {tuple(mask.shape)} on {mask.device}, masks[0] {tuple(masks[0].shape)} "
                f"on {masks[0].device}; expected the same"
            )
    return PackedMaskStack(torch.stack([mask.words for mask in masks]), masks[0].shape)


def popcount(words: Tensor) -> Tensor:
    """The number of ones in each word, int64: sums of neighbouring 1, 2, 4, ... bits."""
    bits = words.to(torch.int64) & 0xFFFFFFFF
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) & 0xFFFFFFFF) >> 24


def tail_bits(mask: PackedMask) -> Tensor:
    """int32 [out_features], or nothing where rows end with a word: the bits beyond the last column, 0 in every mask."""
    used = mask.shape[1] % WORD_BITS
    return mask.words[:, -1] & ~((1 << used) - 1) if used else mask.words[:, :0].flatten()


def pack(mask: Tensor) -> PackedMask:
    """Packs a mask: see `functional.mask_pack`.

    Args:
        mask: [out_features, in_features], bool or of any number dtype: what is not 0 is kept. (NaN is no 0.)
    """
    from peft_kernels.functional import mask_pack

    return mask_pack(mask)


def unpack(mask: PackedMask) -> Tensor:
    """bool [out_features, in_features]: see `functional.mask_unpack`."""
    from peft_kernels.functional import mask_unpack

    return mask_unpack(mask)


def full(out_features: int, in_features: int, *, device: torch.device | str = "cpu") -> PackedMask:
    """The mask that keeps everything."""
    words = torch.full((out_features, words_of(in_features)), -1, dtype=torch.int32, device=device)
    if in_features % WORD_BITS:
        words[:, -1] = (1 << in_features % WORD_BITS) - 1
    return PackedMask(words, torch.Size((out_features, in_features)))


def empty(out_features: int, in_features: int, *, device: torch.device | str = "cpu") -> PackedMask:
    """The mask that keeps nothing."""
    words = torch.zeros(out_features, words_of(in_features), dtype=torch.int32, device=device)
    return PackedMask(words, torch.Size((out_features, in_features)))
