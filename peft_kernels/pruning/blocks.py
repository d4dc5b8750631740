"""Masks of whole blocks, which kernels can skip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.checks import check_shape
from peft_kernels.formats.mask import PackedMask
from peft_kernels.functional import mask_pack
from peft_kernels.pruning._scores import scores_of


def block_scores(scores: Any, block: tuple[int, int]) -> Tensor:
    """The mean score of each block, over those that are numbers: blocks cut off at an edge compare with whole ones.

    Args:
        scores: [out_features, in_features], floating-point, any strides.
        block: rows and columns of a block.

    Returns:
        [ceil(out_features / rows), ceil(in_features / columns)] in float32 (float64 of float64), NaN where a block has
        nothing else.

    Raises:
        ValueError: no such block, or scores without two dimensions.
        TypeError: no floating-point tensor.
    """
    part = scores_of(scores)
    height, width = check_block("block_scores", block)
    n, k = part.shape
    means = torch.empty(-(-n // height), -(-k // width), dtype=part.dtype, device=part.device)
    for rows, strip in part.strips(multiple=height):
        whole = F.pad(strip, (0, -k % width, 0, -len(strip) % height), value=float("nan"))
        blocks = whole.unflatten(0, (-1, height)).unflatten(2, (-1, width))
        means[rows.start // height : -(-rows.stop // height)] = blocks.nanmean((1, 3))
    return means


def whole_blocks(kept: PackedMask, block: tuple[int, int], shape: Sequence[int]) -> PackedMask:
    """The mask of a matrix from one of its blocks.

    Args:
        kept: a mask of [ceil(out_features / rows), ceil(in_features / columns)] blocks.
        block: rows and columns of a block.
        shape: (out_features, in_features).

    Returns:
        A `PackedMask` of `shape`, on the device of `kept`.

    Raises:
        ValueError: no such block, or a mask of another number of blocks.
    """
    height, width = check_block("whole_blocks", block)
    n, k = shape
    check_shape("whole_blocks", "kept", kept, (-(-n // height), -(-k // width)), f"the matrix is {n} x {k}")
    rows = mask_pack(kept.unpack().repeat_interleave(width, 1)[:, :k])
    return PackedMask(rows.words.repeat_interleave(height, 0)[:n], torch.Size((n, k)))


def check_block(where: str, block: Any) -> tuple[int, int]:
    sizes = tuple(block) if isinstance(block, (tuple, list)) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"{where}: block is {block!r}; expected two whole numbers, rows and columns")
    return sizes
