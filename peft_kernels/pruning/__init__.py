"""Pruning: which weights of a model are kept, as masks of one bit a weight, and what trains with them.

masks = magnitude_masks(model, 0.5)        # or wanda_masks, or trained by movement pruning
apply_masks(model, masks)                  # linear layers become MaskedLinear
trainer = Trainer(model, ..., callbacks=[PruningCallback(Cubic(0.8, 100, 900))])   # or gradually
"""

from peft_kernels.pruning.blocks import block_scores, whole_blocks
from peft_kernels.pruning.magnitude import magnitude_masks
from peft_kernels.pruning.n_m import keep_n_of_m, keep_transposable_2_of_4
from peft_kernels.pruning.schedule import Constant, Cubic, Linear
from peft_kernels.pruning.thresholds import keep_largest, keep_largest_by_row, kth_largest

__all__ = [
    "Constant",
    "Cubic",
    "Linear",
    "block_scores",
    "keep_largest",
    "keep_largest_by_row",
    "keep_n_of_m",
    "keep_transposable_2_of_4",
    "kth_largest",
    "magnitude_masks",
    "whole_blocks",
]
