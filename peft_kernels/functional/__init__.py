"""One documented function per op, each in the file of its name: checks shapes, dtypes and devices, then calls the op."""

from peft_kernels.functional.lora_linear import lora_linear
from peft_kernels.functional.lora_linear_group import lora_linear_group
from peft_kernels.functional.philox_dropout import philox_dropout
from peft_kernels.functional.splitk_reduce import splitk_reduce

__all__ = ["lora_linear", "lora_linear_group", "philox_dropout", "splitk_reduce"]
