"""`dora_weight_norm` from products of rank r: one pass over W, or two where ‖W‖² is not known."""

from __future__ import annotations

import torch

from peft_kernels.kernels.composed._passes import cast, row_blocks


def unsupported(problem) -> str | None:
    return None


def forward(weight, lora_A, lora_B, scaling, weight_norm_squared):
    wide = torch.promote_types(torch.float32, weight.dtype)
    a, b = cast(lora_A, wide), cast(lora_B, wide)
    # rowsum((W Aᵀ) ⊙ B) for both terms: (2 s W Aᵀ + s² B A Aᵀ) ⊙ B.
    products = torch.mm(b, torch.mm(a, a.t())).mul_(scaling * scaling)
    squares = products.new_empty(weight.shape[0]) if weight_norm_squared is None else weight_norm_squared
    for block in row_blocks(*weight.shape):
        rows = cast(weight[block], wide)
        products[block].addmm_(rows, a.t(), alpha=2 * scaling)
        if weight_norm_squared is None:
            torch.linalg.vecdot(rows, rows, out=squares[block])
    return torch.linalg.vecdot(products, b).add_(squares).clamp_(min=0).sqrt_()
