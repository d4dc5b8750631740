"""`lora_embedding` from PyTorch's embedding kernels: two gathers, and one update of the result in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.kernels.composed._passes import cast, sum_over_rows


def unsupported(problem) -> str | None:
    return None


def _rows_of_a(ids: Tensor, lora_A: Tensor, dtype: torch.dtype) -> Tensor:
    """A[:, ids]ᵀ [M, r]: gathered before it is cast, because A is as long as the table."""
    return cast(lora_A.index_select(1, ids), dtype).t()


def forward(ids, weight, lora_A, lora_B, scaling):
    y = F.embedding(ids, weight)
    return y.addmm_(_rows_of_a(ids, lora_A, y.dtype), cast(lora_B, y.dtype).t(), alpha=scaling)


def backward(grad_y, ids, weight, lora_A, lora_B, scaling, padding_idx, needs):
    need_weight, need_a, need_b = needs
    grad_weight = grad_a = grad_b = None
    if need_weight:
        grad_weight = torch.ops.aten.embedding_dense_backward(grad_y, ids, weight.shape[0], padding_idx, False)
    if need_a:
        # In at least float32: an index that occurs often is a long sum.
        wide = torch.promote_types(torch.float32, grad_y.dtype)
        # B is scaled rather than the product: its roundings average out in the sum.
        grad_s = torch.mm(grad_y.to(wide), cast(lora_B, grad_y.dtype).to(wide) * scaling)
        grad_a = torch.ops.aten.embedding_dense_backward(grad_s, ids, weight.shape[0], padding_idx, False)
        grad_a = grad_a.t().to(lora_A.dtype).contiguous()
    if need_b:
        grad_b = sum_over_rows(grad_y, _rows_of_a(ids, lora_A, grad_y.dtype), lora_B, scaling)
    return grad_weight, grad_a, grad_b
