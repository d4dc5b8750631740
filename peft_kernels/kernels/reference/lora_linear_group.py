"""Specification of several linear layers over one x, each with the sum of its low-rank updates.

y_j = x W_jᵀ + b_j + Σ_i s_i (drop_i(x) A_iᵀ) B_iᵀ over the adapters i with outputs[i] = j. x [M, K], W_j [N_j, K],
A_i [r_i, K], B_i [N_j, r_i]; S [M, Σ r_i] holds the products drop_i(x) A_iᵀ side by side and is what forward leaves for
backward. Rows where token_mask is False have S = 0. A W_j in NF4 is decoded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.kernels.reference import lora_linear, nf4_dequantize, philox_dropout


def unsupported(problem) -> str | None:
    return None


def _drop(x: Tensor, p: float, seeds: Tensor | None, i: int) -> Tensor:
    return x if seeds is None or not p else philox_dropout.forward(x, p, seeds[i : i + 1])


def _masked(s: Tensor, token_mask: Tensor | None) -> Tensor:
    return s if token_mask is None else s.masked_fill(~token_mask.unsqueeze(1), 0.0)


def forward(x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask):
    pairs = zip(map(nf4_dequantize.dense, weights), biases, strict=True)
    ys = [F.linear(x, weight, bias) for weight, bias in pairs]
    products = [x.new_empty(x.shape[0], 0)]
    for i, output in enumerate(outputs):
        s = _masked(F.linear(_drop(x, dropout_ps[i], seeds, i), lora_As[i].to(x.dtype)), token_mask)
        ys[output] = ys[output] + scalings[i] * F.linear(s, lora_Bs[i].to(x.dtype))
        products.append(s)
    return ys, torch.cat(products, 1)


def backward(
    grad_ys, x, s, weights, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask, needs
):  # fmt: skip
    """Gradients (dx, dWs, dbiases, dAs, dBs); None where `needs` says that nobody asked. grad_ys[j] = None is zero."""
    weights = list(map(nf4_dequantize.dense, weights))
    grad_ys = _materialised(grad_ys, weights)
    pairs = list(zip(grad_ys, weights, strict=True))
    grad_x = sum(grad_y @ weight for grad_y, weight in pairs) if needs.x else None
    grad_weights = [g.t() @ x if need else None for g, need in zip(grad_ys, needs.weights, strict=True)]
    wide = torch.promote_types(torch.float32, grad_ys[0].dtype)
    grad_biases = [g.sum(0, dtype=wide) if need else None for g, need in zip(grad_ys, needs.biases, strict=True)]
    grad_As, grad_Bs, column = [], [], 0
    for i, (output, a, b) in enumerate(zip(outputs, lora_As, lora_Bs, strict=True)):
        # One adapter at a time is `lora_linear` without its base; a masked row has neither S nor dS.
        grad_y = _masked(grad_ys[output], token_mask)
        r = a.shape[0]
        products = s[:, column : column + r] if s is not None else None
        alone = (needs.x, False, False, needs.lora_As[i], needs.lora_Bs[i])
        no_base = weights[output].new_zeros(()).expand(weights[output].shape)
        seed = seeds[i : i + 1] if dropout_ps[i] else None
        low_rank_x, _, _, grad_a, grad_b = lora_linear.backward(
            grad_y, x, products, no_base, a, b, scalings[i], dropout_ps[i], seed, alone
        )
        grad_x = grad_x + low_rank_x if needs.x else None
        grad_As.append(grad_a)
        grad_Bs.append(grad_b)
        column += r
    return grad_x, grad_weights, grad_biases, grad_As, grad_Bs


def _materialised(grad_ys, weights):
    given = next(grad for grad in grad_ys if grad is not None)
    return [
        given.new_zeros(given.shape[0], weight.shape[0]) if grad is None else grad
        for grad, weight in zip(grad_ys, weights, strict=True)
    ]
