"""Problems of the ops over compressed weights, and over weights changed at chosen places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import functional, ops
from peft_kernels.formats import sparse
from peft_kernels.formats.positions import positions
from peft_kernels.formats.sparse import BlockWeight
from peft_kernels.problems.base import Case, Draw, Shape, layer_of
from peft_kernels.problems.pruned import drawn, packed


class SparseCase(Case):
    """The weight is compressed: with `values` among the tensors, its blocks' values are those."""

    def _weight(self, tensors: Mapping[str, Tensor]) -> Any:
        weight: Any = self.options["weight"]
        return weight.with_tensors([tensors["values"], *weight.tensors[1:]]) if "values" in tensors else weight

    @property
    def problem(self) -> Any:
        return ops.sparse_linear.problem(self.tensors["x"], self._weight(self.tensors))

    def outputs(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (functional.sparse_linear(tensors["x"], self._weight(tensors), tensors.get("bias")),)


def sparse_linear(shape: Shape, draw: Draw, layout: str, density: float = 0.3, block: int = 32) -> Case:
    """Of layout "block", blocks whose values train; others are frozen."""
    n, k = shape.n, shape.k
    if layout == "block":
        tiles = drawn(draw, density, -(-n // block), -(-k // block))
        kept = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :k]
    elif layout == "2:4":
        scores = draw(torch.float32, n, -(-k // 4), 4)
        kept = (scores.argsort(2).argsort(2) < 2).flatten(1)[:, :k]
    else:
        kept = drawn(draw, density, n, k)
    layer = layer_of(shape, draw)
    dense = torch.where(kept, layer["weight"], 0.0)
    weight = sparse.compress(dense, layout, block=block, mask=packed(kept))
    tensors = {"x": layer["x"], "bias": layer["bias"]}
    if isinstance(weight, BlockWeight):
        tensors["values"] = weight.values

    def eager(t: dict[str, Tensor]) -> Tensor:
        whole = dense.to(t["x"].dtype)
        if isinstance(weight, BlockWeight):
            # The place of each number of W among the blocks' values, as compressing numbers in their place shows it.
            numbered = torch.arange(t["values"].numel(), dtype=torch.float64, device=kept.device)
            places = weight.with_tensors([numbered.view_as(weight.values), *weight.tensors[1:]]).dense().long()
            whole = torch.where(kept, t["values"].flatten()[places], 0.0)
        return F.linear(t["x"], whole, t.get("bias"))

    grads = ("x", "values") if "values" in tensors else ("x",)
    return SparseCase(
        "sparse_linear", f"{shape}, {layout}, {density:g} kept", tensors, {"weight": weight}, eager, grads
    )


def sparse_delta_linear(shape: Shape, draw: Draw, density: float = 0.05) -> Case:
    """The values in the adapters' dtype."""
    kept = drawn(draw, density, shape.n, shape.k)
    flat = kept.flatten().nonzero().squeeze(1)
    layer = layer_of(shape, draw)
    tensors = {name: layer[name] for name in ("x", "weight", "bias")}
    tensors["values"] = draw(shape.adapter_dtype, flat.numel(), scale=shape.k**-0.5)

    def eager(t: dict[str, Tensor]) -> Tensor:
        delta = torch.zeros_like(t["weight"]).flatten().index_add(0, flat, t["values"].to(t["weight"].dtype))
        return F.linear(t["x"], t["weight"] + delta.view_as(t["weight"]), t.get("bias"))

    options = {"indices": positions(flat, kept.shape)}
    return Case("sparse_delta_linear", f"{shape}, {density:g} chosen", tensors, options, eager, ("x", "values"))
