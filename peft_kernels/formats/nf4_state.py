"""An `NF4Weight` under the keys that bitsandbytes' `Linear4bit` has in checkpoints, and back.

| key behind the weight's name | holds |
|---|---|
| (none) | the packed bytes [ceil(bytes / itemsize), 1], as uint8 or viewed as another dtype (`quant_storage`) |
| .absmax | float32 [blocks], or uint8 with double quantisation |
| .quant_map | float32 [16], always `CODE` |
| .nested_absmax, .nested_quant_map | float32 [ceil(blocks / 256)], float32 [256], with double quantisation |
| .quant_state.bitsandbytes__nf4 | uint8, a JSON object: quant_type, blocksize, dtype, shape, and nested_blocksize, nested_dtype, nested_offset |

bitsandbytes itself is not needed. What is read comes from files nobody vouches for: each entry is checked, and the message
names the key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import BLOCKSIZES, CODE, NESTED_BLOCKSIZE, NF4Weight, code
from peft_kernels.formats.strict_json import parse_object, short

QUANT_STATE = "quant_state.bitsandbytes__nf4"
STATE_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE)
STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def to_state(q: NF4Weight, prefix: str = "weight", quant_storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The entries of a checkpoint, byte for byte those of bitsandbytes; the big ones share memory with `q`.

    Args:
        q: a whole weight, no view of a part. Reads the nested offset from its device.
        prefix: the weight's name.
        quant_storage: what the packed bytes are shown as: uint8, bfloat16, float16 or float32. FSDP flattens parameters
            of one dtype only.

    Raises:
        ValueError: q is a view, or its bytes do not fill whole elements of `quant_storage`.
        TypeError: quant_storage is none of these.
    """
    packed = stored(q, quant_storage)
    # A copy: safetensors refuses tensors that share memory, and many weights may share one table.
    state = {prefix: packed, f"{prefix}.absmax": q.absmax, f"{prefix}.quant_map": code(q.device).clone()}
    facts: dict[str, Any] = {"quant_type": "nf4", "blocksize": q.blocksize, "dtype": _name(q.dtype)}
    facts["shape"] = list(q.shape)
    if q.nested_absmax is not None and q.nested_map is not None and q.nested_offset is not None:
        state[f"{prefix}.nested_absmax"] = q.nested_absmax
        state[f"{prefix}.nested_quant_map"] = q.nested_map.clone()
        facts |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        facts["nested_offset"] = q.nested_offset.item()
    text = json.dumps(facts).encode()
    state[f"{prefix}.{QUANT_STATE}"] = torch.tensor(list(text), dtype=torch.uint8)
    return state


def stored(q: NF4Weight, quant_storage: torch.dtype) -> Tensor:
    """The packed bytes as bitsandbytes holds them: [elements, 1] of `quant_storage`, sharing memory."""
    if quant_storage not in STORAGES:
        raise TypeError(f"quant_storage is {quant_storage}; expected {', '.join(map(str, STORAGES))}")
    numel = math.prod(q.shape)
    if q.first or q.packed.numel() != -(-numel // 2):
        raise ValueError(
            f"the weight of shape {tuple(q.shape)} is a view of a larger one; only a whole weight has a state"
        )
    if q.packed.numel() % quant_storage.itemsize:
        raise ValueError(f"{q.packed.numel()} bytes do not fill whole elements of {quant_storage}; use torch.uint8")
    return q.packed.view(quant_storage).view(-1, 1)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def from_state(state: Mapping[str, Tensor], prefix: str = "weight") -> NF4Weight:
    """The weight that entries of a checkpoint describe, sharing their memory. Other entries are not looked at.

    Raises:
        ValueError: an entry is missing, of another dtype or size than the others say, or holds what no quantisation
            writes; the message begins with its key. Nothing is returned of a state that is partly right.
    """
    reader = _Reader(state, prefix)
    facts = reader.facts()
    shape, blocksize = reader.shape(facts), facts["blocksize"]
    numel = math.prod(shape)
    packed = reader.packed(-(-numel // 2))
    reader.code()
    blocks = -(-numel // blocksize)
    nested = reader.nested(facts, -(-blocks // NESTED_BLOCKSIZE))
    absmax = reader.tensor("absmax", torch.float32 if nested[0] is None else torch.uint8, blocks)
    if nested[0] is None:
        reader.check_scales("absmax", absmax)
    return NF4Weight(packed, absmax, *nested, shape, _DTYPES[facts["dtype"]], blocksize)


class _Reader:
    """Reads entries of one weight; every refusal names the key."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def key(self, suffix: str) -> str:
        return f"{self.prefix}.{suffix}" if suffix else self.prefix

    def refuse(self, suffix: str, why: str) -> ValueError:
        return ValueError(f"{self.key(suffix)}: {why}")

    def get(self, suffix: str) -> Tensor:
        tensor = self.state.get(self.key(suffix))
        if not isinstance(tensor, Tensor):
            there = "is missing" if tensor is None else f"is {type(tensor).__name__}; expected a tensor"
            raise self.refuse(suffix, there)
        return tensor

    def tensor(self, suffix: str, dtype: torch.dtype, numel: int) -> Tensor:
        tensor = self.get(suffix)
        if tensor.dtype != dtype:
            raise self.refuse(suffix, f"has dtype {tensor.dtype}; expected {dtype}")
        if tensor.numel() != numel:
            raise self.refuse(suffix, f"has {tensor.numel()} elements; expected {numel}")
        return tensor.detach().reshape(-1).contiguous()

    def check_scales(self, suffix: str, scales: Tensor) -> None:
        if scales.device.type != "meta" and not bool((scales.isfinite() & (scales >= 0)).all()):
            raise self.refuse(suffix, "has entries that are negative or not finite")

    def facts(self) -> dict[str, Any]:
        """The JSON object; quant_type, blocksize and dtype are checked."""
        kinds = [key for key in self.state if key.startswith(self.key("quant_state."))]
        other = [key for key in kinds if key != self.key(QUANT_STATE)]
        if other:
            raise ValueError(f"{other[0]}: is another format than NF4; expected {self.key(QUANT_STATE)}")
        blob = self.get(QUANT_STATE)
        if blob.dtype != torch.uint8:
            raise self.refuse(QUANT_STATE, f"has dtype {blob.dtype}; expected torch.uint8, the bytes of a JSON object")
        facts = parse_object(bytes(blob.reshape(-1).tolist()), self.key(QUANT_STATE), "the quantisation state")
        if facts.get("quant_type") != "nf4":
            raise self.refuse(QUANT_STATE, f"quant_type is {short(facts.get('quant_type'))}; expected 'nf4'")
        blocksize = facts.get("blocksize")
        if type(blocksize) is not int or blocksize not in BLOCKSIZES:
            sizes = ", ".join(map(str, BLOCKSIZES))
            raise self.refuse(QUANT_STATE, f"blocksize is {short(blocksize)}; expected one of {sizes}")
        if not isinstance(facts.get("dtype"), str) or facts["dtype"] not in _DTYPES:
            raise self.refuse(QUANT_STATE, f"dtype is {short(facts.get('dtype'))}; expected {', '.join(_DTYPES)}")
        return facts

    def shape(self, facts: dict[str, Any]) -> torch.Size:
        shape = facts.get("shape")
        whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not whole or len(shape) not in (2, 3):
            raise self.refuse(QUANT_STATE, f"shape is {short(shape)}; expected two or three sizes, none negative")
        if math.prod(shape) >= 1 << 62:
            raise self.refuse(QUANT_STATE, f"shape is {short(shape)}, more elements than memory has addresses")
        return torch.Size(shape)

    def packed(self, size: int) -> Tensor:
        tensor = self.get("")
        if tensor.dtype not in STORAGES:
            raise self.refuse("", f"has dtype {tensor.dtype}; expected {', '.join(map(str, STORAGES))}")
        if tensor.numel() * tensor.element_size() != size:
            have = tensor.numel() * tensor.element_size()
            raise self.refuse("", f"has {have} bytes; expected {size}, two elements of the shape to a byte")
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    def code(self) -> None:
        """The table must be NF4's: the kernels have it built in."""
        table = self.tensor("quant_map", torch.float32, len(CODE))
        if table.device.type != "meta" and not torch.equal(table, code(table.device)):
            raise self.refuse("quant_map", "is not the table of NF4")

    def nested(self, facts: dict[str, Any], groups: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(nested_absmax, nested_map, nested_offset), or three times None without double quantisation."""
        names = ("nested_absmax", "nested_quant_map")
        there = [suffix for suffix in names if self.key(suffix) in self.state]
        if not there and not any(name.startswith("nested_") for name in facts):
            return None, None, None
        absmax = self.tensor("nested_absmax", torch.float32, groups)
        table = self.tensor("nested_quant_map", torch.float32, 256)
        self.check_scales("nested_absmax", absmax)
        if table.device.type != "meta" and not bool(table.isfinite().all()):
            raise self.refuse("nested_quant_map", "has entries that are not finite")
        expected = {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        for name, want in expected.items():
            if facts.get(name) != want:
                raise self.refuse(QUANT_STATE, f"{name} is {short(facts.get(name))}; expected {want}")
        offset = facts.get("nested_offset")
        if type(offset) not in (float, int) or not math.isfinite(offset):
            raise self.refuse(QUANT_STATE, f"nested_offset is {short(offset)}; expected a finite number")
        return absmax, table, torch.tensor(float(offset), dtype=torch.float32, device=absmax.device)
