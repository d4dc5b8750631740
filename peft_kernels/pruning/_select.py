"""From scores of several layers to their masks: how much is kept, and by which unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_kernels.checks import check_probability
from peft_kernels.formats.mask import PackedMask
from peft_kernels.pruning._scores import Scores, inside
from peft_kernels.pruning.blocks import block_scores, check_block, whole_blocks
from peft_kernels.pruning.n_m import keep_n_of_m
from peft_kernels.pruning.thresholds import keep_largest, keep_largest_by_row

SCOPES = ("global", "layer", "row")


def kept_count(total: int, sparsity: float) -> int:
    """How many of `total` are kept: total - round(sparsity · total), halves rounded to even."""
    return total - round(sparsity * total)


def check_amount(where: str, sparsity: Any, scope: str, n_of_m: Any, block: Any) -> None:
    """Checks what says how much is kept.

    Raises:
        ValueError: a sparsity outside [0, 1], an unknown scope, or two things said at once.
        TypeError: the sparsity is no number.
    """
    if scope not in SCOPES:
        raise ValueError(f"{where}: scope is {scope!r}; expected one of {', '.join(SCOPES)}")
    if n_of_m is not None:
        if sparsity is not None or block is not None:
            raise ValueError(f"{where}: n_of_m says how much is kept; expected neither sparsity nor block beside it")
        if not isinstance(n_of_m, (tuple, list)) or len(n_of_m) != 2:
            raise ValueError(f"{where}: n_of_m is {n_of_m!r}; expected two whole numbers")
        return
    if block is not None:
        check_block(where, block)
        if scope == "row":
            raise ValueError(f"{where}: scope is 'row', but a block has several rows; expected 'global' or 'layer'")
    check_probability(where, "sparsity", sparsity)


def select(
    scores: Mapping[str, Scores],
    sparsity: float | None,
    scope: str,
    n_of_m: tuple[int, int] | None,
    block: tuple[int, int] | None,
    within: Mapping[str, PackedMask] | None = None,
) -> dict[str, PackedMask]:
    """Masks of the largest scores, for arguments that `check_amount` has passed; what `within` prunes stays pruned."""
    if within is not None:
        scores = {name: inside(part, within.get(name)) for name, part in scores.items()}
    if n_of_m is not None:
        return {name: keep_n_of_m(part, *n_of_m) for name, part in scores.items()}
    assert sparsity is not None
    if block is not None:
        blocks = {name: block_scores(part, block) for name, part in scores.items()}
        kept = _largest(blocks, sparsity, scope)
        masks = {name: whole_blocks(mask, block, scores[name].shape) for name, mask in kept.items()}
        # A block that is pruned in part already is kept or pruned by what it has left.
        before = within or {}
        return {name: mask & before[name] if name in before else mask for name, mask in masks.items()}
    return _largest(scores, sparsity, scope)


def _largest(scores: Mapping[str, Any], sparsity: float, scope: str) -> dict[str, PackedMask]:
    if scope == "global":
        total = sum(part.shape.numel() for part in scores.values())
        masks = keep_largest(list(scores.values()), kept_count(total, sparsity))
        return dict(zip(scores, masks, strict=True))
    if scope == "layer":
        return {name: keep_largest(part, kept_count(part.shape.numel(), sparsity)) for name, part in scores.items()}
    return {name: keep_largest_by_row(part, kept_count(part.shape[1], sparsity)) for name, part in scores.items()}
