"""Specification of linear layers whose rows choose their own adapters: each that some row chose on all rows, kept where
meant.

x [M, K], W_j [N_j, K], ids [M, k] (-1: none), mix [M, k] or None for ones, A_aj [r, K], B_aj [N_j, r]:

y_j[m] = x[m] W_jᵀ + b_j + Σ_i mix[m, i] s_aj S_j[m, i] B_ajᵀ,   S_j[m, i] = drop_j(x)[m] A_ajᵀ,   a = ids[m, i]

W in NF4 is decoded. The mask of projection j is that of seeds[j]; ranks below the width of S_j leave zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_kernels.formats.adapter_table import Factors
from peft_kernels.kernels.reference import nf4_dequantize, philox_dropout


def unsupported(problem) -> str | None:
    return None


def _drop(x: Tensor, dropout_ps, seeds: Tensor | None, output: int, adapter: int) -> Tensor:
    p = dropout_ps[adapter] if dropout_ps else 0.0
    return philox_dropout.forward(x, p, seeds[output : output + 1]) if p and seeds is not None else x


def _chosen(adapters, output: int, ids: Tensor) -> Iterator[tuple[int, Factors, list[Tensor]]]:
    """(adapter, its factors, for each of the k choices which rows made it [M, 1])."""
    for adapter in sorted(set(ids.flatten().tolist()) & set(range(adapters.count))):
        factors = adapters.factors(output, adapter)
        if factors is not None:
            yield adapter, factors, [own.unsqueeze(1) for own in (ids == adapter).unbind(1)]


def _weights(mix: Tensor | None, ids: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[M, 1] for each choice."""
    if mix is None:
        return [torch.ones_like(column.unsqueeze(1), dtype=dtype) for column in ids.unbind(1)]
    return [column.unsqueeze(1).to(dtype) for column in mix.unbind(1)]


def forward(x, weights, biases, adapters, ids, mix, dropout_ps, seeds, keep_s):
    ys, ss = [], []
    for j, weight in enumerate(weights):
        y = x @ nf4_dequantize.dense(weight).t()
        y = y if biases[j] is None else y + biases[j]
        s = x.new_zeros(*ids.shape, adapters.widths[j])
        for adapter, (a, b, scaling, _), owns in _chosen(adapters, j, ids):
            s_a = _drop(x, dropout_ps, seeds, j, adapter) @ a.to(x.dtype).t()
            update = scaling * (s_a @ b.to(x.dtype).t())
            for i, (own, w) in enumerate(zip(owns, _weights(mix, ids, x.dtype), strict=True)):
                y = torch.where(own, y + w * update, y)
                s[:, i, : a.shape[0]] = torch.where(own, s_a, s[:, i, : a.shape[0]])
        ys.append(y)
        ss.append(s)
    return ys, ss if keep_s else []


def backward(grad_ys, x, ss, weights, adapters, ids, mix, dropout_ps, seeds, needs):
    """Gradients (dx, dmix, [dW_j], [db_j], [dA], [dB]); None where `needs` says that nobody asked."""
    given = next(grad for grad in grad_ys if grad is not None)
    wide = torch.promote_types(torch.float32, given.dtype)
    grad_x = given.new_zeros(given.shape[0], weights[0].shape[1]) if needs.x else None
    grad_mix = given.new_zeros(ids.shape, dtype=wide) if needs.adapter_weights else None
    grad_As = [torch.zeros_like(t) if need else None for t, need in zip(adapters.lora_As, needs.lora_As, strict=False)]
    grad_Bs = [torch.zeros_like(t) if need else None for t, need in zip(adapters.lora_Bs, needs.lora_Bs, strict=False)]
    for j, (grad_y, weight) in enumerate(zip(grad_ys, weights, strict=True)):
        if grad_y is None:
            continue
        if needs.x:
            grad_x = grad_x + grad_y @ nf4_dequantize.dense(weight)
        for adapter, (a, b, scaling, place), owns in _chosen(adapters, j, ids):
            r, mixes = a.shape[0], _weights(mix, ids, wide)
            anywhere = torch.cat(owns, 1).any(1, keepdim=True)
            g = grad_y @ b.to(grad_y.dtype)  # dS, not yet times scaling and mix
            factor = scaling * sum(torch.where(own, w, 0.0) for own, w in zip(owns, mixes, strict=True))
            grad_s = torch.where(anywhere, factor * g.to(wide), 0.0).to(g.dtype)
            if needs.x:
                update = _drop(grad_s @ a.to(g.dtype), dropout_ps, seeds, j, adapter)
                grad_x = torch.where(anywhere, grad_x + update, grad_x)
            if place is not None and needs.lora_As[place]:
                dropped = _drop(x, dropout_ps, seeds, j, adapter).masked_fill(~anywhere, 0.0)
                grad_As[place] = (grad_s.to(wide).t() @ dropped.to(wide)).to(a.dtype)
            if place is not None and needs.lora_Bs[place]:
                parts = zip(owns, mixes, ss[j][:, :, :r].unbind(1), strict=True)
                s = sum(torch.where(own, w * part, 0.0) for own, w, part in parts)
                grad_Bs[place] = (scaling * (grad_y.masked_fill(~anywhere, 0.0).to(wide).t() @ s.to(wide))).to(b.dtype)
            if needs.adapter_weights:
                for i, own in enumerate(owns):
                    dot = scaling * (g.to(wide) * ss[j][:, i, :r].to(wide)).sum(1)
                    grad_mix[:, i] += torch.where(own.squeeze(1), dot, 0.0)
    grad_weights = [
        None if not need else torch.zeros_like(w) if g is None else g.t() @ x
        for g, w, need in zip(grad_ys, weights, needs.weights, strict=True)
    ]
    grad_biases = [
        None if not need else given.new_zeros(w.shape[0], dtype=wide) if g is None else g.sum(0, dtype=wide)
        for g, w, need in zip(grad_ys, weights, needs.biases, strict=True)
    ]
    return grad_x, grad_mix, grad_weights, grad_biases, grad_As, grad_Bs
