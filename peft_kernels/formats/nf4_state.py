"""An `NF4Weight` under the keys that bitsandbytes' `Linear4bit` has in checkpoints, and back.

| key behind the weight's name | holds |
|---|---|
| (none) | the packed bytes [ceil(bytes / itemsize), 1], as uint8 or viewed as another dtype (`quant_storage`) |
| .absmax | float32 [blocks], or uint8 with double quantisation |
| .quant_map | float32 [16], always `CODE` |
| .nested_absmax, .nested_quant_map | float32 [ceil(blocks / 256)], float32 [256], with double quantisation |
| .quant_state.bitsandbytes__nf4 | uint8, the text of a JSON object: quant_type, blocksize, dtype, shape, and for double
quantisation nested_blocksize, nested_dtype, nested_offset |

bitsandbytes itself is not needed. What is read comes from files nobody vouches for: each entry is checked, and the
message begins with its key. Source: bitsandbytes 0.50, functional.py, `QuantState.as_dict` and `from_dict`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_kernels.formats.nf4 import BLOCKSIZES, CODE, NESTED_BLOCKSIZE, QUANT_STATE, STATE_SUFFIXES, NF4Weight, code
from peft_kernels.formats.strict_json import parse_object, short

STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FACTS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FACTS = ("nested_blocksize", "nested_dtype", "nested_offset")
_MAX_TEXT = 4096
_MAX_NUMEL = 1 << 62  # so that numbers of elements, also those of a padded last block, fit in 64 bits


def to_state(q: NF4Weight, prefix: str = "weight", quant_storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The entries of a checkpoint, byte for byte those of bitsandbytes; the big ones share memory with `q`.

    Args:
        q: a whole weight, no view of a part. With double quantisation the offset is read from its device.
        prefix: the weight's name.
        quant_storage: what the packed bytes are shown as: uint8, bfloat16, float16 or float32. FSDP flattens parameters
            of one dtype only.

    Raises:
        ValueError: q is a view, or its bytes do not fill whole elements of `quant_storage`.
        TypeError: quant_storage or the dtype of q is none of the format's.
    """
    packed = stored(q, quant_storage)
    if q.dtype not in _DTYPES.values():
        raise TypeError(f"{prefix}: q.dtype is {q.dtype}; expected {_listed(_DTYPES.values())}")
    # A copy: safetensors refuses tensors that share memory, and many weights may share one table.
    state = {prefix: packed, f"{prefix}.absmax": q.absmax, f"{prefix}.quant_map": code(q.device).clone()}
    facts: dict[str, Any] = {"quant_type": "nf4", "blocksize": q.blocksize}
    facts |= {"dtype": str(q.dtype).removeprefix("torch."), "shape": list(q.shape)}
    if q.nested_absmax is not None and q.nested_map is not None and q.nested_offset is not None:
        state[f"{prefix}.nested_absmax"] = q.nested_absmax
        state[f"{prefix}.nested_quant_map"] = q.nested_map.clone()
        facts |= {"nested_blocksize": NESTED_BLOCKSIZE, "nested_dtype": "float32"}
        facts["nested_offset"] = q.nested_offset.item()
    text = json.dumps(facts).encode()
    state[f"{prefix}.{QUANT_STATE}"] = torch.tensor(list(text), dtype=torch.uint8)
    return state


def stored(q: NF4Weight, quant_storage: torch.dtype) -> Tensor:
    """The packed bytes as bitsandbytes holds them: [elements, 1] of `quant_storage`, sharing memory.

    Raises:
        ValueError, TypeError: as `to_state`.
    """
    if quant_storage not in STORAGES:
        raise TypeError(f"quant_storage is {quant_storage}; expected {_listed(STORAGES)}")
    n, k, stride, first, blocksize, _ = q.layout
    sizes = (q.packed.numel(), q.absmax.numel())
    if first or (n > 1 and stride != k) or sizes != (-(-n * k // 2), -(-n * k // blocksize)):
        raise ValueError(
            f"the weight of shape {tuple(q.shape)} is a view of a larger one; only a whole weight has a state"
        )
    if sizes[0] % quant_storage.itemsize:
        raise ValueError(f"{sizes[0]} bytes do not fill whole elements of {quant_storage}; use torch.uint8")
    return q.packed.view(quant_storage).view(-1, 1)


def from_state(state: Mapping[str, Tensor], prefix: str = "weight") -> NF4Weight:
    """The weight that entries of a checkpoint describe, sharing their memory. Only keys that are `prefix` or begin with
    it and a dot are looked at.

    Raises:
        ValueError: an entry is missing, unknown, of another dtype or size than the others say, or holds what no
            quantisation writes; the message begins with its key. Nothing is returned of a state that is partly right.
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


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


class _Reader:
    """Reads the entries of one weight; every refusal names the key."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix
        known = [self.key(suffix) for suffix in STATE_SUFFIXES]
        unknown = [key for key in state if key.startswith(f"{prefix}.") and key not in known]
        if unknown:
            raise ValueError(f"{unknown[0]}: is no part of a weight in NF4; expected {_listed([prefix, *known])}")

    def key(self, suffix: str) -> str:
        return f"{self.prefix}.{suffix}" if suffix else self.prefix

    def refuse(self, suffix: str, why: str) -> ValueError:
        return ValueError(f"{self.key(suffix)}: {why}")

    def refuse_fact(self, facts: dict[str, Any], name: str, expected: object) -> ValueError:
        got = short(facts[name]) if name in facts else "missing"
        return self.refuse(QUANT_STATE, f"{name} is {got}; expected {expected}")

    def get(self, suffix: str) -> Tensor:
        tensor = self.state.get(self.key(suffix))
        if tensor is None:
            raise self.refuse(suffix, "is missing")
        if not isinstance(tensor, Tensor):
            raise self.refuse(suffix, f"is {type(tensor).__name__}; expected a tensor")
        return tensor

    def tensor(self, suffix: str, dtype: torch.dtype, numel: int) -> Tensor:
        """An entry beside the packed bytes, flat."""
        tensor, device = self.get(suffix), self.get("").device
        if tensor.dtype != dtype:
            raise self.refuse(suffix, f"has dtype {tensor.dtype}; expected {dtype}")
        if tensor.numel() != numel:
            raise self.refuse(suffix, f"has {tensor.numel()} elements; expected {numel}")
        if tensor.device != device:
            raise self.refuse(suffix, f"is on {tensor.device}, but {self.prefix} is on {device}; expected one device")
        return tensor.detach().reshape(-1).contiguous()

    def check_scales(self, suffix: str, scales: Tensor) -> None:
        if not scales.is_meta and not bool((scales.isfinite() & (scales >= 0)).all()):
            raise self.refuse(suffix, "has entries that are negative or not finite")

    def facts(self) -> dict[str, Any]:
        """The JSON object; quant_type, blocksize and dtype are checked."""
        text = self.get(QUANT_STATE)
        if text.dtype != torch.uint8 or text.is_meta or text.numel() > _MAX_TEXT:
            got = f"is {text.dtype} [{text.numel()}] on {text.device}"
            raise self.refuse(QUANT_STATE, f"{got}; expected torch.uint8, the text of a JSON object")
        facts = parse_object(bytes(text.reshape(-1).tolist()), self.key(QUANT_STATE), "the quantisation state")
        unknown = [name for name in facts if name not in (*_FACTS, *_NESTED_FACTS)]
        if unknown:
            raise self.refuse(QUANT_STATE, f"{short(unknown[0])} is unknown; it may change what the bytes mean")
        if facts.get("quant_type") != "nf4":
            raise self.refuse_fact(facts, "quant_type", "'nf4'")
        if type(facts.get("blocksize")) is not int or facts["blocksize"] not in BLOCKSIZES:
            raise self.refuse_fact(facts, "blocksize", f"one of {_listed(BLOCKSIZES)}")
        if not isinstance(facts.get("dtype"), str) or facts["dtype"] not in _DTYPES:
            raise self.refuse_fact(facts, "dtype", f"one of {_listed(_DTYPES)}")
        return facts

    def shape(self, facts: dict[str, Any]) -> torch.Size:
        shape = facts.get("shape")
        if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(map(_is_size, shape)):
            raise self.refuse_fact(facts, "shape", "two or three sizes, none negative")
        if math.prod(shape) >= _MAX_NUMEL:
            raise self.refuse_fact(facts, "shape", "fewer elements than 2^62")
        return torch.Size(shape)

    def packed(self, size: int) -> Tensor:
        tensor = self.get("")
        if tensor.dtype not in STORAGES:
            raise self.refuse("", f"has dtype {tensor.dtype}; expected one of {_listed(STORAGES)}")
        if tensor.nbytes != size:
            raise self.refuse("", f"has {tensor.nbytes} bytes; expected {size}, two elements of the shape to a byte")
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    def code(self) -> None:
        """The table must be NF4's: the kernels have it built in."""
        table = self.tensor("quant_map", torch.float32, len(CODE))
        if not table.is_meta and not torch.equal(table, code(table.device)):
            raise self.refuse("quant_map", "is not the table of NF4")

    def nested(self, facts: dict[str, Any], groups: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(nested_absmax, nested_map, nested_offset), or three times None without double quantisation."""
        there = [suffix for suffix in STATE_SUFFIXES if suffix.startswith("nested_") and self.key(suffix) in self.state]
        if not there and not any(name in facts for name in _NESTED_FACTS):
            return None, None, None
        absmax = self.tensor("nested_absmax", torch.float32, groups)
        table = self.tensor("nested_quant_map", torch.float32, 256)
        self.check_scales("nested_absmax", absmax)
        if not table.is_meta and not bool(table.isfinite().all()):
            raise self.refuse("nested_quant_map", "has entries that are not finite")
        for name, want in (("nested_blocksize", NESTED_BLOCKSIZE), ("nested_dtype", "float32")):
            if type(facts.get(name)) is not type(want) or facts[name] != want:
                raise self.refuse_fact(facts, name, want)
        offset: Any = facts.get("nested_offset")
        if type(offset) not in (float, int) or not abs(offset) <= torch.finfo(torch.float32).max:
            raise self.refuse_fact(facts, "nested_offset", "a finite number")
        return absmax, table, torch.tensor(float(offset), dtype=torch.float32, device=absmax.device)


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0
