"""One documented function per op, each in the file of its name: checks its arguments, then calls the op."""

from peft_kernels.functional.dora_linear import dora_linear
from peft_kernels.functional.dora_weight_norm import dora_weight_norm
from peft_kernels.functional.gated_activation import gated_activation
from peft_kernels.functional.lora_embedding import lora_embedding
from peft_kernels.functional.lora_expert_linear import lora_expert_linear
from peft_kernels.functional.lora_linear import lora_linear
from peft_kernels.functional.lora_linear_group import lora_linear_group
from peft_kernels.functional.lora_swiglu_mlp import lora_swiglu_mlp
from peft_kernels.functional.mask_apply import mask_apply, mask_apply_
from peft_kernels.functional.mask_pack import mask_pack
from peft_kernels.functional.mask_unpack import mask_unpack
from peft_kernels.functional.masked_linear import masked_linear
from peft_kernels.functional.masked_lora_linear import masked_lora_linear
from peft_kernels.functional.multi_lora_expert_linear import multi_lora_expert_linear
from peft_kernels.functional.multi_lora_linear import multi_lora_linear, multi_lora_linear_group
from peft_kernels.functional.multi_mask_linear import multi_mask_linear
from peft_kernels.functional.nf4_dequantize import nf4_dequantize
from peft_kernels.functional.nf4_linear import nf4_linear
from peft_kernels.functional.nf4_lora_linear import nf4_lora_linear
from peft_kernels.functional.nf4_quantize import nf4_quantize
from peft_kernels.functional.philox_dropout import philox_dropout
from peft_kernels.functional.sparse_delta_linear import sparse_delta_linear
from peft_kernels.functional.sparse_linear import sparse_linear
from peft_kernels.functional.splitk_reduce import splitk_reduce

__all__ = [
    "dora_linear",
    "dora_weight_norm",
    "gated_activation",
    "lora_embedding",
    "lora_expert_linear",
    "lora_linear",
    "lora_linear_group",
    "lora_swiglu_mlp",
    "mask_apply",
    "mask_apply_",
    "mask_pack",
    "mask_unpack",
    "masked_linear",
    "masked_lora_linear",
    "multi_lora_expert_linear",
    "multi_lora_linear",
    "multi_lora_linear_group",
    "multi_mask_linear",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_lora_linear",
    "nf4_quantize",
    "philox_dropout",
    "sparse_delta_linear",
    "sparse_linear",
    "splitk_reduce",
]
