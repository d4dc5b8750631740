"""Modules: they own parameters, state and representation, and hold no maths."""

from peft_kernels.nn.lora import FusedLoRALinear

__all__ = ["FusedLoRALinear"]
