"""Modules: they own parameters, state and representation, and hold no maths."""

from peft_kernels.nn.adapter import add_lora, merge_adapter, trainable_parameters, unmerge_adapter
from peft_kernels.nn.adapter_files import load_adapter, save_adapter
from peft_kernels.nn.lora import FusedLoRALinear

__all__ = [
    "FusedLoRALinear",
    "add_lora",
    "load_adapter",
    "merge_adapter",
    "save_adapter",
    "trainable_parameters",
    "unmerge_adapter",
]
