"""The op `multi_lora_expert_linear`: a stack of linear layers, each on its own rows of x, which choose their adapters.

y[m] = x[m] W_eᵀ + b_e + Σ_i w[m, i] s_a (drop(x)[m] A_aeᵀ) B_aeᵀ,   a = adapter_ids[m, i]; -1 adds nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import dispatch
from peft_kernels.formats.adapter_table import AdapterLists
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._rows import owned, row_bucket
from peft_kernels.ops._tracing import distinct, fold_scalings
from peft_kernels.ops._weights import Weight, all_dense, cut, joined, split
from peft_kernels.ops.lora_linear import autocast_together
from peft_kernels.ops.multi_lora_linear import MultiNeeds

# The stacks that are there, the adapter of each, scalings; width: columns of S; count: of all adapters.
_ADAPTERS = "Tensor[] lora_As, Tensor[] lora_Bs, int[] adapters, float[] scalings, int width, int count, Tensor offsets"
SCHEMAS = {
    # weight and layout: a dense stack and nothing, or what `_weights.split` makes of one of 4 bits. adapter_ids int64
    # [M, k]; adapter_weights [M, k]; dropout_ps: of each adapter. ss: [M, k, width], none without keep_s.
    "multi_lora_expert_linear": (
        f"(Tensor x, Tensor[] weight, int[] layout, int experts, Tensor? bias, {_ADAPTERS}, Tensor adapter_ids,"
        " Tensor? adapter_weights, float[] dropout_ps, Tensor? seed, bool keep_s) -> (Tensor y, Tensor[] ss)"
    ),
    # Gradients of x, adapter_weights, weight, bias, As and Bs: as many as `needs` asks for, in that order.
    "multi_lora_expert_linear_backward": (
        f"(Tensor grad_y, Tensor? x, Tensor[] ss, Tensor[] weight, int[] layout, int experts, {_ADAPTERS},"
        " Tensor adapter_ids, Tensor? adapter_weights, float[] dropout_ps, Tensor? seed, bool[] needs) -> Tensor[]"
    ),
}


class Problem(NamedTuple):
    """What dispatch chooses by: the sizes of `lora_expert_linear`, the adapters of `multi_lora_linear`."""

    device: str
    device_index: int | None
    dtype: torch.dtype
    adapter_dtype: torch.dtype | None
    m: int
    experts: int
    n: int
    k: int
    adapters: int
    width: int
    per_row: int
    mixed: bool
    dropout: bool
    nf4: bool = False


def problem(
    x, weight, lora_As, lora_Bs, offsets, adapter_ids, *, scalings, adapter_weights=None, dropout_p=0.0, training=True,
    **_,
) -> Problem:  # fmt: skip
    from peft_kernels.functional.multi_lora_linear import flatten_lists

    scalings = (scalings,) if isinstance(scalings, Sequence) else scalings
    stacks = flatten_lists("multi_lora_expert_linear", (weight,), (lora_As,), (lora_Bs,), scalings)
    dropout = training and any(p > 0 for p in ([dropout_p] if isinstance(dropout_p, (int, float)) else dropout_p))
    per_row = 1 if adapter_weights is None else adapter_weights.shape[-1]
    return _problem(x, weight, stacks, per_row, adapter_weights is not None, dropout)


def _problem(rows: Tensor, weight: Weight, stacks: AdapterLists, per_row: int, mixed: bool, dropout: bool) -> Problem:
    device, (e, n, k) = rows.device, weight.shape
    adapters = 1 << (stacks.count - 1).bit_length() if stacks.count else 0
    return Problem(
        device.type, device.index, rows.dtype, stacks.dtype, row_bucket(rows), e, n, k, adapters, stacks.widths[0],
        per_row, mixed, dropout, not all_dense((weight,)),
    )  # fmt: skip


def _select(rows, weight, stacks, adapter_ids, adapter_weights, seed):
    options = (adapter_ids.shape[1], adapter_weights is not None, seed is not None)
    return dispatch.select("multi_lora_expert_linear", _problem(rows, weight, stacks, *options))


def _stack(weight, layout, experts: int, dtype) -> Weight:
    """The weights of all experts, [experts, out, in]: a layout tells rows and columns only."""
    (whole,) = joined(weight, layout, dtype)
    if not isinstance(whole, NF4Weight):
        return whole
    rows, k = whole.shape
    return whole._replace(shape=torch.Size((experts, rows // max(1, experts), k)))


def _stacks(lora_As, lora_Bs, adapters, scalings, width, count) -> AdapterLists:
    return AdapterLists(lora_As, lora_Bs, [0] * len(adapters), adapters, scalings, [width], count)


def kernel(
    x, weight, layout, experts, bias, lora_As, lora_Bs, adapters, scalings, width, count, offsets, adapter_ids,
    adapter_weights, dropout_ps, seed, keep_s,
):  # fmt: skip
    weight = _stack(weight, layout, experts, x.dtype)
    stacks = _stacks(lora_As, lora_Bs, adapters, scalings, width, count)
    chosen = _select(x, weight, stacks, adapter_ids, adapter_weights, seed)
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    return chosen.forward(x, weight, bias, stacks, offsets, adapter_ids, adapter_weights, dropout_ps, seed, keep_s)


def fake(
    x, weight, layout, experts, bias, lora_As, lora_Bs, adapters, scalings, width, count, offsets, adapter_ids,
    adapter_weights, dropout_ps, seed, keep_s,
):  # fmt: skip
    weight = _stack(weight, layout, experts, x.dtype)
    ss = [x.new_empty(*adapter_ids.shape, width)] if keep_s else []
    return x.new_empty(x.shape[0], weight.shape[1]), ss


def backward_kernel(
    grad_y, x, ss, weight, layout, experts, lora_As, lora_Bs, adapters, scalings, width, count, offsets, adapter_ids,
    adapter_weights, dropout_ps, seed, needs,
):  # fmt: skip
    weight = _stack(weight, layout, experts, grad_y.dtype)
    stacks = _stacks(lora_As, lora_Bs, adapters, scalings, width, count)
    chosen = _select(grad_y, weight, stacks, adapter_ids, adapter_weights, seed)
    grad_x, grad_mix, *others = chosen.backward(
        grad_y, x, ss, weight, stacks, offsets, adapter_ids, adapter_weights, dropout_ps, seed,
        MultiNeeds.from_flat(needs, 1, len(lora_Bs)),
    )  # fmt: skip
    grads = [grad_x, grad_mix, *(grad for kind in others for grad in kind)]
    return [owned(grad) for grad in grads if grad is not None]


def backward_fake(
    grad_y, x, ss, weight, layout, experts, lora_As, lora_Bs, adapters, scalings, width, count, offsets, adapter_ids,
    adapter_weights, dropout_ps, seed, needs,
):  # fmt: skip
    weight = _stack(weight, layout, experts, grad_y.dtype)
    e, n, k = weight.shape
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    like = [
        ((grad_y.shape[0], k), grad_y.dtype),
        (adapter_ids.shape, wide),
        (weight.shape, weight.dtype),
        ((e, n), wide),
    ]
    like += [(t.shape, t.dtype) for t in (*lora_As, *lora_Bs)]
    return [grad_y.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(like, needs, strict=True) if need]


KERNELS = {
    "multi_lora_expert_linear": (kernel, fake),
    "multi_lora_expert_linear_backward": (backward_kernel, backward_fake),
}


class Meta(NamedTuple):
    """Arguments of the op that are no tensors. `size`: the number of adapters."""

    layout: list[int]
    experts: int
    adapters: list[int]
    scalings: list[float]
    width: int
    size: int
    dropout_ps: list[float]


class MultiLoraExpertLinear(torch.autograd.Function):
    """Saves x, S and the seed, each only when some wanted gradient uses it. `tensors` are the weight (of one of 4 bits
    its first tensor), the bias, the As, the Bs and the weight's other tensors."""

    @staticmethod
    def forward(ctx, x, adapter_weights, adapter_ids, offsets, seed, meta, *tensors):
        present = len(meta.adapters)
        (first, bias), lora_As, lora_Bs, others = cut(tensors, 2, present, present)
        ctx.meta = meta
        needs = MultiNeeds.from_flat(_wanted(ctx), 1, present)
        named = (meta.adapters, meta.scalings, meta.width, meta.size, offsets, adapter_ids, adapter_weights)
        y, ss = torch.ops.peft_kernels.multi_lora_expert_linear(
            x, (first, *others), meta.layout, meta.experts, bias, lora_As, lora_Bs, *named, meta.dropout_ps, seed,
            needs.adapter_weights or any(needs.lora_Bs),
        )  # fmt: skip
        saved_x = x if any(needs.lora_As) or any(needs.weights) else None
        ctx.save_for_backward(
            saved_x, adapter_weights, adapter_ids, offsets, seed, first, *lora_As, *lora_Bs, *others, *ss
        )
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("multi_lora_expert_linear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _wanted(ctx) -> tuple[bool, ...]:
    """Whether a gradient is wanted of x, the adapter weights, the weight, the bias, each A and each B."""
    needs = ctx.needs_input_grad
    return (needs[0], needs[1], *needs[6 : 8 + 2 * len(ctx.meta.adapters)])


def _gradients(ctx, grad_y, saved):
    meta, present, needs = ctx.meta, len(ctx.meta.adapters), _wanted(ctx)
    (x, mix, ids, offsets, seed), (first,), lora_As, lora_Bs, others, ss = cut(
        saved, 5, 1, present, present, len(ctx.needs_input_grad) - 8 - 2 * present
    )
    found = iter(torch.ops.peft_kernels.multi_lora_expert_linear_backward(
        grad_y, x, ss, (first, *others), meta.layout, meta.experts, lora_As, lora_Bs, meta.adapters, meta.scalings,
        meta.width, meta.size, offsets, ids, mix, meta.dropout_ps, seed, needs,
    ))  # fmt: skip
    grads = [next(found) if need else None for need in needs]
    return (*grads[:2], None, None, None, None, *grads[2:], *([None] * len(others)))


def multi_lora_expert_linear(x, weight, bias, stacks, offsets, adapter_ids, adapter_weights, dropout_ps, seed):
    """The op with autograd, for arguments that `functional.multi_lora_expert_linear` has checked and flattened."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = autocast_together(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return multi_lora_expert_linear(
                x, weight, bias, stacks, offsets, adapter_ids, adapter_weights, dropout_ps, seed
            )
    lora_Bs, scalings = fold_scalings(stacks.lora_Bs, stacks.scalings)
    (first,), others, layout = split((weight,))
    experts, (width,) = weight.shape[0], stacks.widths
    if torch.is_grad_enabled():
        meta = Meta(layout, experts, stacks.adapters, scalings, width, stacks.count, dropout_ps)
        tensors = distinct((first, bias, *stacks.lora_As, *lora_Bs, *others))
        return MultiLoraExpertLinear.apply(x, adapter_weights, adapter_ids, offsets, seed, meta, *tensors)
    return torch.ops.peft_kernels.multi_lora_expert_linear(
        x, [first, *others], layout, experts, bias, stacks.lora_As, lora_Bs, stacks.adapters, scalings, width,
        stacks.count, offsets, adapter_ids, adapter_weights, dropout_ps, seed, False,
    )[0]  # fmt: skip
