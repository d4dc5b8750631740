"""Problems of the ops of one adapter or of none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.problems.base import SCALING, SEED, Case, Draw, Shape, dropped, layer_of, low_rank, options_of, short

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def lora_linear(shape: Shape, draw: Draw) -> Case:
    def eager(t: dict[str, Tensor]) -> Tensor:
        update = low_rank(t["x"], t["lora_A"], t["lora_B"], shape.dropout_p, SEED)
        return F.linear(t["x"], t["weight"], t.get("bias")) + SCALING * update

    options = {"scaling": SCALING, **options_of(shape, draw)}
    return Case("lora_linear", str(shape), layer_of(shape, draw), options, eager, ("x", "lora_A", "lora_B"))


def dora_linear(shape: Shape, draw: Draw) -> Case:
    def eager(t: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wide = torch.promote_types(torch.float32, t["weight"].dtype)
            merged = t["weight"].to(wide) + SCALING * (t["lora_B"].to(wide) @ t["lora_A"].to(wide))
            norm = merged.norm(dim=1)
        update = low_rank(t["x"], t["lora_A"], t["lora_B"], shape.dropout_p, SEED)
        factor = (t["magnitude"] / norm).to(t["x"].dtype)
        y = factor * (F.linear(t["x"], t["weight"]) + SCALING * update)
        return y + t["bias"] if "bias" in t else y

    tensors = layer_of(shape, draw) | {"magnitude": draw(shape.adapter_dtype, shape.n, scale=0.1, offset=1.5)}
    options = {"scaling": SCALING, **options_of(shape, draw)}
    return Case("dora_linear", str(shape), tensors, options, eager, ("x", "lora_A", "lora_B", "magnitude"))


def dora_weight_norm(shape: Shape, draw: Draw) -> Case:
    def eager(t: dict[str, Tensor]) -> Tensor:
        wide = torch.promote_types(torch.float32, t["weight"].dtype)
        return (t["weight"].to(wide) + SCALING * (t["lora_B"].to(wide) @ t["lora_A"].to(wide))).norm(dim=1)

    layer = layer_of(shape, draw)
    tensors = {name: layer[name] for name in ("weight", "lora_A", "lora_B")}
    dtypes = f"{short(shape.dtype)}/{short(shape.adapter_dtype)}"
    label = f"{shape.k} -> {shape.n}, r={shape.r}, {dtypes}"
    return Case("dora_weight_norm", label, tensors, {"scaling": SCALING}, eager)


def _projections(x: Tensor, t: dict[str, Tensor], indices: Sequence[int], p: float) -> list[Tensor]:
    return [
        F.linear(x, t[f"weights.{j}"])
        + SCALING * low_rank(x, t[f"lora_As.{j}"], t[f"lora_Bs.{j}"], p, SEED + j)
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


def group_grads(count: int) -> tuple[str, ...]:
    """What of x and `count` adapters gets gradients."""
    return ("x", *(f"lora_As.{j}" for j in range(count)), *(f"lora_Bs.{j}" for j in range(count)))


def lora_linear_group(shape: Shape, draw: Draw) -> Case:
    """q, k and v of grouped-query attention: N, N/4 and N/4 wide."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        return torch.cat(_projections(t["x"], t, range(3), shape.dropout_p), -1)

    narrow = max(1, shape.n // 4)
    tensors = _group(shape, draw, [(shape.n, shape.k), (narrow, shape.k), (narrow, shape.k)])
    options = {"scalings": SCALING, **options_of(shape, draw, 3)}
    return Case("lora_linear_group", str(shape), tensors, options, eager, group_grads(3))


def lora_swiglu_mlp(shape: Shape, draw: Draw, activation: str = "silu") -> Case:
    """K wide, N wide inside, K wide again."""

    def eager(t: dict[str, Tensor]) -> Tensor:
        gate, up = _projections(t["x"], t, range(2), shape.dropout_p)
        return _projections(ACTIVATIONS[activation](gate) * up, t, (2,), shape.dropout_p)[0]

    tensors = _group(shape, draw, [(shape.n, shape.k), (shape.n, shape.k), (shape.k, shape.n)])
    options = {"scalings": SCALING, "activation": activation, **options_of(shape, draw, 3)}
    return Case("lora_swiglu_mlp", f"{shape}, {activation}", tensors, options, eager, group_grads(3))


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
