"""`multi_lora_linear` in fused Triton kernels that find the rows of each adapter on the GPU: the host reads no id, so
that the op can be captured in a CUDA graph, as `composed` cannot.

A few rows without gradients (decode): the base product, then one launch for all projections (`_multi_decode`). Else the
rows are sorted by adapter, once for all projections, and each projection takes S = drop(x) A_aᵀ, then y as one grouped
GEMM with an extra K step; over 4 bits, with several adapters per row, or with too few rows of each adapter to fill
tiles, the base product and `_multi_update`. Backward, for each projection: dS, dX likewise, added to what the
projections before it gave, dA and dB by walking each adapter's rows. dW and dbias, rarely wanted, are PyTorch's. One
launch per projection, not per group.

Floor, bf16, r=16, K=N=4096, H200: 4096 tokens of 64 adapters, 200 us forward, of which the delta 26; 8192 rows of 8
adapters, training, 365 us forward and 397 us backward. Predicted 235-280, 480-580 and 530-650. Compiled for sm_80,
sm_90 and sm_100 and interpreted on the CPU; never run on a GPU yet (docs/kernels_many_adapters.md).
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.checks import MAX_RANK
from peft_kernels.formats._device_copies import on_device
from peft_kernels.formats.adapter_table import PoolAdapters
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels import _base
from peft_kernels.kernels.composed._passes import sum_over_rows as product_over_rows
from peft_kernels.kernels.composed._passes import sum_rows
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._measured import unproven as _unproven

# Choices of all rows up to which sorting costs more than reading an adapter once for each row that chose it.
MOST_DECODED = 256
# Rows of an adapter on average from which the GEMM takes the low-rank step along: the tiles that an adapter's last rows
# leave half empty, 64 rows of work for each adapter, then cost less than the second pass over y.
LEAST_FUSED = 1024


def unsupported(problem) -> str | None:
    if any(width > MAX_RANK for width in problem.widths):
        return f"rank {max(problem.widths)} is above {MAX_RANK}"
    if problem.m * problem.per_row >= 1 << 31:
        return "2^31 or more choices of adapters"
    adapter_dtype = problem.adapter_dtype or problem.dtype
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype, adapter_dtype)


def unproven(problem) -> str | None:
    return _unproven("multi_lora_linear", problem)


class _Call:
    """What all projections of one pass share: the table, the sorted places, the weights and the masks of dropout."""

    def __init__(self, like: Tensor, adapters, ids: Tensor, mix: Tensor | None, dropout_ps, seeds) -> None:
        from peft_kernels.kernels.triton._multi_rows import SortedPlaces

        self.adapters, self.seeds = adapters, seeds
        self.ids, self.mix = ids.contiguous(), None if mix is None else mix.contiguous()
        self.table = adapters.table(like.device)
        self.places = SortedPlaces(self.ids, adapters.count)
        self.dropout = None if seeds is None else _dropout(dropout_ps, like.device)
        self._factors: dict[tuple[int, bool], Any] = {}

    def factors(self, j: int, *, lora_b: bool):
        from peft_kernels.kernels.triton._multi_table import factors

        if (j, lora_b) not in self._factors:  # it looks at every adapter
            self._factors[j, lora_b] = factors(self.adapters, self.table, j, lora_b=lora_b)
        return self._factors[j, lora_b]

    def mask(self, j: int) -> tuple[Tensor | None, Tensor | None]:
        """What the kernels take as `dropout` and `seed`."""
        return self.dropout, None if self.seeds is None else self.seeds[j : j + 1]

    def s(self, x: Tensor, j: int) -> Tensor:
        from peft_kernels.kernels.triton._multi_down_projection import multi_down_projection

        factors = self.factors(j, lora_b=False)
        return multi_down_projection(x, factors, self.adapters.widths[j], self.places, *self.mask(j))[0]

    def grad_s(self, grad_y: Tensor, j: int, s: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """dS, not yet times scaling; with S also the gradient of the weights."""
        from peft_kernels.kernels.triton._multi_down_projection import multi_down_projection

        factors, width = self.factors(j, lora_b=True), self.adapters.widths[j]
        return multi_down_projection(grad_y, factors, width, self.places, mix=self.mix, s=s)

    def fused(self, x: Tensor, weight, n: int, j: int, *, dropout: bool):
        """The configuration with which the base product takes the low-rank step along; None where it does not."""
        from peft_kernels.kernels.triton._multi_gemm import config_of

        if isinstance(weight, NF4Weight) or self.places.per_row != 1 or self.places.rows_each < LEAST_FUSED:
            return None
        return config_of(x, n, self.adapters.widths[j], self.places.rows_each, dropout)


def _dropout(dropout_ps, device: torch.device) -> Tensor:
    """[count, 2]: threshold and scale of the mask of each adapter."""
    from peft_kernels.kernels.reference.philox_dropout import scale, threshold

    host = torch.tensor([(threshold(p), scale(p)) for p in dropout_ps], dtype=torch.float32)
    return on_device(host, struct.pack(f"{len(dropout_ps)}d", *dropout_ps), device)


def _occupied(adapters) -> set[int]:
    """The projections that some adapter has a part in."""
    if isinstance(adapters, PoolAdapters):
        return set(range(len(adapters.widths))) if adapters.count else set()
    return set(adapters.outputs)


def forward(x, weights, biases, adapters, ids, mix, dropout_ps, seeds, keep_s):
    if not _occupied(adapters):
        ys = [_base.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return ys, [x.new_zeros(*ids.shape, width) for width in adapters.widths] if keep_s else []
    if not keep_s and seeds is None and ids.numel() <= MOST_DECODED:
        return _decode(x, weights, biases, adapters, ids, mix), []
    call = _Call(x, adapters, ids, mix, dropout_ps, seeds)
    ys, ss = [], []
    for j, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        s = call.s(x, j)
        ys.append(_output(call, x, weight, bias, s, j))
        ss.append(s)
    return ys, ss if keep_s else []


def _decode(x, weights, biases, adapters, ids, mix) -> list[Tensor]:
    from peft_kernels.kernels.triton._multi_decode import multi_decode

    ys = [_base.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    multi_decode(x, ys, adapters.table(x.device), adapters.widths, ids, mix, adapters.dtype)
    return ys


def _output(call: _Call, x, weight, bias, s, j: int) -> Tensor:
    from peft_kernels.kernels.triton._multi_gemm import multi_gemm
    from peft_kernels.kernels.triton._multi_update import multi_update

    config = call.fused(x, weight, weight.shape[0], j, dropout=False)
    if config is not None:
        return multi_gemm(x, weight.t(), s, call.factors(j, lora_b=True), call.places, config, call.mix, bias)
    y = _base.linear(x, weight, bias)
    multi_update(y, s, call.factors(j, lora_b=True), call.ids, call.places, call.mix)
    return y


def backward(grad_ys, x, ss, weights, adapters, ids, mix, dropout_ps, seeds, needs):
    """Gradients (dx, dmix, [dW_j], [db_j], [dA], [dB]); None where `needs` says that nobody asked."""
    given = next(grad for grad in grad_ys if grad is not None)
    wide = torch.promote_types(torch.float32, given.dtype)
    grads = _Gradients(
        None,
        given.new_zeros(ids.shape, dtype=wide) if needs.adapter_weights else None,
        [None] * len(adapters.lora_As),
        [None] * len(adapters.lora_Bs),
    )
    occupied = _occupied(adapters)
    call = _Call(given, adapters, ids, mix, dropout_ps, seeds) if occupied else None
    for j, grad_y in enumerate(grad_ys):
        if call is None or j not in occupied:
            if needs.x and grad_y is not None:
                grads = grads._replace(x=_plus_base(grads.x, grad_y, weights[j]))
        elif grad_y is not None:
            grads = _of_projection(call, j, grads, grad_y, x, ss[j] if ss else None, weights[j], needs)
    grad_weights = [
        None if not need else torch.zeros_like(w) if g is None else product_over_rows(g, x, w)
        for g, w, need in zip(grad_ys, weights, needs.weights, strict=True)
    ]
    grad_biases = [
        None if not need else given.new_zeros(w.shape[0], dtype=wide) if g is None else sum_rows(g)
        for g, w, need in zip(grad_ys, weights, needs.biases, strict=True)
    ]
    grad_As = _wanted(grads.lora_As, adapters.lora_As, needs.lora_As)
    grad_Bs = _wanted(grads.lora_Bs, adapters.lora_Bs, needs.lora_Bs)
    return grads.x, grads.mix, grad_weights, grad_biases, grad_As, grad_Bs


class _Gradients(NamedTuple):
    x: Tensor | None
    mix: Tensor | None
    lora_As: list[Tensor | None]
    lora_Bs: list[Tensor | None]


def _wanted(grads, parameters, needs) -> list[Tensor | None]:
    """Zeros where no projection gave any."""
    return [
        None if not need else torch.zeros_like(parameter) if grad is None else grad
        for grad, parameter, need in zip(grads, parameters, needs, strict=False)
    ]


def _plus_base(grad_x: Tensor | None, grad_y, weight) -> Tensor:
    if grad_x is None:
        return _base.grad_input(grad_y, weight)
    _base.add_grad_input(grad_x, grad_y, weight)
    return grad_x


def _of_projection(call: _Call, j: int, grads: _Gradients, grad_y, x, s, weight, needs) -> _Gradients:
    """`grads` and what projection j adds."""
    of_lists = [i for i, output in enumerate(call.adapters.outputs) if output == j]
    need_a = any(needs.lora_As[i] for i in of_lists)
    need_b = any(needs.lora_Bs[i] for i in of_lists)
    if needs.x or need_a or grads.mix is not None:
        grad_s, grad_mix = call.grad_s(grad_y, j, None if grads.mix is None else s)
        if grads.mix is not None and grad_mix is not None:
            grads.mix.add_(grad_mix)
    if needs.x:
        grads = grads._replace(x=_grad_x(call, j, grads.x, grad_y, grad_s, weight))
    if need_a:
        _hand_out(call, j, grads.lora_As, _sum(call, j, grad_s, x, lora_b=False), lora_b=False)
    if need_b:
        _hand_out(call, j, grads.lora_Bs, _sum(call, j, s, grad_y, lora_b=True), lora_b=True)
    return grads


def _grad_x(call: _Call, j: int, grad_x: Tensor | None, grad_y, grad_s, weight) -> Tensor:
    from peft_kernels.kernels.triton._multi_gemm import multi_gemm
    from peft_kernels.kernels.triton._multi_update import multi_update

    factors, mask = call.factors(j, lora_b=False), call.mask(j)
    config = call.fused(grad_y, weight, weight.shape[1], j, dropout=call.seeds is not None)
    if config is not None:
        return multi_gemm(
            grad_y, weight, grad_s, factors, call.places, config, None, None, *mask, total=grad_x
        )  # fmt: skip
    grad_x = _plus_base(grad_x, grad_y, weight)
    multi_update(grad_x, grad_s, factors, call.ids, call.places, None, *mask)
    return grad_x


def _sum(call: _Call, j: int, low: Tensor, wide: Tensor, *, lora_b: bool) -> Tensor:
    from peft_kernels.kernels.triton._multi_sum_over_rows import multi_sum_over_rows

    adapters = call.adapters
    ranks = sum(a.shape[0] for a, output in zip(adapters.lora_As, adapters.outputs, strict=True) if output == j)
    # dS has the weights in it, S has not.
    options = (call.mix, None, None) if lora_b else (None, *call.mask(j))
    return multi_sum_over_rows(low, wide, call.factors(j, lora_b=lora_b), ranks, call.places, *options)


def _hand_out(call: _Call, j: int, grads: list[Tensor | None], flat: Tensor, *, lora_b: bool) -> None:
    """Views of `flat`, the gradients of projection j in the order of the adapters."""
    start = 0
    for adapter in range(call.adapters.count):
        factors = call.adapters.factors(j, adapter)
        if factors is not None:
            like = factors.B if lora_b else factors.A
            grads[factors.place] = flat[start : start + like.numel()].view(like.shape)
            start += like.numel()
