"""`multi_lora_linear` as a loop over the adapters that some row chose, each in the fewest PyTorch passes over its rows.

The host reads the ids (one synchronisation on a GPU, forward and backward), so that adapters without rows cost nothing;
it cannot be captured in a CUDA graph. Rows of one adapter that lie together are not copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.kernels import _base
from peft_kernels.kernels.composed._passes import cast, drop, sum_over_rows, sum_rows

Rows = slice | Tensor


def unsupported(problem) -> str | None:
    return None


class Segment(NamedTuple):
    """The rows that chose `adapter` with their choice number `choice`, ascending: a slice where they lie together."""

    adapter: int
    choice: int
    rows: Rows


def segments(ids: Tensor) -> list[Segment]:
    """Of ids [M, k], sorted by choice, then by adapter. Within one, no row occurs twice."""
    found = []
    for choice, column in enumerate(ids.unbind(1)):
        order = torch.argsort(column, stable=True)
        adapters, counts = torch.unique_consecutive(column[order], return_counts=True)
        ends = counts.cumsum(0)
        firsts, lasts = order[ends - counts], order[ends - 1]
        # One wait for the GPU, not five.
        for adapter, end, count, first, last in torch.stack((adapters, ends, counts, firsts, lasts), 1).tolist():
            if adapter >= 0:
                together = last - first + 1 == count
                rows = slice(first, last + 1) if together else order[end - count : end]
                found.append(Segment(adapter, choice, rows))
    return found


class _Dropped:
    """drop_j(x), made once for each projection and probability; a copy of x for each probability of one projection."""

    def __init__(self, x: Tensor, dropout_ps, seeds: Tensor | None) -> None:
        self.x, self.dropout_ps, self.seeds = x, dropout_ps, seeds
        self.output, self.made = -1, dict[float, Tensor]()

    def rows(self, output: int, segment: Segment) -> Tensor:
        p = self.dropout_ps[segment.adapter] if self.seeds is not None else 0.0
        if not p or self.seeds is None:
            return self.x[segment.rows]
        if output != self.output:
            self.output, self.made = output, {}
        if p not in self.made:
            self.made[p] = drop(self.x, p, self.seeds[output : output + 1], 0)
        return self.made[p][segment.rows]


def add_rows(total: Tensor, rows: Rows, left: Tensor, right: Tensor, scaling: float) -> None:
    """total[rows] += scaling · left right. No row occurs twice in `rows`."""
    if isinstance(rows, slice):
        total[rows].addmm_(left, right, alpha=scaling)
    else:
        total.index_copy_(0, rows, total.index_select(0, rows).addmm_(left, right, alpha=scaling))


def weighted(values: Tensor, mix: Tensor | None, segment: Segment) -> Tensor:
    """`values` [rows, r] times the weights of the segment's choices."""
    if mix is None:
        return values
    return values * cast(mix[segment.rows, segment.choice].unsqueeze(1), values.dtype)


def forward(x, weights, biases, adapters, ids, mix, dropout_ps, seeds, keep_s):
    found, dropped = segments(ids), _Dropped(x, dropout_ps, seeds)
    ys, ss = [], []
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = _base.linear(x, weight, bias)
        s = x.new_zeros(*ids.shape, adapters.widths[j]) if keep_s else None
        for segment in found:
            factors = adapters.factors(j, segment.adapter)
            if factors is None:
                continue
            part = torch.mm(dropped.rows(j, segment), cast(factors.A, x.dtype).t())
            if s is not None:
                s[segment.rows, segment.choice, : part.shape[1]] = part
            add_rows(y, segment.rows, weighted(part, mix, segment), cast(factors.B, x.dtype).t(), factors.scaling)
        ys.append(y)
        if s is not None:
            ss.append(s)
    return ys, ss


def backward(grad_ys, x, ss, weights, adapters, ids, mix, dropout_ps, seeds, needs):
    given = next(grad for grad in grad_ys if grad is not None)
    wide = torch.promote_types(torch.float32, given.dtype)
    grad_x, grad_weights, grad_biases = base_gradients(grad_ys, x, weights, needs)
    grad_mix = given.new_zeros(ids.shape, dtype=wide) if needs.adapter_weights else None
    grad_As = [torch.zeros_like(a) if need else None for a, need in zip(adapters.lora_As, needs.lora_As, strict=False)]
    grad_Bs = [torch.zeros_like(b) if need else None for b, need in zip(adapters.lora_Bs, needs.lora_Bs, strict=False)]
    if _reads_grad_s(needs) or any(needs.lora_Bs):
        found = segments(ids)
        for j, grad_y in enumerate(grad_ys):
            if grad_y is None:
                continue
            parts = _grad_s(j, grad_y, ss, adapters, found, mix, grad_mix) if _reads_grad_s(needs) else []
            if grad_x is not None:
                _add_to_grad_x(j, grad_x, parts, dropout_ps, seeds)
            if any(needs.lora_As):
                _grad_As(j, grad_As, x, parts, adapters, dropout_ps, seeds)
            if any(needs.lora_Bs):
                _grad_Bs(j, grad_Bs, grad_y, ss[j], adapters, found, mix)
    return grad_x, grad_mix, grad_weights, grad_biases, grad_As, grad_Bs


def base_gradients(grad_ys, x, weights, needs) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """The base layers' part of dx, and the dW and db."""
    given = next(grad for grad in grad_ys if grad is not None)
    wide = torch.promote_types(torch.float32, given.dtype)
    grad_x = None
    for grad_y, weight in zip(grad_ys, weights, strict=True):
        if grad_y is None or not needs.x:
            continue
        if grad_x is None:
            grad_x = _base.grad_input(grad_y, weight)
        else:
            _base.add_grad_input(grad_x, grad_y, weight)
    grad_weights = [
        None if not need else torch.zeros_like(w) if g is None else sum_over_rows(g, x, w)
        for g, w, need in zip(grad_ys, weights, needs.weights, strict=True)
    ]
    grad_biases = [
        None if not need else given.new_zeros(w.shape[0], dtype=wide) if g is None else sum_rows(g)
        for g, w, need in zip(grad_ys, weights, needs.biases, strict=True)
    ]
    return grad_x, grad_weights, grad_biases


def _reads_grad_s(needs) -> bool:
    return needs.x or needs.adapter_weights or any(needs.lora_As)


def _grad_s(j, grad_y, ss, adapters, found, mix, grad_mix) -> list:
    """(segment, factors, dS of its rows, not yet multiplied by scaling), and the gradients of the weights."""
    parts = []
    for segment in found:
        factors = adapters.factors(j, segment.adapter)
        if factors is None:
            continue
        g = torch.mm(grad_y[segment.rows], cast(factors.B, grad_y.dtype))
        if grad_mix is not None:
            s = ss[j][segment.rows, segment.choice, : g.shape[1]]
            dots = (cast(g, grad_mix.dtype) * cast(s, grad_mix.dtype)).sum(1)
            grad_mix[segment.rows, segment.choice] += factors.scaling * dots
        parts.append((segment, factors, weighted(g, mix, segment)))
    return parts


def _add_to_grad_x(j, grad_x, parts, dropout_ps, seeds) -> None:
    masked: dict[float, Tensor] = {}  # by probability: the sum of what goes through one mask
    for segment, factors, grad_s in parts:
        p = dropout_ps[segment.adapter] if seeds is not None else 0.0
        if p and p not in masked:
            masked[p] = torch.zeros_like(grad_x)
        total = masked[p] if p else grad_x
        add_rows(total, segment.rows, grad_s, cast(factors.A, grad_x.dtype), factors.scaling)
    for p, total in masked.items():
        grad_x.add_(drop(total, p, seeds[j : j + 1], 0))


def _grad_As(j, grad_As, x, parts, adapters, dropout_ps, seeds) -> None:
    dropped = _Dropped(x, dropout_ps, seeds)
    for group in _by_adapter(parts, lambda part: part[0].adapter):
        _, factors, _ = group[0]
        if factors.place is not None and grad_As[factors.place] is not None:
            left = _joined([grad_s for _, _, grad_s in group])
            right = _joined([dropped.rows(j, segment) for segment, _, _ in group])
            grad_As[factors.place] = sum_over_rows(left, right, factors.A, factors.scaling)


def _grad_Bs(j, grad_Bs, grad_y, s, adapters, found, mix) -> None:
    for group in _by_adapter(found, lambda segment: segment.adapter):
        factors = adapters.factors(j, group[0].adapter)
        if factors is not None and factors.place is not None and grad_Bs[factors.place] is not None:
            left = _joined([grad_y[segment.rows] for segment in group])
            r = factors.A.shape[0]
            right = _joined([weighted(s[seg.rows, seg.choice, :r], mix, seg) for seg in group])
            grad_Bs[factors.place] = sum_over_rows(left, right, factors.B, factors.scaling)


def _by_adapter(entries, adapter_of) -> list[list]:
    groups: dict[int, list] = {}
    for entry in entries:
        groups.setdefault(adapter_of(entry), []).append(entry)
    return list(groups.values())


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
