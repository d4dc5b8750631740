"""The same mask on every rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from peft_kernels.formats.mask import PackedMask


def broadcast_masks(masks: Mapping[str, PackedMask], src: int = 0, group=None) -> dict[str, PackedMask]:
    """One rank's masks on all: collective, 1 bit a weight.

    Masks of the same weights or scores are the same on every rank by themselves: selection is deterministic. This is
    for scores that differ by rank and are not summed first.

    Args:
        masks: by name, of the same layers in the same order everywhere.
        src: the global rank whose masks are taken.
        group: a process group; None is the default one.

    Returns:
        New masks; the given ones, where torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return dict(masks)
    result = {}
    for name, mask in masks.items():
        words = mask.words.contiguous().clone()
        dist.broadcast(words, src, group=group)
        result[name] = mask._replace(words=words)
    return result
