"""`lora_swiglu_mlp` from the implementations of `lora_linear_group` and `gated_activation` that dispatch chooses.

Backward recomputes the hidden activation once, for dA of the down projection.
"""

from __future__ import annotations

from peft_kernels.kernels.reference.lora_swiglu_mlp import backward_by, forward_by
from peft_kernels.ops import gated_activation, lora_linear_group


def unsupported(problem) -> str | None:
    return None


def forward(*arguments):
    return forward_by(lora_linear_group.select, gated_activation.select, *arguments)


def backward(*arguments):
    return backward_by(lora_linear_group.select, gated_activation.select, *arguments)
