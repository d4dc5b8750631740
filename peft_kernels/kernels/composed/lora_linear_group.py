"""`lora_linear_group` in the fewest PyTorch passes: one over x for all of S, one for all of dA, one update of dx.

Compared with one `lora_linear` per projection (q, k, v; no dropout), forward reads x once instead of three times beside
the base matmuls. Backward forms dx in one buffer (no sums of three dx afterwards), adds the low-rank part of all
projections to it at once, and reads x once for all dA.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.kernels import _base
from peft_kernels.kernels.composed._passes import add_dropped, cast, down, sum_over_rows, sum_rows


def unsupported(problem) -> str | None:
    return None


class _Adapter(NamedTuple):
    """`adapter` adds to `output`; its part of S is `columns`."""

    adapter: int
    output: int
    columns: slice


def _adapters(lora_As, outputs) -> tuple[_Adapter, ...]:
    return _layout(tuple([a.shape[0] for a in lora_As]), tuple(outputs))


@functools.lru_cache(maxsize=1024)
def _layout(ranks: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[_Adapter, ...]:
    ends = itertools.accumulate(ranks)
    columns = [slice(end - r, end) for r, end in zip(ranks, ends, strict=True)]
    return tuple(_Adapter(i, output, part) for i, (output, part) in enumerate(zip(outputs, columns, strict=True)))


def _stacked(matrices, dtype: torch.dtype) -> Tensor:
    """[Σ r, K], in `dtype`: small beside x, so that a copy costs little."""
    return cast(matrices[0] if len(matrices) == 1 else torch.cat(list(matrices)), dtype)


def forward(x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask):
    s = _down_projections(x, lora_As, dropout_ps, seeds)
    if token_mask is not None:
        s.masked_fill_(~token_mask.unsqueeze(1), 0.0)
    ys = [_base.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    for columns, b, scaling, output in _updates(_adapters(lora_As, outputs), lora_Bs, scalings, x.dtype):
        ys[output].addmm_(s[:, columns], b.t(), alpha=scaling)
    return ys, s


def _down_projections(x, lora_As, dropout_ps, seeds) -> Tensor:
    if not lora_As:
        return x.new_empty(x.shape[0], 0)
    a = _stacked(lora_As, x.dtype)
    if seeds is None and not _rounds_less_apart(x, lora_As):
        return F.linear(x, a)
    s = x.new_empty(x.shape[0], a.shape[0])
    for i, _, columns in _adapters(lora_As, [0] * len(lora_As)):
        seed = seeds[i : i + 1] if dropout_ps[i] else None
        down(x, a[columns], dropout_ps[i], seed, s[:, columns])
    return s


def _rounds_less_apart(x: Tensor, lora_As) -> bool:
    """MKL's float32 product of x with a few rows of A has shorter partial sums than with all ranks stacked: S then has
    up to 1.5 times the error of one adapter at a time."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and min(a.shape[0] for a in lora_As) < 16


def _updates(adapters, lora_Bs, scalings, dtype) -> Iterator[tuple[slice, Tensor, float, int]]:
    """(columns of S, B, scaling, output): adapters of one output together, so that y is updated once."""
    start = 0
    while start < len(adapters):
        output = adapters[start].output
        end = start + 1
        while end < len(adapters) and adapters[end].output == output:
            end += 1
        members = range(start, end)
        columns = slice(adapters[start].columns.start, adapters[end - 1].columns.stop)
        factor = scalings[start]
        if end == start + 1:
            b = lora_Bs[start]
        elif all(scalings[i] == factor for i in members):
            b = torch.cat([lora_Bs[i] for i in members], 1)
        else:
            b, factor = torch.cat([scalings[i] * lora_Bs[i] for i in members], 1), 1.0
        yield columns, cast(b, dtype), factor, output
        start = end


def backward(
    grad_ys, x, s, weights, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, token_mask, needs
):  # fmt: skip
    adapters = _adapters(lora_As, outputs)
    given = next(grad for grad in grad_ys if grad is not None)
    grad_s = None
    if adapters and (needs.x or any(needs.lora_As)):
        grad_s = _grad_s(given, grad_ys, adapters, lora_Bs, scalings, token_mask)
    grad_x = _grad_x(given, grad_ys, weights, adapters, grad_s, lora_As, dropout_ps, seeds) if needs.x else None
    grad_As = _grad_As(grad_s, x, adapters, lora_As, dropout_ps, seeds, needs.lora_As)
    grad_Bs = [
        _grad_B(grad_ys[output], s, columns, lora_Bs[i], scalings[i]) if needs.lora_Bs[i] else None
        for i, output, columns in adapters
    ]
    grad_weights = [
        None if not need else torch.zeros_like(w) if g is None else sum_over_rows(g, x, w)
        for g, w, need in zip(grad_ys, weights, needs.weights, strict=True)
    ]
    grad_biases = [
        None if not need else given.new_zeros(w.shape[0]) if g is None else sum_rows(g)
        for g, w, need in zip(grad_ys, weights, needs.biases, strict=True)
    ]
    return grad_x, grad_weights, grad_biases, grad_As, grad_Bs


def _grad_s(given, grad_ys, adapters, lora_Bs, scalings, token_mask) -> Tensor:
    """[M, Σ r], scaled."""
    grad_s = given.new_empty(given.shape[0], adapters[-1].columns.stop)
    for i, output, columns in adapters:
        part, grad_y = grad_s[:, columns], grad_ys[output]
        if grad_y is None:
            part.zero_()
        else:
            torch.addmm(part, grad_y, cast(lora_Bs[i], grad_y.dtype), beta=0, alpha=scalings[i], out=part)
    return grad_s if token_mask is None else grad_s.masked_fill_(~token_mask.unsqueeze(1), 0.0)


def _grad_x(given, grad_ys, weights, adapters, grad_s, lora_As, dropout_ps, seeds) -> Tensor:
    pairs = [(grad_y, weight) for grad_y, weight in zip(grad_ys, weights, strict=True) if grad_y is not None]
    grad_x = _base.grad_input(*pairs[0])
    for grad_y, weight in pairs[1:]:
        _base.add_grad_input(grad_x, grad_y, weight)
    if grad_s is None:
        return grad_x
    if seeds is None:
        return grad_x.addmm_(grad_s, _stacked(lora_As, given.dtype))
    for i, _, columns in adapters:
        a = cast(lora_As[i], given.dtype)
        if dropout_ps[i]:
            add_dropped(grad_x, grad_s[:, columns], a, 1.0, dropout_ps[i], seeds[i : i + 1])
        else:
            grad_x.addmm_(grad_s[:, columns], a)
    return grad_x


def _grad_As(grad_s, x, adapters, lora_As, dropout_ps, seeds, needs) -> list[Tensor | None]:
    if not any(needs):
        return [None] * len(lora_As)
    if seeds is None and all(needs):
        like = lora_As[0].new_empty(1).expand(grad_s.shape[1], x.shape[1])
        return list(sum_over_rows(grad_s, x, like).split([a.shape[0] for a in lora_As]))
    return [
        sum_over_rows(
            grad_s[:, columns], x, lora_As[i], 1.0, dropout_ps[i], seeds[i : i + 1] if dropout_ps[i] else None
        )
        if needs[i]
        else None
        for i, _, columns in adapters
    ]


def _grad_B(grad_y, s, columns, lora_B, scaling) -> Tensor:
    return torch.zeros_like(lora_B) if grad_y is None else sum_over_rows(grad_y, s[:, columns], lora_B, scaling)
