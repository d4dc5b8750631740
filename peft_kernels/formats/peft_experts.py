"""The low-rank updates of a stack of experts as Hugging Face PEFT lays them out (`target_parameters`).

PEFT keeps both as matrices: A [experts · r, in_features], expert by expert, and B [out_features, r · experts], where
column i · experts + e belongs to rank i of expert e.
"""

from __future__ import annotations

from torch import Tensor

from peft_kernels.checks import check_shape, shape_text


def from_peft(lora_A: Tensor, lora_B: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's matrices as stacks.

    Args:
        lora_A: [experts · r, in_features].
        lora_B: [out_features, r · experts].
        num_experts: number of experts.

    Returns:
        (A [experts, r, in_features], B [experts, out_features, r]) as `FusedLoRAExperts` has them.

    Raises:
        ValueError: the shapes do not fit each other or the number of experts.
    """
    check_shape("from_peft", "lora_A", lora_A, ("experts * r", "in_features"), "it is PEFT's matrix for a stack")
    rows = lora_A.shape[0]
    if num_experts < 1 or rows % num_experts:
        raise ValueError(
            f"from_peft: lora_A has shape {shape_text(lora_A.shape)}; "
            f"expected rows that divide among {num_experts} experts"
        )
    check_shape("from_peft", "lora_B", lora_B, ("out_features", rows), f"lora_A has {rows} rows")
    r = rows // num_experts
    return lora_A.reshape(num_experts, r, -1), lora_B.reshape(-1, r, num_experts).permute(2, 0, 1)


def to_peft(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `from_peft`: stacks as PEFT's matrices, contiguous."""
    experts, r, k = lora_A.shape
    return lora_A.reshape(experts * r, k), lora_B.permute(1, 2, 0).reshape(lora_B.shape[1], r * experts)
