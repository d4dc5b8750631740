"""Problems to run an op on: drawn tensors, and the op composed of PyTorch's own functions, differentiated by autograd.

The composition shares no code with any implementation but the specification of the dropout mask. `selfcheck` compares
the implementations with it, `tuning.search` measures them on the same problems.
"""

from __future__ import annotations

from collections.abc import Callable

from peft_kernels.problems.base import SCALING, SEED, Case, Draw, Shape, dropped, nested, short
from peft_kernels.problems.compressed import sparse_delta_linear, sparse_linear
from peft_kernels.problems.linear import (
    ACTIVATIONS,
    dora_linear,
    dora_weight_norm,
    gated_activation,
    lora_embedding,
    lora_linear,
    lora_linear_group,
    lora_swiglu_mlp,
    philox_dropout,
    splitk_reduce,
)
from peft_kernels.problems.many import (
    EXPERTS,
    add_chosen,
    expert_rows,
    lora_expert_linear,
    multi_lora_expert_linear,
    multi_lora_linear,
)
from peft_kernels.problems.nf4 import (
    nf4_decoded,
    nf4_dequantize,
    nf4_linear,
    nf4_lora_linear,
    nf4_quantize,
    nf4_weight,
)
from peft_kernels.problems.pruned import (
    mask_apply,
    mask_pack,
    mask_unpack,
    masked_linear,
    masked_lora_linear,
    multi_mask_linear,
)

__all__ = [
    "ACTIVATIONS",
    "BUILDERS",
    "EXPERTS",
    "SCALING",
    "SEED",
    "Case",
    "Draw",
    "Shape",
    "add_chosen",
    "dora_linear",
    "dora_weight_norm",
    "dropped",
    "expert_rows",
    "gated_activation",
    "lora_embedding",
    "lora_expert_linear",
    "lora_linear",
    "lora_linear_group",
    "lora_swiglu_mlp",
    "mask_apply",
    "mask_pack",
    "mask_unpack",
    "masked_linear",
    "masked_lora_linear",
    "multi_lora_expert_linear",
    "multi_lora_linear",
    "multi_mask_linear",
    "nested",
    "nf4_decoded",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_lora_linear",
    "nf4_quantize",
    "nf4_weight",
    "philox_dropout",
    "short",
    "sparse_delta_linear",
    "sparse_linear",
    "splitk_reduce",
]

# What can be drawn from a layer's shape alone.
BUILDERS: dict[str, Callable[[Shape, Draw], Case]] = {
    "lora_linear": lora_linear,
    "lora_linear_group": lora_linear_group,
    "dora_linear": dora_linear,
    "dora_weight_norm": dora_weight_norm,
    "lora_swiglu_mlp": lora_swiglu_mlp,
    "gated_activation": gated_activation,
    "lora_embedding": lora_embedding,
    "lora_expert_linear": lora_expert_linear,
    "multi_lora_linear": multi_lora_linear,
    "multi_lora_expert_linear": multi_lora_expert_linear,
    "masked_linear": masked_linear,
    "masked_lora_linear": masked_lora_linear,
    "multi_mask_linear": multi_mask_linear,
    "philox_dropout": philox_dropout,
}
