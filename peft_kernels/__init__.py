"""Fused kernels for parameter-efficient fine-tuning, as drop-in PyTorch modules."""

from __future__ import annotations

from peft_kernels import functional
from peft_kernels.dispatch import explain, use_backend
from peft_kernels.formats.pool import AdapterPool
from peft_kernels.integrations import accelerate, restore
from peft_kernels.nn import (
    FusedLoRAEmbedding,
    FusedLoRAExperts,
    FusedLoRAGroup,
    FusedLoRALinear,
    FusedLoRASwiGLU,
    FusedQLoRAExperts,
    FusedQLoRALinear,
    MaskedLinear,
    MaskedLoRALinear,
    MergeError,
    MultiLoRALinear,
    MultiMaskLinear,
    NF4Linear,
    SparseDeltaLinear,
    SparseLinear,
    add_lora,
    attach_masks,
    attach_pool,
    detach_masks,
    detach_pool,
    load_adapter,
    merge_adapter,
    quantize_linears,
    replace_pruned,
    save_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from peft_kernels.parity import check

__version__ = "0.1.0"

__all__ = [
    "AdapterPool",
    "FusedLoRAEmbedding",
    "FusedLoRAExperts",
    "FusedLoRAGroup",
    "FusedLoRALinear",
    "FusedLoRASwiGLU",
    "FusedQLoRAExperts",
    "FusedQLoRALinear",
    "MaskedLinear",
    "MaskedLoRALinear",
    "MergeError",
    "MultiLoRALinear",
    "MultiMaskLinear",
    "NF4Linear",
    "SparseDeltaLinear",
    "SparseLinear",
    "accelerate",
    "add_lora",
    "attach_masks",
    "attach_pool",
    "check",
    "detach_masks",
    "detach_pool",
    "explain",
    "functional",
    "load_adapter",
    "merge_adapter",
    "quantize_linears",
    "replace_pruned",
    "restore",
    "save_adapter",
    "trainable_parameters",
    "unmerge_adapter",
    "use_backend",
]
