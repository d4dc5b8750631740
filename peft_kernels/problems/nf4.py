"""Problems of the ops over weights of 4 bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import functional
from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.problems.base import SCALING, SEED, Case, Draw, Shape, layer_of, low_rank, options_of, short


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
        update = low_rank(t["x"], t["lora_A"], t["lora_B"], shape.dropout_p, SEED)
        return F.linear(t["x"], nf4_decoded(q, shape.dtype).to(t["x"].dtype), t.get("bias")) + SCALING * update

    q = nf4_weight(draw, shape.n, shape.k, dtype=shape.dtype, **weight)
    tensors = {name: tensor for name, tensor in layer_of(shape, draw).items() if name != "weight"}
    options = {"q": q, "scaling": SCALING, **options_of(shape, draw)}
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
