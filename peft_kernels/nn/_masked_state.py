"""Modules over a pruned weight: their mask, how it moves, is saved and loaded, and what is 0 outside of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peft_kernels.checks import check_mask_of, check_shape
from peft_kernels.formats.mask import PackedMask, pack, tail_bits
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.nn._quantised import Quantised
from peft_kernels.nn._weights import dense_rows


class Masked(Quantised):
    """A module with a weight [out_features, in_features], dense or an `NF4Weight`, and a mask of one bit a weight.

    The mask is the buffer `mask_words`, int32: casts leave it alone, state dicts hold it, and loading replaces it.
    DistributedDataParallel broadcasts it with the other buffers, FSDP leaves it whole in every process.
    """

    mask_words: Tensor
    in_features: int
    out_features: int
    _sparsity: float | None = None

    @property
    def mask(self) -> PackedMask:
        """Which weights are kept. It shares the module's memory; `set_mask` and loading leave it as it was."""
        return PackedMask(self.mask_words, torch.Size((self.out_features, self.in_features)))

    @property
    def sparsity(self) -> float:
        """The part of the weights that the mask leaves out, counted once for each mask (which waits for the device);
        NaN on the meta device."""
        if self._sparsity is None:
            self._sparsity = math.nan if self.mask_words.is_meta else 1.0 - self.mask.density()
        return self._sparsity

    def _put_mask(self, mask: PackedMask) -> None:
        # A copy: loading a state dict writes into it.
        words = mask.words.detach().clone(memory_format=torch.contiguous_format)
        if "mask_words" in self._buffers:
            self.mask_words = words
        else:
            self.register_buffer("mask_words", words)
        self._sparsity = None

    def _mask_loaded(self) -> None:
        """Called after a mask and what it belongs to were loaded."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        words = self.mask_words
        super()._apply(fn, recurse)
        if self.mask_words.dtype != words.dtype:  # .type(dtype) casts integers too
            self.mask_words = words.to(self.mask_words.device)
        self._sparsity = None
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        key = f"{prefix}mask_words"
        problem = words_problem(state_dict[key], self.mask) if key in state_dict else None
        if problem is not None:
            error_msgs.append(f"{key} {problem}")  # before anything of this module is changed
            return
        errors = len(error_msgs)
        self.mask_words = self.mask_words.clone()  # what `mask` gave before stays as it was
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._sparsity = None
        if len(error_msgs) == errors:
            self._mask_loaded()


def words_problem(words: Any, mask: PackedMask) -> str | None:
    """Why what a checkpoint has cannot be words of a mask of this shape."""
    if not isinstance(words, Tensor) or words.dtype != torch.int32:
        return f"is {words.dtype if isinstance(words, Tensor) else type(words).__name__}; expected int32"
    if words.shape != mask.words.shape:
        return f"has shape {tuple(words.shape)}; expected {tuple(mask.words.shape)} of a mask {tuple(mask.shape)}"
    if not words.is_meta and bool(tail_bits(mask._replace(words=words)).any()):
        return f"has bits beyond column {mask.shape[1]}"
    return None


def mask_of(module: str, mask: PackedMask | Tensor | None, weight: Tensor | NF4Weight) -> PackedMask:
    """A mask of the weight: as given, packed if it is a tensor, or of what is not 0 where there is none.

    Raises:
        ValueError: of another shape or device than the weight.
        TypeError: no mask.
    """
    if mask is None:
        return _nonzero(weight)
    if isinstance(mask, Tensor):
        check_shape(module, "mask", mask, tuple(weight.shape), f"weight has shape {tuple(weight.shape)}")
        mask = pack(mask)
    check_mask_of(module, "mask", mask, weight)
    return mask


def _nonzero(weight: Tensor | NF4Weight) -> PackedMask:
    if not isinstance(weight, NF4Weight):
        return pack(weight.detach())
    parts = [pack(rows).words for _, _, rows in dense_rows(weight, torch.float32)]
    empty = torch.empty(0, 0, dtype=torch.int32, device=weight.device)
    return PackedMask(torch.cat(parts) if parts else empty, weight.shape)


def is_masked(weight: Tensor | NF4Weight, mask: PackedMask) -> bool:
    """Whether the weight is 0 outside the mask (waits for the device); of a sharded one nobody knows. On the meta
    device, where nothing is, it is: what is loaded later is made so."""
    if weight.device.type == "meta":
        return True
    if hasattr(weight, "full_tensor"):
        return False
    return not bool((_nonzero(weight) - mask).words.any())
