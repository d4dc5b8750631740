"""Pruning: which weights of a model are kept, as masks of one bit a weight, and what trains with them.

masks = magnitude_masks(model, 0.5)        # or wanda_masks, add_movement, LotteryTicket
apply_masks(model, masks)                  # linear layers become MaskedLinear
Trainer(model, ..., callbacks=[PruningCallback(Cubic(0.8, 100, 900))])   # or gradually, while it trains
"""

from typing import Any

from peft_kernels.pruning.apply import apply_masks, keep_zeros, mask_optimizer_state, masks_of
from peft_kernels.pruning.blocks import block_scores, whole_blocks
from peft_kernels.pruning.distributed import broadcast_masks
from peft_kernels.pruning.lottery import LotteryReport, LotteryTicket
from peft_kernels.pruning.magnitude import magnitude_masks
from peft_kernels.pruning.movement import (
    add_movement,
    finalize_movement,
    movement_layers,
    score_parameters,
    set_sparsity,
)
from peft_kernels.pruning.movement_linear import MovementLinear
from peft_kernels.pruning.n_m import keep_n_of_m, keep_transposable_2_of_4
from peft_kernels.pruning.report import SparsityReport, sparsity_report
from peft_kernels.pruning.schedule import Constant, Cubic, Linear
from peft_kernels.pruning.thresholds import keep_largest, keep_largest_by_row, kth_largest
from peft_kernels.pruning.wanda import InputNorms, wanda_masks

__all__ = [
    "Constant",
    "Cubic",
    "InputNorms",
    "Linear",
    "LotteryReport",
    "LotteryTicket",
    "MovementCallback",
    "MovementLinear",
    "PruningCallback",
    "SparsityReport",
    "add_movement",
    "apply_masks",
    "block_scores",
    "broadcast_masks",
    "finalize_movement",
    "keep_largest",
    "keep_largest_by_row",
    "keep_n_of_m",
    "keep_transposable_2_of_4",
    "keep_zeros",
    "kth_largest",
    "magnitude_masks",
    "mask_optimizer_state",
    "masks_of",
    "movement_layers",
    "score_parameters",
    "set_sparsity",
    "sparsity_report",
    "wanda_masks",
    "whole_blocks",
]


def __getattr__(name: str) -> Any:
    # transformers is not a requirement, and slow to import.
    if name in ("MovementCallback", "PruningCallback"):
        from peft_kernels.pruning import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
