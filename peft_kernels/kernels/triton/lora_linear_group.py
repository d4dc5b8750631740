"""`lora_linear_group` in fused Triton kernels: each big tensor is passed over as often as for one projection.

Forward: S of all adapters in one pass over x (`down_projection` over the As one after the other; with dropout or a
token mask `_group_passes`), then all y in one launch (`_group_gemm`). Backward: dS and dB in one pass over each dY_j
(`_group_grad_s_b`), dX in one accumulator (`_group_grad_x`), all dA in one pass over x. dW and dbias are PyTorch's.

Several adapters of one projection are one adapter with the sum of their ranks. Where their scalings differ B is
multiplied by its own before it meets x; else the float32 product is, as in `lora_linear`.

S is [M, Σ r] and contiguous, because that is what `ops` promises to torch.compile; the kernels read its columns through
pointers, which need no alignment.

Compiled for sm_80, sm_90 and sm_100 and interpreted on the CPU; never run on a GPU yet (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels.composed._passes import cast, sum_rows
from peft_kernels.kernels.composed._passes import sum_over_rows as product_over_rows
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._launch import NOT_OF_4_BITS
from peft_kernels.kernels.triton._measured import unproven as _unproven

# The kernels have a copy of their code for each projection, and a mask's for each adapter.
MAX_OUTPUTS, MAX_ADAPTERS = 4, 8


def unsupported(problem) -> str | None:
    if problem.nf4:
        return NOT_OF_4_BITS
    if len(problem.ns) > MAX_OUTPUTS:
        return f"{len(problem.ns)} projections, more than {MAX_OUTPUTS}"
    if len(problem.rs) > MAX_ADAPTERS:
        return f"{len(problem.rs)} adapters, more than {MAX_ADAPTERS}"
    if sum(problem.rs) > MAX_RANK:
        return f"ranks of {sum(problem.rs)} together, above {MAX_RANK}"
    adapter_dtype = problem.adapter_dtype or problem.dtype
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype, adapter_dtype)


def unproven(problem) -> str | None:
    return _unproven("lora_linear_group", problem)


class _Unit(NamedTuple):
    """A projection that has adapters: `adapters` add to `output`, their part of S is `columns`."""

    output: int
    adapters: range
    columns: slice


def _units(ranks: Sequence[int], outputs: Sequence[int]) -> list[_Unit]:
    units = []
    for output in dict.fromkeys(outputs):
        first = outputs.index(output)
        adapters = range(first, first + outputs.count(output))
        start = sum(ranks[:first])
        units.append(_Unit(output, adapters, slice(start, start + sum(ranks[i] for i in adapters))))
    return units


def _stacked(lora_As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[Σ r, K]: small beside x, so that a copy costs little."""
    return cast(lora_As[0] if len(lora_As) == 1 else torch.cat(list(lora_As)), dtype)


def _side_by_side(lora_Bs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[N, Σ r] of one projection."""
    return cast(lora_Bs[0] if len(lora_Bs) == 1 else torch.cat(list(lora_Bs), 1), dtype)


def forward(x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask):
    from peft_kernels.kernels.triton._group_gemm import group_gemm

    ranks = [a.shape[0] for a in lora_As]
    s = _down_projections(x, lora_As, ranks, dropout_ps, seeds, token_mask)
    bs: list[Tensor | None] = [None] * len(weights)
    firsts, factors = [0] * len(weights), [0.0] * len(weights)
    for output, adapters, columns in _units(ranks, list(outputs)):
        members, factor = [lora_Bs[i] for i in adapters], scalings[adapters[0]]
        if any(scalings[i] != factor for i in adapters):
            members, factor = [scalings[i] * lora_Bs[i] for i in adapters], 1.0
        bs[output], firsts[output], factors[output] = _side_by_side(members, x.dtype), columns.start, factor
    return group_gemm(x, weights, biases, s, bs, firsts, factors), s


def _down_projections(x, lora_As, ranks, dropout_ps, seeds, token_mask) -> Tensor:
    from peft_kernels.kernels.triton._down_projection import down_projection
    from peft_kernels.kernels.triton._group_passes import group_down_projection

    if not lora_As:
        return x.new_empty(x.shape[0], 0)
    a = _stacked(lora_As, x.dtype)
    if seeds is None and token_mask is None:
        return down_projection(x, a)
    return group_down_projection(x, a, ranks, dropout_ps, seeds, token_mask)


def backward(
    grad_ys, x, s, weights, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask, needs
):  # fmt: skip
    """Gradients (dx, dWs, dbiases, dAs, dBs); None where `needs` says that nobody asked. grad_ys[j] = None is zero."""
    given = next(grad for grad in grad_ys if grad is not None)
    ranks = [a.shape[0] for a in lora_As]
    units = [unit for unit in _units(ranks, list(outputs)) if grad_ys[unit.output] is not None]
    need_s = bool(lora_As) and (needs.x or any(needs.lora_As))
    grad_s, grad_Bs = _grad_s_and_b(given, grad_ys, s, units, ranks, lora_Bs, scalings, token_mask, need_s, needs)
    grad_x = _grad_x(grad_ys, weights, grad_s, lora_As, ranks, dropout_ps, seeds) if needs.x else None
    grad_As = _grad_As(grad_s, x, lora_As, ranks, dropout_ps, seeds, needs.lora_As)
    grad_weights = [
        None if not need else torch.zeros_like(w) if g is None else product_over_rows(g, x, w)
        for g, w, need in zip(grad_ys, weights, needs.weights, strict=True)
    ]
    grad_biases = [
        None if not need else given.new_zeros(w.shape[0], dtype=_wide(given)) if g is None else sum_rows(g)
        for g, w, need in zip(grad_ys, weights, needs.biases, strict=True)
    ]
    return grad_x, grad_weights, grad_biases, grad_As, grad_Bs


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, tensor.dtype)


def _grad_s_and_b(given, grad_ys, s, units, ranks, lora_Bs, scalings, token_mask, need_s, needs):
    """dS [M, Σ r], scaled, and dB of each adapter: together where one pass over each dY serves both."""
    from peft_kernels.kernels.triton._group_grad_s_b import group_grad_s_b

    bs = [_side_by_side([lora_Bs[i] for i in unit.adapters], given.dtype) for unit in units]
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    need_b = any(needs.lora_Bs)
    grad_Bs = [torch.zeros_like(b) if need else None for b, need in zip(lora_Bs, needs.lora_Bs, strict=True)]
    if need_s and need_b and units:
        together = group_grad_s_b(
            [grad_ys[unit.output] for unit in units], s, bs, [unit.columns for unit in units], starts, scalings,
            token_mask, lora_Bs[0].dtype,
        )  # fmt: skip
        if together is not None:
            grad_s, of_units = together
            for unit, grad_b in zip(units, of_units, strict=True):
                parts = grad_b.split([ranks[i] for i in unit.adapters], 1)
                for i, part in zip(unit.adapters, parts, strict=True):
                    grad_Bs[i] = part if needs.lora_Bs[i] else None
            return grad_s, grad_Bs
    if need_b:
        _grad_bs_alone(grad_ys, s, units, ranks, lora_Bs, scalings, needs, grad_Bs)
    grad_s = _grad_s_alone(given, grad_ys, units, bs, ranks, scalings, token_mask) if need_s else None
    return grad_s, grad_Bs


def _grad_bs_alone(grad_ys, s, units, ranks, lora_Bs, scalings, needs, grad_Bs) -> None:
    from peft_kernels.kernels.triton._sum_over_rows import sum_over_rows

    for output, adapters, columns in units:
        if any(needs.lora_Bs[i] for i in adapters):
            factor, dtype = scalings[adapters[0]], lora_Bs[adapters[0]].dtype
            equal = all(scalings[i] == factor for i in adapters)
            total = sum_over_rows(
                s[:, columns], grad_ys[output], factor if equal else 1.0, dtype if equal else torch.float32,
                transposed=True,
            )  # fmt: skip
            parts = total.split([ranks[i] for i in adapters], 1)
            for i, part in zip(adapters, parts, strict=True):
                grad_Bs[i] = None if not needs.lora_Bs[i] else part if equal else (part * scalings[i]).to(dtype)


def _grad_s_alone(given, grad_ys, units, bs, ranks, scalings, token_mask) -> Tensor:
    from peft_kernels.kernels.triton._down_projection import down_projection

    grad_s = given.new_zeros(given.shape[0], sum(ranks))
    for unit, b in zip(units, bs, strict=True):
        products = down_projection(grad_ys[unit.output], b.t()).split([ranks[i] for i in unit.adapters], 1)
        parts = grad_s[:, unit.columns].split([ranks[i] for i in unit.adapters], 1)
        for i, part, product in zip(unit.adapters, parts, products, strict=True):
            torch.mul(product, scalings[i], out=part)
    return grad_s if token_mask is None else grad_s.masked_fill_(~token_mask.unsqueeze(1), 0.0)


def _grad_x(grad_ys, weights, grad_s, lora_As, ranks, dropout_ps, seeds) -> Tensor:
    from peft_kernels.kernels.triton._group_grad_x import group_grad_x

    pairs = [(grad_y, weight) for grad_y, weight in zip(grad_ys, weights, strict=True) if grad_y is not None]
    a = None if grad_s is None else _stacked(lora_As, grad_s.dtype)
    return group_grad_x([g for g, _ in pairs], [w for _, w in pairs], grad_s, a, ranks, dropout_ps, seeds)


def _grad_As(grad_s, x, lora_As, ranks, dropout_ps, seeds, needs) -> list[Tensor | None]:
    from peft_kernels.kernels.triton._group_passes import group_sum_over_rows
    from peft_kernels.kernels.triton._sum_over_rows import sum_over_rows

    if not any(needs):
        return [None] * len(lora_As)
    dtype = lora_As[0].dtype
    if seeds is None:
        grad_a = sum_over_rows(grad_s, x, 1.0, dtype)
    else:
        grad_a = group_sum_over_rows(grad_s, x, ranks, dtype, dropout_ps, seeds)
    return [grad if need else None for grad, need in zip(grad_a.split(list(ranks)), needs, strict=True)]
