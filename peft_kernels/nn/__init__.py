"""Modules: they own parameters, state and representation, and hold no maths."""

from peft_kernels.nn._merge import MergeError
from peft_kernels.nn.adapter import add_lora, merge_adapter, trainable_parameters, unmerge_adapter
from peft_kernels.nn.adapter_files import load_adapter, save_adapter
from peft_kernels.nn.embedding import FusedLoRAEmbedding
from peft_kernels.nn.experts import FusedLoRAExperts
from peft_kernels.nn.group import FusedLoRAGroup, FusedLoRASwiGLU
from peft_kernels.nn.lora import FusedLoRALinear
from peft_kernels.nn.masked import MaskedLinear
from peft_kernels.nn.masked_lora import MaskedLoRALinear
from peft_kernels.nn.multi_lora import MultiLoRALinear, attach_pool, detach_pool
from peft_kernels.nn.multi_mask import MultiMaskLinear, Subnetworks, attach_masks, detach_masks
from peft_kernels.nn.nf4 import NF4Linear
from peft_kernels.nn.pruned import replace_pruned
from peft_kernels.nn.qlora import FusedQLoRALinear
from peft_kernels.nn.qlora_experts import FusedQLoRAExperts
from peft_kernels.nn.quantize import quantize_linears
from peft_kernels.nn.sparse import SparseLinear
from peft_kernels.nn.sparse_delta import SparseDeltaLinear

__all__ = [
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
    "Subnetworks",
    "add_lora",
    "attach_masks",
    "attach_pool",
    "detach_masks",
    "detach_pool",
    "load_adapter",
    "merge_adapter",
    "quantize_linears",
    "replace_pruned",
    "save_adapter",
    "trainable_parameters",
    "unmerge_adapter",
]
