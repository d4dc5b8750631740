"""Argument checks shared by the functions of `functional/`: each raises before anything is computed and says
which argument it is about, what it got and what it needs."""

from __future__ import annotations

import math
import numbers
from typing import Any, Protocol

import torch
from torch import Tensor

from peft_kernels.formats.mask import PackedMask, words_of
from peft_kernels.formats.nf4 import BLOCKSIZES, NESTED_BLOCKSIZE, NF4Weight

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
MAX_RANK = 512


class Placed(Protocol):
    """A tensor, or what this library keeps in the place of one."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def device(self) -> torch.device: ...


def shape_text(shape) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; expected a torch.Tensor")


def check_floating(op: str, name: str, value: Any) -> None:
    check_tensor(op, name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}; expected float32, float16, bfloat16 or float64")


def check_shape(op: str, name: str, value: Placed, expected: tuple, why: str) -> None:
    """`expected` holds sizes, or a name where any size will do."""
    fits = len(value.shape) == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{op}: {name} has shape {shape_text(value.shape)}, but {why}; expected {shape_text(expected)}"
        )


def check_device(op: str, name: str, value: Placed, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, but x is on {device}; expected all on one device")


def check_same_dtype(op: str, name: str, value: Tensor, dtype: torch.dtype, whose: str) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {value.dtype}, but {whose} has {dtype}; expected the same")


def check_number(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} is {type(value).__name__}; expected a number")


def check_finite(op: str, name: str, value: Any) -> None:
    check_number(op, name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} is {value}; expected a finite number")


def check_probability(op: str, name: str, value: Any) -> None:
    check_number(op, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} is {value}; expected a probability in [0, 1]")


def check_rank(op: str, name: str, r: int) -> None:
    if isinstance(r, bool) or not isinstance(r, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} is {r!r}; expected an integer")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"{op}: {name} is {r}; expected 1 <= {name} <= {MAX_RANK}")


def check_seed(op: str, seed: Any, device: torch.device) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed has dtype {seed.dtype}; expected torch.int64")
        if seed.numel() != 1:
            raise ValueError(f"{op}: seed has shape {shape_text(seed.shape)}; expected (1,)")
        check_device(op, "seed", seed, device)
    elif isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"{op}: seed is {seed!r}; expected an integer, an int64 tensor or None")
    elif not -(2**63) <= int(seed) < 2**63:
        raise ValueError(f"{op}: seed is {seed}; expected a signed 64-bit integer")


def check_adapter(op: str, lora_A: Any, lora_B: Any, columns: tuple[int, str], rows: tuple[int, str]) -> None:
    """Checks lora_A [r, columns] and lora_B [rows, r]; each size comes with what of the weight it has to fit.

    Raises:
        ValueError: a shape does not fit, or r is outside 1..512.
        TypeError: no floating-point tensor, or two dtypes.
    """
    check_floating(op, "lora_A", lora_A)
    check_shape(op, "lora_A", lora_A, ("r", columns[0]), f"weight has {columns[0]} {columns[1]}")
    r = lora_A.shape[0]
    check_rank(op, "r", r)
    check_floating(op, "lora_B", lora_B)
    check_shape(op, "lora_B", lora_B, (rows[0], r), f"weight has {rows[0]} {rows[1]} and lora_A rank {r}")
    check_same_dtype(op, "lora_B", lora_B, lora_A.dtype, "lora_A")


def check_blocksize(op: str, name: str, blocksize: Any) -> None:
    if isinstance(blocksize, float) or blocksize not in BLOCKSIZES:
        raise ValueError(f"{op}: {name} is {blocksize!r}; expected one of {', '.join(map(str, BLOCKSIZES))}")


def check_nf4(op: str, name: str, q: Any) -> None:
    """Checks that the tensors of an NF4Weight are what its format says.

    Raises:
        TypeError: no NF4Weight, or a tensor of another dtype.
        ValueError: a tensor is too short for the shape, on another device, or the blocksize is none of the format's.
    """
    if not isinstance(q, NF4Weight):
        raise TypeError(f"{op}: {name} is {type(q).__name__}; expected a peft_kernels.formats.nf4.NF4Weight")
    check_blocksize(op, f"{name}.blocksize", q.blocksize)
    n, k, stride, first, *_ = q.layout
    if n < 0 or k < 0 or stride < 0 or first < 0:
        raise ValueError(
            f"{op}: {name} has shape {shape_text(q.shape)}, first {first} and row_stride {q.row_stride}; "
            "expected no negative number"
        )
    last = first + (n - 1) * stride + k if n and k else 0
    blocks = -(-last // q.blocksize)
    wanted = {"packed": (torch.uint8, -(-last // 2)), "absmax": (torch.float32, blocks)}
    if q.nested_absmax is not None:
        wanted["absmax"] = (torch.uint8, blocks)
        wanted["nested_absmax"] = (torch.float32, -(-blocks // NESTED_BLOCKSIZE))
        wanted["nested_map"] = (torch.float32, 256)
        wanted["nested_offset"] = (torch.float32, 1)
    for field, (dtype, least) in wanted.items():
        tensor = getattr(q, field)
        check_tensor(op, f"{name}.{field}", tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name}.{field} has dtype {tensor.dtype}; expected {dtype}")
        if tensor.numel() < least or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name}.{field} has {tensor.numel()} elements, but {name} has shape {shape_text(q.shape)}; "
                f"expected at least {least}, contiguous"
            )
        if tensor.device != q.device:
            raise ValueError(
                f"{op}: {name}.{field} is on {tensor.device}, but {name}.packed is on {q.device}; expected all on one "
                "device"
            )


def check_weight(op: str, name: str, weight: Any, x: Tensor, shape: tuple, why: str) -> None:
    """Checks the weight that x is multiplied with: a tensor in x's dtype (in any under autocast), or an NF4Weight.

    Args:
        shape: as `expected` of `check_shape`.
    """
    if isinstance(weight, NF4Weight):
        check_nf4(op, name, weight)
    else:
        check_floating(op, name, weight)
    check_shape(op, name, weight, shape, why)
    check_device(op, name, weight, x.device)
    # Of the meta device nobody can be asked whether there is an autocast.
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if isinstance(weight, Tensor) and not autocast:
        check_same_dtype(op, name, weight, x.dtype, "x")


def check_bias(op: str, name: str, bias: Any, whose: str, weight: Tensor | NF4Weight) -> None:
    """Checks the bias beside the weight `whose`, [out, in] or [experts, out, in]: in its dtype, over an NF4Weight in
    any."""
    *experts, n = expected = tuple(weight.shape[:-1])
    each = "".join(f"{e} experts and " for e in experts)
    check_floating(op, name, bias)
    check_shape(op, name, bias, expected, f"{whose} has {each}{n} output features")
    check_device(op, name, bias, weight.device)
    if isinstance(weight, Tensor):
        check_same_dtype(op, name, bias, weight.dtype, whose)


def check_nf4_matrix(op: str, name: str, q: Any, x: Tensor) -> None:
    """Checks an NF4Weight [out_features, in_features] that x [..., in_features] is multiplied with."""
    check_nf4(op, name, q)
    if x.ndim == 0:
        raise ValueError(f"{op}: x has no dimensions; expected (..., in_features)")
    k = x.shape[-1]
    if len(q.shape) != 2 or q.shape[1] != k:
        raise ValueError(
            f"{op}: {name} has shape {shape_text(q.shape)}, but x has {k} features; expected (out_features, {k})"
        )
    if q.device != x.device:
        raise ValueError(f"{op}: {name} is on {q.device}, but x is on {x.device}; expected all on one device")


def check_mask(op: str, name: str, mask: Any) -> None:
    """Checks that the words of a PackedMask are what its shape says.

    Raises:
        TypeError: no PackedMask, or words of another dtype.
        ValueError: words that do not fit the shape.
    """
    if not isinstance(mask, PackedMask):
        raise TypeError(f"{op}: {name} is {type(mask).__name__}; expected a peft_kernels.formats.mask.PackedMask")
    check_tensor(op, f"{name}.words", mask.words)
    if mask.words.dtype != torch.int32:
        raise TypeError(f"{op}: {name}.words has dtype {mask.words.dtype}; expected torch.int32")
    if len(mask.shape) != 2:
        raise ValueError(f"{op}: {name} has shape {shape_text(mask.shape)}; expected (out_features, in_features)")
    n, k = mask.shape
    check_shape(op, f"{name}.words", mask.words, (n, words_of(k)), f"{name} has shape {shape_text(mask.shape)}")


def check_mask_of(op: str, name: str, mask: Any, weight: Placed, whose: str = "weight") -> None:
    """Checks a PackedMask of `weight` [out, in].

    Raises:
        TypeError: as `check_mask`.
        ValueError: as `check_mask`, or of another shape or device than the weight.
    """
    if not isinstance(mask, PackedMask) or tuple(mask.shape) != tuple(weight.shape):
        check_mask(op, name, mask)
        check_shape(op, name, mask, tuple(weight.shape), f"{whose} has shape {shape_text(weight.shape)}")
    check_mask(op, name, mask)
    if mask.device != weight.device:
        raise ValueError(f"{op}: {name} is on {mask.device}, but {whose} is on {weight.device}; expected the same")
