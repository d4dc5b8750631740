"""What the tests of the NF4 format share: weights, the format's formula over bitsandbytes' own state, and bytes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import NF4Weight, to_state

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
QUANT_STATE = "weight.quant_state.bitsandbytes__nf4"


def weight_of(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    """Weights like a layer's, but of rows that differ in size by orders of magnitude, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    weight *= 10.0 ** (2 * torch.rand(*shape[:-1], 1, generator=generator) - 1)
    return (weight * (torch.rand(*shape[:-1], 1, generator=generator) > 0.1)).to(dtype)


def formula(packed: Tensor, absmax: Tensor, blocksize: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The weight by definition, of float32 absmax values: index, table, one product, one rounding."""
    import bitsandbytes

    pairs = packed.view(torch.uint8).flatten()
    indices = torch.stack((pairs >> 4, pairs & 15), 1).flatten()
    values = bitsandbytes.functional.get_4bit_type("nf4", "cpu")[indices.long()][: torch.Size(shape).numel()]
    return (values * absmax.repeat_interleave(blocksize)[: len(values)]).to(dtype).view(shape)


def equal(one: Tensor | None, two: Tensor | None) -> bool:
    """The same dtype, shape and bytes: -0 is not 0, NaN is NaN."""
    if one is None or two is None:
        return one is two
    same = (one.dtype, one.shape, one.device) == (two.dtype, two.shape, two.device)
    return same and torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, two)))


def same_weight(one: NF4Weight, two: NF4Weight) -> bool:
    tensors = ("packed", "absmax", "nested_absmax", "nested_map", "nested_offset")
    facts = ("shape", "dtype", "blocksize", "first", "row_stride")
    return all(equal(getattr(one, t), getattr(two, t)) for t in tensors) and all(
        getattr(one, fact) == getattr(two, fact) for fact in facts
    )


def facts_of(state: dict[str, Tensor], key: str = QUANT_STATE) -> dict[str, Any]:
    return json.loads(bytes(state[key].tolist()))


def with_facts(state: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """The state with other values in its JSON object; a value that is `...` is taken out."""
    facts = {name: value for name, value in {**facts_of(state), **changes}.items() if value is not ...}
    return with_text(state, json.dumps(facts).encode())


def with_text(state: dict[str, Tensor], text: bytes) -> dict[str, Tensor]:
    return {**state, QUANT_STATE: torch.tensor(list(text), dtype=torch.uint8)}


def state_of(q: NF4Weight) -> dict[str, Tensor]:
    """A state whose tensors can be spoilt without spoiling q."""
    return {key: tensor.clone() for key, tensor in to_state(q).items()}
