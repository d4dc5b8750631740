"""Problems of the ops of many adapters and of stacks of experts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.problems.base import SCALING, SEED, Case, Draw, Shape, dropped, layer_of, low_rank, options_of
from peft_kernels.problems.linear import group_grads

EXPERTS = 8


def expert_rows(rows: int) -> tuple[int, ...]:
    """How many rows each expert gets: uneven numbers, one expert without any."""
    share = rows // (EXPERTS - 1)
    counts = [share + share // 2, share - share // 2, 0] + [share] * (EXPERTS - 3)
    counts[-1] += rows - sum(counts)
    return tuple(counts)


def lora_expert_linear(shape: Shape, draw: Draw) -> Case:
    """N by K for each of the experts."""
    rows, n, k, r = math.prod(shape.batch), shape.n, shape.k, shape.r
    counts = expert_rows(rows)

    def eager(t: dict[str, Tensor]) -> Tensor:
        x, ys = t["x"], []
        parts = zip(x.split(counts), dropped(x, shape.dropout_p, SEED).split(counts), strict=True)
        for e, (plain, dropping) in enumerate(parts):
            update = low_rank(dropping, t["lora_A"][e], t["lora_B"][e], 0.0, SEED)
            ys.append(F.linear(plain, t["weight"][e]) + SCALING * update)
        return torch.cat(ys)

    tensors = {
        "x": draw(shape.dtype, rows, k),
        "weight": draw(shape.dtype, EXPERTS, n, k, scale=k**-0.5),
        "lora_A": draw(shape.adapter_dtype, EXPERTS, r, k, scale=k**-0.5),
        "lora_B": draw(shape.adapter_dtype, EXPERTS, n, r, scale=r**-0.5),
        "offsets": draw.seeds(*itertools.accumulate(counts)).to(torch.int32),
    }
    options = {"scaling": SCALING, **options_of(shape, draw)}
    return Case("lora_expert_linear", str(shape), tensors, options, eager, ("x", "lora_A", "lora_B"))


def multi_lora_expert_linear(shape: Shape, draw: Draw, per_row: int = 1) -> Case:
    """The experts of `lora_expert_linear`, the adapters of `multi_lora_linear`."""
    rows, n, k = math.prod(shape.batch), shape.n, shape.k
    counts, ranks, several = expert_rows(rows), _ranks(shape), (per_row,) if per_row > 1 else ()

    def eager(t: dict[str, Tensor]) -> Tensor:
        dropping, ys = dropped(t["x"], shape.dropout_p, SEED).split(counts), []
        ids = t["adapter_ids"].reshape(rows, per_row).split(counts)
        mixes = t["adapter_weights"].split(counts) if several else [None] * EXPERTS
        for e, x in enumerate(t["x"].split(counts)):
            y = F.linear(x, t["weight"][e])
            ys.append(add_chosen(y, dropping[e], ids[e], mixes[e], *_factors(t, len(ranks), e)))
        return torch.cat(ys)

    tensors = {"x": draw(shape.dtype, rows, k), "weight": draw(shape.dtype, EXPERTS, n, k, scale=k**-0.5)}
    tensors["offsets"] = draw.seeds(*itertools.accumulate(counts)).to(torch.int32)
    tensors |= _adapters(replace(shape, batch=(rows,)), draw, (rows, *several), (EXPERTS,))
    options = {"scalings": SCALING, **options_of(shape, draw)}
    grads = (*group_grads(len(ranks)), *(["adapter_weights"] if several else []))
    label = f"{shape}, {per_row} of {len(ranks)} a row"
    return Case("multi_lora_expert_linear", label, tensors, options, eager, grads)


def _ranks(shape: Shape) -> list[int]:
    return [max(1, shape.r * part // 4) for part in (4, 2, 3, 4)]


def _adapters(shape: Shape, draw: Draw, choices: Sequence[int], experts: Sequence[int] = ()) -> dict[str, Tensor]:
    """Four adapters of ranks r / 2 to r, the last without rows, and ids, some of no adapter; with several a row, their
    weights too."""
    tensors, ranks = {}, _ranks(shape)
    for a, r in enumerate(ranks):
        tensors[f"lora_As.{a}"] = draw(shape.adapter_dtype, *experts, r, shape.k, scale=shape.k**-0.5)
        tensors[f"lora_Bs.{a}"] = draw(shape.adapter_dtype, *experts, shape.n, r, scale=r**-0.5)
    tensors["adapter_ids"] = draw.integers(len(ranks), *choices) - 1
    if len(choices) > len(shape.batch):
        tensors["adapter_weights"] = draw(torch.float32, *choices)
    return tensors


def _factors(t: dict[str, Tensor], count: int, *index: int) -> list[tuple[Tensor, Tensor]]:
    return [(t[f"lora_As.{a}"][index or ...], t[f"lora_Bs.{a}"][index or ...]) for a in range(count)]


def add_chosen(y: Tensor, x: Tensor, ids: Tensor, mix: Tensor | None, *factors: tuple[Tensor, Tensor]) -> Tensor:
    """y and, of each row, what its adapters make of x: PEFT's loop over adapters."""
    for a, (lora_A, lora_B) in enumerate(factors):
        for i, own in enumerate((ids == a).unbind(1)):
            update = SCALING * low_rank(x[own], lora_A, lora_B, 0.0, SEED)
            if mix is not None:
                update = update * mix[own, i].unsqueeze(1).to(update.dtype)
            y = y.index_put((own,), update, accumulate=True)
    return y


def multi_lora_linear(shape: Shape, draw: Draw, per_row: int = 1) -> Case:
    """Four adapters, the last without rows, and rows without any; `per_row` > 1: as many, weighted."""
    ranks, several = _ranks(shape), (per_row,) if per_row > 1 else ()

    def eager(t: dict[str, Tensor]) -> Tensor:
        x = t["x"].flatten(0, -2)
        ids, mix = t["adapter_ids"].reshape(len(x), per_row), None
        if several:
            mix = t["adapter_weights"].reshape(ids.shape)
        y = F.linear(x, t["weight"], t.get("bias"))
        y = add_chosen(y, dropped(x, shape.dropout_p, SEED), ids, mix, *_factors(t, len(ranks)))
        return y.view(*t["x"].shape[:-1], shape.n)

    layer = layer_of(shape, draw)
    tensors = {name: layer[name] for name in ("x", "weight", "bias")}
    tensors |= _adapters(shape, draw, (*shape.batch, *several))
    options = {"scalings": SCALING, **options_of(shape, draw)}
    grads = (*group_grads(len(ranks)), *(["adapter_weights"] if several else []))
    return Case("multi_lora_linear", f"{shape}, {per_row} of {len(ranks)} a row", tensors, options, eager, grads)
