"""The op `multi_lora_linear`: linear layers over one x, each row of which chooses its own low-rank updates.

y_j[m] = x[m] W_jᵀ + b_j + Σ_i w[m, i] s_aj (drop_j(x)[m] A_ajᵀ) B_ajᵀ,   a = adapter_ids[m, i], i < k; -1 adds nothing
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.adapter_table import AdapterLists, Adapters, PoolAdapters
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._eager import is_plain
from peft_kernels.ops._rows import owned, row_bucket, rows, unflatten
from peft_kernels.ops._tracing import distinct, fold_scalings
from peft_kernels.ops._weights import Weight, all_dense, cut, joined, split
from peft_kernels.ops.lora_linear import autocast_together

# What says which adapters there are, in both schemas, as `_adapters` and `_flat` turn it over. Lists: factors, the
# projection and the adapter of each, scalings, no tables. A pool: its memory as the only A, [device table, host table]
# and which of the table's layers the projections are. widths: columns of S for each projection.
_ADAPTERS = (
    "Tensor[] lora_As, Tensor[] lora_Bs, int[] outputs, int[] adapters, float[] scalings, Tensor[] tables,"
    " int[] layers, int[] widths, int count"
)
SCHEMAS = {
    # adapter_ids int64 [M, k]; adapter_weights [M, k]; dropout_ps: of each adapter; seeds: of each projection.
    # ss: for each projection [M, k, its width], none without keep_s.
    "multi_lora_linear": (
        f"(Tensor x, Tensor[] weights, int[] weight_layouts, Tensor?[] biases, {_ADAPTERS}, Tensor adapter_ids,"
        " Tensor? adapter_weights, float[] dropout_ps, Tensor? seeds, bool keep_s) -> (Tensor[] ys, Tensor[] ss)"
    ),
    # Gradients of x, adapter_weights, the weights, biases, As and Bs: as many as `needs` asks for, in that order. A
    # grad_ys[j] that is None stands for zeros.
    "multi_lora_linear_backward": (
        f"(Tensor?[] grad_ys, Tensor? x, Tensor[] ss, Tensor[] weights, int[] weight_layouts, {_ADAPTERS},"
        " Tensor adapter_ids, Tensor? adapter_weights, float[] dropout_ps, Tensor? seeds, bool[] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by. `m` and `adapters`, their number, are rounded up to powers of two; `ns` and
    `widths`, the largest ranks, have one entry per projection. `per_row`: k, how many adapters a row names; `mixed`:
    with weights. `train`: S is kept for gradients. `nf4`: whether any weight is of 4 bits."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None
    m: int
    ns: tuple[int, ...]
    k: int
    adapters: int
    widths: tuple[int, ...]
    per_row: int
    mixed: bool
    dropout: bool
    train: bool
    pool: bool
    nf4: bool = False


class MultiNeeds(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    adapter_weights: bool
    weights: tuple[bool, ...]
    biases: tuple[bool, ...]
    lora_As: tuple[bool, ...]
    lora_Bs: tuple[bool, ...]

    @classmethod
    def from_flat(cls, flat, projections: int, factors: int) -> MultiNeeds:
        (x, mix), weights, biases, lora_As, lora_Bs = map(tuple, cut(flat, 2, projections, projections, factors))
        return cls(x, mix, weights, biases, lora_As, lora_Bs)


def _problem(x: Tensor, weights, adapters: Adapters, per_row, mixed, dropout, train) -> Problem:
    device = x.device
    return Problem(
        device.type,
        device.index,
        x.dtype,
        adapters.dtype,
        row_bucket(x),
        tuple(weight.shape[0] for weight in weights),
        weights[0].shape[1],
        1 << (adapters.count - 1).bit_length() if adapters.count else 0,
        tuple(adapters.widths),
        per_row,
        mixed,
        dropout,
        train,
        isinstance(adapters, PoolAdapters),
        not all_dense(weights),
    )


def problem(
    x, weight, lora_As, lora_Bs, adapter_ids, *, scalings=None, adapter_weights=None, dropout_p=0.0, training=True, **_
) -> Problem:
    from peft_kernels.functional.multi_lora_linear import flatten_adapters

    layer_Bs = None if lora_Bs is None else (lora_Bs,)
    scalings = (scalings,) if isinstance(scalings, Sequence) else scalings
    adapters = flatten_adapters("multi_lora_linear", (weight,), (lora_As,), layer_Bs, scalings)
    dropout = training and any(p > 0 for p in ([dropout_p] if isinstance(dropout_p, (int, float)) else dropout_p))
    per_row = 1 if adapter_weights is None else adapter_weights.shape[-1]
    wanted = [t for t in (x, adapter_weights, *adapters.lora_As, *adapters.lora_Bs) if t is not None]
    train = torch.is_grad_enabled() and any(t.requires_grad for t in wanted)
    return _problem(x, (weight,), adapters, per_row, adapter_weights is not None, dropout, train)


def select(x: Tensor, weights: Sequence[Weight], adapters: Adapters, per_row, mixed, dropout, train):
    """The implementation for these operands; the last three say whether there are weights, dropout and gradients."""
    key = (
        x.shape[:-1], x.dtype, x.device, tuple([w.shape for w in weights]), all_dense(weights), adapters.dtype,
        adapters.count, tuple(adapters.widths), isinstance(adapters, PoolAdapters), per_row, mixed, dropout, train,
    )  # fmt: skip
    options = (per_row, mixed, dropout, train)
    return dispatch.select_memoised("multi_lora_linear", key, _problem, x, weights, adapters, *options)


def _adapters(
    weights, lora_As, lora_Bs, outputs, adapters, scalings, tables, layers, widths, count
) -> Adapters:  # fmt: skip
    if tables:
        sizes = [(w.shape[0], w.shape[1]) for w in weights]
        device_rows, host_rows = tables
        return PoolAdapters(lora_As[0], device_rows, host_rows, layers, sizes, widths)
    return AdapterLists(lora_As, lora_Bs, outputs, adapters, scalings, widths, count)


def _flat(adapters: Adapters) -> tuple:
    """The schema's `_ADAPTERS` of these; the inverse of `_adapters`."""
    if isinstance(adapters, PoolAdapters):
        tables = [adapters.rows, adapters.host_rows]
        return [adapters.arena], [], [], [], [], tables, list(adapters.layers), list(adapters.widths), adapters.count
    return (
        adapters.lora_As, adapters.lora_Bs, adapters.outputs, adapters.adapters, adapters.scalings, [], [],
        adapters.widths, adapters.count,
    )  # fmt: skip


def _forward(implementation, x, weights, biases, adapters, ids, mix, dropout_ps, seeds, keep_s):
    batch = x.shape[:-1]
    biases = [b if b is None or b.dtype == x.dtype else b.to(x.dtype) for b in biases]
    ys, ss = implementation.forward(rows(x), weights, biases, adapters, ids, mix, dropout_ps, seeds, keep_s)
    return (ys if x.ndim == 2 else [unflatten(y, batch) for y in ys]), ss


def _backward(
    implementation, grad_ys, x, ss, weights, adapters, ids, mix, dropout_ps, seeds, needs
) -> list[Tensor | None]:
    """Gradients in the order of MultiNeeds, None where nobody asked."""
    given = next(grad for grad in grad_ys if grad is not None)
    flat_grad_ys = [None if grad is None else rows(grad) for grad in grad_ys]
    flat_x = None if x is None else rows(x)
    grad_x, grad_mix, *others = implementation.backward(
        flat_grad_ys, flat_x, ss, weights, adapters, ids, mix, dropout_ps, seeds, needs
    )
    if grad_x is not None and given.ndim != 2:
        grad_x = unflatten(grad_x, given.shape[:-1])
    return [grad_x, grad_mix, *(grad for grads in others for grad in grads)]


def kernel(
    x, weights, weight_layouts, biases, lora_As, lora_Bs, outputs, adapters, scalings, tables, layers, widths, count,
    adapter_ids, adapter_weights, dropout_ps, seeds, keep_s,
):  # fmt: skip
    weights = joined(weights, weight_layouts, x.dtype)
    all_of_them = _adapters(weights, lora_As, lora_Bs, outputs, adapters, scalings, tables, layers, widths, count)
    implementation = select(
        x, weights, all_of_them, adapter_ids.shape[1], adapter_weights is not None, seeds is not None, keep_s
    )
    return _forward(
        implementation, x, weights, biases, all_of_them, adapter_ids, adapter_weights, dropout_ps, seeds, keep_s
    )


def fake(
    x, weights, weight_layouts, biases, lora_As, lora_Bs, outputs, adapters, scalings, tables, layers, widths, count,
    adapter_ids, adapter_weights, dropout_ps, seeds, keep_s,
):  # fmt: skip
    weights = joined(weights, weight_layouts, x.dtype)
    ss = [x.new_empty(*adapter_ids.shape, width) for width in widths] if keep_s else []
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights], ss


def backward_kernel(
    grad_ys, x, ss, weights, weight_layouts, lora_As, lora_Bs, outputs, adapters, scalings, tables, layers, widths,
    count, adapter_ids, adapter_weights, dropout_ps, seeds, needs,
):  # fmt: skip
    given = next(grad for grad in grad_ys if grad is not None)
    weights = joined(weights, weight_layouts, given.dtype)
    all_of_them = _adapters(weights, lora_As, lora_Bs, outputs, adapters, scalings, tables, layers, widths, count)
    implementation = select(
        given, weights, all_of_them, adapter_ids.shape[1], adapter_weights is not None, seeds is not None, True
    )
    needs = MultiNeeds.from_flat(needs, len(weights), len(lora_Bs))
    grads = _backward(
        implementation, grad_ys, x, ss, weights, all_of_them, adapter_ids, adapter_weights, dropout_ps, seeds, needs
    )
    # An op's results must not share memory; gradients that were computed side by side do.
    return [owned(grad) for grad in grads if grad is not None]


def backward_fake(
    grad_ys, x, ss, weights, weight_layouts, lora_As, lora_Bs, outputs, adapters, scalings, tables, layers, widths,
    count, adapter_ids, adapter_weights, dropout_ps, seeds, needs,
):  # fmt: skip
    given = next(grad for grad in grad_ys if grad is not None)
    weights = joined(weights, weight_layouts, given.dtype)
    wide = torch.promote_types(torch.float32, given.dtype)
    like = [((*given.shape[:-1], weights[0].shape[1]), given.dtype), (adapter_ids.shape, wide)]
    like += [(weight.shape, weight.dtype) for weight in weights]
    like += [((weight.shape[0],), wide) for weight in weights]
    if not tables:
        like += [(t.shape, t.dtype) for t in (*lora_As, *lora_Bs)]
    return [given.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(like, needs, strict=True) if need]


KERNELS = {"multi_lora_linear": (kernel, fake), "multi_lora_linear_backward": (backward_kernel, backward_fake)}


class MultiLoraLinear(torch.autograd.Function):
    """Saves x, S and the seeds, each only when some wanted gradient uses it. `tensors` are the weights (of those of 4
    bits the first tensor), the biases, the As, the Bs, the tables and the other tensors of the weights; `meta` holds
    what is no tensor."""

    @staticmethod
    def forward(ctx, x, adapter_weights, adapter_ids, seeds, meta, *tensors):
        firsts, biases, lora_As, lora_Bs, tables, others = cut(tensors, *meta.counts)
        ctx.meta = meta
        wanted = _wanted(ctx, len(lora_As) + len(lora_Bs))
        needs = MultiNeeds.from_flat(wanted, len(firsts), len(lora_Bs))
        keep_s = needs.adapter_weights or any(needs.lora_Bs)
        named = (meta.outputs, meta.adapters, meta.scalings, tables, meta.layers, meta.widths, meta.size)
        if is_plain(x):
            weights = joined((*firsts, *others), meta.weight_layouts, x.dtype)
            adapters = _adapters(weights, lora_As, lora_Bs, *named)
            options = (adapter_ids.shape[1], adapter_weights is not None, seeds is not None, any(wanted))
            ctx.implementation = select(x, weights, adapters, *options)
            arguments = (biases, adapters, adapter_ids, adapter_weights, meta.dropout_ps, seeds, keep_s)
            ys, ss = _forward(ctx.implementation, x, weights, *arguments)
        else:
            ctx.implementation = None
            ys, ss = torch.ops.peft_kernels.multi_lora_linear(
                x, (*firsts, *others), meta.weight_layouts, biases, lora_As, lora_Bs, *named, adapter_ids,
                adapter_weights, meta.dropout_ps, seeds, keep_s,
            )  # fmt: skip
        saved_x = x if any(needs.lora_As) or any(needs.weights) else None
        ctx.save_for_backward(
            saved_x, adapter_weights, adapter_ids, seeds, *ss, *firsts, *lora_As, *lora_Bs, *tables, *others
        )
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grad_ys):
        if all(grad is None for grad in grad_ys):
            return (None,) * len(ctx.needs_input_grad)
        return first_gradients("multi_lora_linear", _gradients, ctx, grad_ys, ctx.saved_tensors)


class Meta(NamedTuple):
    """Arguments of the op that are no tensors. `size`: the number of adapters; `counts`: of weights, biases,
    As, Bs and tables."""

    outputs: list[int]
    adapters: list[int]
    scalings: list[float]
    layers: list[int]
    widths: list[int]
    size: int
    dropout_ps: list[float]
    weight_layouts: list[int]
    counts: tuple[int, int, int, int, int]


def _wanted(ctx, factors: int) -> tuple[bool, ...]:
    """Whether a gradient is wanted of x, the adapter weights, each weight, bias, A and B (not of a pool)."""
    n_weights, n_biases, _, n_bs, _ = ctx.meta.counts
    wanted = ctx.needs_input_grad
    end = 5 + n_weights + n_biases + (factors if n_bs else 0)
    return (wanted[0], wanted[1], *wanted[5:end])


def _gradients(ctx, grad_ys, saved):
    meta = ctx.meta
    n_weights, _, n_as, n_bs, n_tables = meta.counts
    x, mix, ids, seeds, *parameters = saved
    others_count = max(0, len(ctx.needs_input_grad) - 5 - sum(meta.counts))
    kept = len(parameters) - n_weights - n_as - n_bs - n_tables - others_count
    ss, firsts, lora_As, lora_Bs, tables, others = cut(parameters, kept, n_weights, n_as, n_bs, n_tables)
    flat_needs = _needs_of_used(ctx, grad_ys)
    named = (meta.outputs, meta.adapters, meta.scalings, tables, meta.layers, meta.widths, meta.size)
    given = [grad for grad in grad_ys if grad is not None]
    if ctx.implementation is not None and all(map(is_plain, given)):
        weights = joined((*firsts, *others), meta.weight_layouts, given[0].dtype)
        adapters = _adapters(weights, lora_As, lora_Bs, *named)
        needs = MultiNeeds.from_flat(flat_needs, n_weights, n_bs)
        grads = _backward(
            ctx.implementation, grad_ys, x, ss, weights, adapters, ids, mix, meta.dropout_ps, seeds, needs
        )
    else:
        backward = torch.ops.peft_kernels.multi_lora_linear_backward
        found = iter(
            backward(
                list(grad_ys),
                x,
                ss,
                (*firsts, *others),
                meta.weight_layouts,
                lora_As,
                lora_Bs,
                *named,
                ids,
                mix,
                meta.dropout_ps,
                seeds,
                flat_needs,
            )
        )
        grads = [next(found) if need else None for need in flat_needs]
    rest = len(ctx.needs_input_grad) - 3 - len(grads)
    return (grads[0], grads[1], None, None, None, *grads[2:], *([None] * rest))


def _needs_of_used(ctx, grad_ys) -> tuple[bool, ...]:
    """What is wanted, less the parameters of projections whose y nobody used: those get no gradient, not zeros."""
    meta = ctx.meta
    used = [grad is not None for grad in grad_ys]
    per_factor = [used[output] for output in meta.outputs]
    wanted = _wanted(ctx, 2 * len(per_factor))
    return tuple(map(operator.and_, wanted, (True, True, *used, *used, *per_factor, *per_factor)))


def _under_autocast(x, weights, biases, adapters, adapter_ids, adapter_weights, dropout_ps, seeds):
    """As in `lora_linear`: x, W and b take the autocast dtype, A and B stay as they are, and W of 4 bits too."""
    x, *others = autocast_together(x, *weights, *biases)
    weights, biases = others[: len(weights)], others[len(weights) :]
    with torch.autocast(x.device.type, enabled=False):
        return multi_lora_linear(x, weights, biases, adapters, adapter_ids, adapter_weights, dropout_ps, seeds)


def multi_lora_linear(x, weights, biases, adapters, adapter_ids, adapter_weights, dropout_ps, seeds):
    """The op with autograd, for arguments that `functional.multi_lora_linear` has checked and flattened."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        return _under_autocast(x, weights, biases, adapters, adapter_ids, adapter_weights, dropout_ps, seeds)
    lora_As, lora_Bs, outputs, names, scalings, tables, layers, widths, count = _flat(adapters)
    lora_Bs, scalings = fold_scalings(lora_Bs, scalings)
    firsts, others, weight_layouts = split(weights)
    if torch.is_grad_enabled():
        tensors = distinct((*firsts, *biases, *lora_As, *lora_Bs, *tables, *others))
        counts = (len(firsts), len(biases), len(lora_As), len(lora_Bs), len(tables))
        meta = Meta(outputs, names, scalings, layers, widths, count, dropout_ps, weight_layouts, counts)
        return MultiLoraLinear.apply(x, adapter_weights, adapter_ids, seeds, meta, *tensors)
    if is_plain(x):
        options = (adapter_ids.shape[1], adapter_weights is not None, seeds is not None, False)
        implementation = select(x, weights, adapters, *options)
        arguments = (biases, adapters, adapter_ids, adapter_weights, dropout_ps, seeds, False)
        return tuple(_forward(implementation, x, weights, *arguments)[0])
    ys, _ = torch.ops.peft_kernels.multi_lora_linear(
        x, [*firsts, *others], weight_layouts, biases, lora_As, lora_Bs, outputs, names, scalings, tables, layers,
        widths, count, adapter_ids, adapter_weights, dropout_ps, seeds, False,
    )  # fmt: skip
    return tuple(ys)
