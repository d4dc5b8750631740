"""Optimisers for parameters that are chosen weights."""

from peft_kernels.optim.sparse_adamw import SparseAdamW

__all__ = ["SparseAdamW"]
