"""Problems to run an op on: drawn tensors, and the op composed of PyTorch's own functions, differentiated by autograd.

The composition shares no code with any implementation but the specification of the dropout mask. `selfcheck` compares
the implementations with it, `tuning.search` measures them on the same problems.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import functional, ops
from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.reference import philox_dropout as philox_reference

SCALING = 1.5
SEED = 11
EXPERTS = 8
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True)
class Case:
    """One problem of an op: tensors by argument name (those in `grads` get gradients), other arguments (a 4-bit weight
    `q` is one of them), and eager code.

    `eager(tensors)` composes the op of PyTorch's own functions in the dtype of whatever tensors it is given. Tensors of
    an argument that is a list are named "weights.0", "weights.1" ...; several outputs count as one, side by side.
    """

    op: str
    label: str
    tensors: dict[str, Tensor]
    options: Mapping[str, object]
    eager: Callable[[dict[str, Tensor]], Tensor] = field(repr=False)
    grads: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        placed: Any = next(iter(self.tensors.values()), self.options.get("q"))
        return placed.device.type

    @property
    def problem(self) -> Any:
        """What dispatch chooses by."""
        return getattr(ops, self.op).problem(**nested(self.tensors), **self.options)

    def call(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The op's output for these tensors, by whatever implementation is in force."""
        ys = self.outputs(tensors)
        return ys[0] if len(ys) == 1 else torch.cat(ys, -1)

    def outputs(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """As `call`, each output by itself."""
        ys = getattr(functional, self.op)(**nested(tensors), **self.options)
        return (ys,) if isinstance(ys, Tensor) else tuple(ys)

    def without(self, *names: str, **options: object) -> Case:
        """The same problem without these tensors (an optional bias), and with these options."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in names}
        return replace(self, tensors=tensors, options={**self.options, **options})

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The tensors detached, those in `grads` requiring gradients; floating-point ones in `dtype` if given."""
        found = {name: t.detach().to(dtype) if dtype and t.is_floating_point() else t.detach() for name, t in
                 self.tensors.items()}  # fmt: skip
        return {name: t.requires_grad_() if name in self.grads else t for name, t in found.items()}


@dataclass(frozen=True)
class Shape:
    """Sizes and dtypes of a linear layer with an adapter: `batch` rows, K in_features, N out_features, rank r."""

    batch: tuple[int, ...]
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0

    def __str__(self) -> str:
        rows = "x".join(map(str, self.batch))
        dtypes = f"{short(self.dtype)}/{short(self.adapter_dtype)}"
        return f"{rows}, {self.k} -> {self.n}, r={self.r}, {dtypes}, p={self.dropout_p:g}"


class Draw:
    """Normal numbers, drawn on the device itself: in float64 on a CPU, in float32 where they are many. On the meta
    device there are sizes only."""

    def __init__(self, device: str | torch.device, seed: int = 1) -> None:
        self.device = torch.device(device)
        self.generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def __call__(self, dtype: torch.dtype, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        wide = torch.float64 if self.device.type == "cpu" else torch.float32
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=wide)
        return values.mul_(scale).add_(offset).to(dtype)

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator, device=self.device)

    def seeds(self, *seeds: int) -> Tensor:
        """On the device: a CUDA graph cannot read integers of the host."""
        return torch.tensor(seeds, device=self.device)


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors named "weights.0", "weights.1" as one argument, the list `weights`."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        stem, _, index = name.partition(".")
        if index:
            arguments.setdefault(stem, []).append(tensor)
        else:
            arguments[stem] = tensor
    return arguments


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """x times the mask that every implementation is to draw for this seed, and 1 / (1 - p)."""
    if p == 0:
        return x
    rows = x.numel() // x.shape[-1]
    mask = philox_reference.keep_mask(rows, x.shape[-1], p, torch.tensor([seed], device=x.device))
    return x * (mask.view_as(x) * (1 / (1 - p))).to(x.dtype)


def _low_rank(x: Tensor, a: Tensor, b: Tensor, p: float, seed: int) -> Tensor:
    return F.linear(F.linear(dropped(x, p, seed), a.to(x.dtype)), b.to(x.dtype))


def _layer(shape: Shape, draw: Draw) -> dict[str, Tensor]:
    n, k, r = shape.n, shape.k, shape.r
    return {
        "x": draw(shape.dtype, *shape.batch, k),
        "weight": draw(shape.dtype, n, k, scale=k**-0.5),
        "bias": draw(shape.dtype, n),
        "lora_A": draw(shape.adapter_dtype, r, k, scale=k**-0.5),
        "lora_B": draw(shape.adapter_dtype, n, r, scale=r**-0.5),
    }


def _options(shape: Shape, draw: Draw, adapters: int = 1) -> dict[str, Any]:
    seeds = draw.seeds(*range(SEED, SEED + adapters)) if shape.dropout_p else None
    return {"dropout_p": shape.dropout_p, "seed": seeds}


def lora_linear(shape: Shape, draw: Draw) -> Case:
    def eager(t: dict[str, Tensor]) -> Tensor:
        low_rank = _low_rank(t["x"], t["lora_A"], t["lora_B"], shape.dropout_p, SEED)
        return F.linear(t["x"], t["weight"], t.get("bias")) + SCALING * low_rank

    options = {"scaling": SCALING, **_options(shape, draw)}
    return Case("lora_linear", str(shape), _layer(shape, draw), options, eager, ("x", "lora_A", "lora_B"))


def dora_linear(shape: Shape, draw: Draw) -> Case:
    def eager(t: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wide = torch.promote_types(torch.float32, t["weight"].dtype)
            merged = t["weight"].to(wide) + SCALING * (t["lora_B"].to(wide) @ t["lora_A"].to(wide))
            norm = merged.norm(dim=1)
        low_rank = _low_rank(t["x"], t["lora_A"], t["lora_B"], shape.dropout_p, SEED)
        factor = (t["magnitude"] / norm).to(t["x"].dtype)
        y = factor * (F.linear(t["x"], t["weight"]) + SCALING * low_rank)
        return y + t["bias"] if "bias" in t else y

    tensors = _layer(shape, draw) | {"magnitude": draw(shape.adapter_dtype, shape.n, scale=0.1, offset=1.5)}
    options = {"scaling": SCALING, **_options(shape, draw)}
    return Case("dora_linear", str(shape), tensors, options, eager, ("x", "lora_A", "lora_B", "magnitude"))


def dora_weight_norm(shape: Shape, draw: Draw) -> Case:
    def eager(t: dict[str, Tensor]) -> Tensor:
        wide = torch.promote_types(torch.float32, t["weight"].dtype)
        return (t["weight"].to(wide) + SCALING * (t["lora_B"].to(wide) @ t["lora_A"].to(wide))).norm(dim=1)

    layer = _layer(shape, draw)
    tensors = {name: layer[name] for name in ("weight", "lora_A", "lora_B")}
    dtypes = f"{short(shape.dtype)}/{short(shape.adapter_dtype)}"
    label = f"{shape.k} -> {shape.n}, r={shape.r}, {dtypes}"
    return Case("dora_weight_norm", label, tensors, {"scaling": SCALING}, eager)


def _projections(x: Tensor, t: dict[str, Tensor], indices: Sequence[int], p: float) -> list[Tensor]:
    return [
        F.linear(x, t[f"weights.{j}"])
        + SCALING * _low_rank(x, t[f"lora_As.{j}"], t[f"lora_Bs.{j}"], p, SEED + j)
        for j in indices
    ]  # fmt: skip


def _group(shape: Shape, draw: Draw, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """x, and a weight and adapter for each (out_features, in_features)."""
    adapter, r = shape.adapter_dtype, shape.r
    tensors = {"x": draw(shape.dtype, *shape.batch, shape.k)}
    for j, (n, k) in enumerate(sizes):
        tensors[f"weights.{j}"] = draw(shape.dtype, n, k, scale=k**-0.5)
        tensors[f"lora_As.{j}"] = draw(adapter, r, k, scale=k**-0.5)
        tensors[f"lora_Bs.{j}"] = draw(adapter, n, r, scale=r**-0.5)
    return tensors


def _group_grads(count: int) -> tuple[str, ...]:
    return ("x", *(f"lora_As.{j}" for j in range(count)), *(f"lora_Bs.{j}" for j in range(count)))


def lora_linear_group(shape: Shape, draw: Draw) -> Case:
    """q, k and v of grouped-query attention: N, N/4 and N/4 wide."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        return torch.cat(_projections(t["x"], t, range(3), shape.dropout_p), -1)

    narrow = max(1, shape.n // 4)
    tensors = _group(shape, draw, [(shape.n, shape.k), (narrow, shape.k), (narrow, shape.k)])
    options = {"scalings": SCALING, **_options(shape, draw, 3)}
    return Case("lora_linear_group", str(shape), tensors, options, eager, _group_grads(3))


def lora_swiglu_mlp(shape: Shape, draw: Draw, activation: str = "silu") -> Case:
    """K wide, N wide inside, K wide again."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        gate, up = _projections(t["x"], t, range(2), shape.dropout_p)
        return _projections(ACTIVATIONS[activation](gate) * up, t, (2,), shape.dropout_p)[0]

    tensors = _group(shape, draw, [(shape.n, shape.k), (shape.n, shape.k), (shape.k, shape.n)])
    options = {"scalings": SCALING, "activation": activation, **_options(shape, draw, 3)}
    return Case("lora_swiglu_mlp", f"{shape}, {activation}", tensors, options, eager, _group_grads(3))


def gated_activation(shape: Shape, draw: Draw, activation: str = "silu") -> Case:
    """N wide."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        return ACTIVATIONS[activation](t["gate"]) * t["up"]

    tensors = {name: draw(shape.dtype, *shape.batch, shape.n) for name in ("gate", "up")}
    label = f"{'x'.join(map(str, shape.batch))}x{shape.n}, {short(shape.dtype)}, {activation}"
    return Case("gated_activation", label, tensors, {"activation": activation}, eager, ("gate", "up"))


def lora_embedding(shape: Shape, draw: Draw) -> Case:
    """A table of K rows, N wide."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        ids = t["input"]
        update = F.linear(F.embedding(ids, t["lora_A"].t().to(t["weight"].dtype)), t["lora_B"].to(t["weight"].dtype))
        return F.embedding(ids, t["weight"]) + SCALING * update

    n, k, r = shape.n, shape.k, shape.r
    tensors = {
        "input": draw.integers(k, *shape.batch),
        "weight": draw(shape.dtype, k, n),
        "lora_A": draw(shape.adapter_dtype, r, k),
        "lora_B": draw(shape.adapter_dtype, n, r, scale=r**-0.5),
    }
    return Case("lora_embedding", str(shape), tensors, {"scaling": SCALING}, eager, ("lora_A", "lora_B"))


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
            update = _low_rank(dropping, t["lora_A"][e], t["lora_B"][e], 0.0, SEED)
            ys.append(F.linear(plain, t["weight"][e]) + SCALING * update)
        return torch.cat(ys)

    tensors = {
        "x": draw(shape.dtype, rows, k),
        "weight": draw(shape.dtype, EXPERTS, n, k, scale=k**-0.5),
        "lora_A": draw(shape.adapter_dtype, EXPERTS, r, k, scale=k**-0.5),
        "lora_B": draw(shape.adapter_dtype, EXPERTS, n, r, scale=r**-0.5),
        "offsets": draw.seeds(*itertools.accumulate(counts)).to(torch.int32),
    }
    options = {"scaling": SCALING, **_options(shape, draw)}
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
    options = {"scalings": SCALING, **_options(shape, draw)}
    grads = (*_group_grads(len(ranks)), *(["adapter_weights"] if several else []))
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
            update = SCALING * _low_rank(x[own], lora_A, lora_B, 0.0, SEED)
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

    layer = _layer(shape, draw)
    tensors = {name: layer[name] for name in ("x", "weight", "bias")}
    tensors |= _adapters(shape, draw, (*shape.batch, *several))
    options = {"scalings": SCALING, **_options(shape, draw)}
    grads = (*_group_grads(len(ranks)), *(["adapter_weights"] if several else []))
    return Case("multi_lora_linear", f"{shape}, {per_row} of {len(ranks)} a row", tensors, options, eager, grads)


def philox_dropout(shape: Shape, draw: Draw) -> Case:
    """K wide."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        return dropped(t["x"], shape.dropout_p, SEED)

    tensors = {"x": draw(shape.dtype, *shape.batch, shape.k)}
    label = f"{'x'.join(map(str, shape.batch))}x{shape.k}, {short(shape.dtype)}, p={shape.dropout_p:g}"
    options = {"p": shape.dropout_p, "seed": draw.seeds(SEED)}
    return Case("philox_dropout", label, tensors, options, eager, ("x",))


def splitk_reduce(parts: int, size: int, dtype: torch.dtype, draw: Draw) -> Case:
    def eager(t: dict[str, Tensor]) -> Tensor:
        partials = t["partials"]
        total = reduce(add, partials.unbind()) * 0.5
        return total if partials.dtype == torch.float64 else total.to(dtype)

    tensors = {"partials": draw(torch.float32, parts, size)}
    label = f"{parts} parts of {size} to {short(dtype)}"
    return Case("splitk_reduce", label, tensors, {"scale": 0.5, "dtype": dtype}, eager)


def nf4_weight(
    draw: Draw, *shape: int, blocksize: int = 64, nested: bool = True, dtype: torch.dtype = torch.float32
) -> NF4Weight:
    """A weight of any bits: each of the 16 numbers as often as any other, an absmax of about K**-0.5 for each block."""
    numel, scale = math.prod(shape), max(1, shape[-1]) ** -0.5
    blocks = -(-numel // blocksize)
    packed = draw.integers(256, -(-numel // 2)).to(torch.uint8)
    if not nested:
        absmax = draw(torch.float32, blocks, scale=0.1 * scale, offset=scale)
        return NF4Weight(packed, absmax, None, None, None, torch.Size(shape), dtype, blocksize)
    indices = draw.integers(256, blocks).to(torch.uint8)
    absmax = draw(torch.float32, -(-blocks // nf4.NESTED_BLOCKSIZE), scale=0.02 * scale, offset=0.3 * scale)
    table, offset = nf4.dynamic_map(draw.device), draw(torch.float32, scale=0.02 * scale, offset=scale)
    return NF4Weight(packed, indices, absmax, table, offset, torch.Size(shape), dtype, blocksize)


def nf4_decoded(q: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The weight in full by the format's formula, the whole of which `q` is a part decoded first."""
    packed, absmax, *others = q.tensors
    indices = torch.stack((packed >> 4, packed & 15), 1).view(-1).long()
    if others:
        nested_absmax, table, offset = others
        scaled = table[absmax.long()] * nested_absmax.repeat_interleave(nf4.NESTED_BLOCKSIZE)[: len(absmax)]
        absmax = scaled + offset
    values = torch.tensor(nf4.CODE, device=q.device)[indices]
    values = values * absmax.repeat_interleave(q.blocksize)[: len(values)]
    n, k, stride, first, *_ = q.layout
    return values.to(dtype).as_strided((n, k), (stride, 1), first).reshape(q.shape)


def nf4_linear(shape: Shape, draw: Draw, **weight: Any) -> Case:
    def eager(t: dict[str, Tensor]) -> Tensor:
        return F.linear(t["x"], nf4_decoded(q, shape.dtype).to(t["x"].dtype), t.get("bias"))

    q = nf4_weight(draw, shape.n, shape.k, dtype=shape.dtype, **weight)
    tensors = {"x": draw(shape.dtype, *shape.batch, shape.k), "bias": draw(shape.dtype, shape.n)}
    return Case("nf4_linear", _nf4_label(shape, q), tensors, {"q": q}, eager, ("x",))


def nf4_lora_linear(shape: Shape, draw: Draw, **weight: Any) -> Case:
    def eager(t: dict[str, Tensor]) -> Tensor:
        low_rank = _low_rank(t["x"], t["lora_A"], t["lora_B"], shape.dropout_p, SEED)
        return F.linear(t["x"], nf4_decoded(q, shape.dtype).to(t["x"].dtype), t.get("bias")) + SCALING * low_rank

    q = nf4_weight(draw, shape.n, shape.k, dtype=shape.dtype, **weight)
    tensors = {name: tensor for name, tensor in _layer(shape, draw).items() if name != "weight"}
    options = {"q": q, "scaling": SCALING, **_options(shape, draw)}
    return Case("nf4_lora_linear", _nf4_label(shape, q), tensors, options, eager, ("x", "lora_A", "lora_B"))


def _nf4_label(shape: Shape, q: NF4Weight) -> str:
    return f"{shape}, blocks of {q.blocksize}{', nested' if q.is_nested else ''}"


def nf4_dequantize(shape: Shape, draw: Draw, **weight: Any) -> Case:
    """N by K, in the dtype of the shape: nothing but the very bits will do."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        return nf4_decoded(q, shape.dtype)

    q = nf4_weight(draw, shape.n, shape.k, **weight)
    return Case("nf4_dequantize", _nf4_label(shape, q), {}, {"q": q, "dtype": shape.dtype}, eager)


class QuantizeCase(Case):
    """The output is the bytes, then the absmax of each block, as numbers: nothing but the very bits will do."""

    def outputs(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        q = functional.nf4_quantize(**tensors, **self.options)  # type: ignore[arg-type]
        return q.packed.float(), q.absmax


def nf4_quantize(shape: Shape, draw: Draw, blocksize: int = 64) -> Case:
    """N by K, the absmax values left in float32."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        values = F.pad(t["weight"].float().flatten(), (0, -t["weight"].numel() % blocksize)).view(-1, blocksize)
        absmax = values.abs().amax(1)
        distance = (values / absmax.unsqueeze(1)).unsqueeze(-1) - torch.tensor(nf4.CODE, device=values.device)
        high, low = distance.abs().argmin(-1).view(-1, 2).unbind(1)
        return torch.cat(((16 * high + low)[: (shape.n * shape.k + 1) // 2].float(), absmax))

    label = f"{shape.k} -> {shape.n}, {short(shape.dtype)}, blocks of {blocksize}"
    options = {"blocksize": blocksize, "double_quant": False}
    weight = draw(shape.dtype, shape.n, shape.k, scale=shape.k**-0.5)
    return QuantizeCase("nf4_quantize", label, {"weight": weight}, options, eager)


# What can be drawn from a layer's shape alone.
BUILDERS: dict[str, Callable[[Shape, Draw], Case]] = {
    "lora_linear": lora_linear,
    "lora_linear_group": lora_linear_group,
    "dora_linear": dora_linear,
    "dora_weight_norm": dora_weight_norm,
    "lora_swiglu_mlp": lora_swiglu_mlp,
    "gated_activation": gated_activation,
    "lora_embedding": lora_embedding,
    "lora_expert_linear": lora_expert_linear,
    "multi_lora_linear": multi_lora_linear,
    "multi_lora_expert_linear": multi_lora_expert_linear,
    "philox_dropout": philox_dropout,
}
