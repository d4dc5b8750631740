"""NF4, the 4-bit weights of QLoRA, in the bytes of bitsandbytes.

A weight is flattened in row-major order and cut into blocks of `blocksize` elements, also across rows; the last block
may be short. A block keeps its absmax, and for each element the index of one of 16 fixed numbers (`CODE`, quantiles of
the normal distribution): w = CODE[index] · absmax. Two indices share a byte, the earlier element in the high half. With
double quantisation the absmax values are themselves kept in 8 bits, in blocks of 256.

Sources: Dettmers et al., "QLoRA", 2023, https://arxiv.org/abs/2305.14314; bitsandbytes 0.50.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# fmt: off
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The 16 numbers, exactly representable in float32; index 7 is 0."""

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256

QUANT_STATE = "quant_state.bitsandbytes__nf4"
STATE_SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", QUANT_STATE)
"""What follows a weight's name and a dot in checkpoints: see `formats.nf4_state`."""


@functools.cache
def code(device: torch.device | str = "cpu") -> Tensor:
    """`CODE` as a float32 tensor. Shared: not to be written to."""
    return torch.tensor(CODE, dtype=torch.float32, device=device)


class _Description(NamedTuple):
    bitsandbytes__nf4: None = None


class NF4Weight(NamedTuple):
    """A weight of 4 bits an element, or some rows of one. Immutable; its tensors are never copied needlessly.

    Attributes:
        packed: uint8 [ceil(numel / 2)], two elements a byte.
        absmax: [ceil(numel / blocksize)], float32, or with double quantisation uint8: indices into `nested_map`.
        nested_absmax: float32 [ceil(len(absmax) / 256)] with double quantisation, else None.
        nested_map: float32 [256], the numbers that `absmax` indexes, else None.
        nested_offset: float32 [], what is added to every rebuilt absmax, else None:
            absmax_i = float32(float32(nested_map[absmax[i]] · nested_absmax[i // 256]) + nested_offset).
        shape: of the weight, [out_features, in_features] or [experts, out_features, in_features].
        dtype: of the weight that was quantised: what `dequantize` gives by default. Products are computed with weights
            rounded once to the dtype of x, whatever this is.
        blocksize: elements of a block, one of `BLOCKSIZES`.
        first: number of the element at (0, 0) in the flattened whole; 0 unless this is a view of a part.
        row_stride: elements from one row to the next in the whole; None for shape[-1].
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    nested_offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    first: int = 0
    row_stride: int | None = None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def is_nested(self) -> bool:
        """Whether the absmax values are quantised too (double quantisation)."""
        return self.nested_absmax is not None

    # Distributed checkpoints (torch.distributed.checkpoint.state_dict) follow each key of a state dict by attributes,
    # such as layer.weight.quant_state.bitsandbytes__nf4: the names in these keys that are no fields.
    @property
    def quant_map(self) -> Tensor:
        """`CODE`, as checkpoints of bitsandbytes hold it."""
        return code(self.device)

    @property
    def nested_quant_map(self) -> Tensor | None:
        """`nested_map`, by its name in checkpoints of bitsandbytes."""
        return self.nested_map

    @property
    def quant_state(self) -> _Description:
        """Has an attribute for the last key of a checkpoint, no more."""
        return _Description()

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept in memory: [packed, absmax], and with double quantisation the three nested tensors."""
        nested = (self.nested_absmax, self.nested_map, self.nested_offset)
        return [self.packed, self.absmax, *(t for t in nested if t is not None)]

    @property
    def layout(self) -> list[int]:
        """The numbers that an op needs beside `tensors`: rows n, columns k, row stride, first element, blocksize,
        how many tensors. Element (i, j) is number first + i · stride + j of the flattened whole."""
        *rows, k = self.shape
        stride = k if self.row_stride is None else self.row_stride
        return [math.prod(rows), k, stride, self.first, self.blocksize, 5 if self.is_nested else 2]

    @property
    def nbytes(self) -> int:
        """Bytes in memory, those of the whole weight for a view of some of its rows."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def rows(self, start: int, stop: int) -> NF4Weight:
        """Rows [start, stop) of a matrix, or of a stack of experts seen as one matrix, sharing its memory."""
        total, k, stride, first, *_ = self.layout
        if not 0 <= start <= stop <= total:
            raise IndexError(f"NF4Weight.rows: [{start}, {stop}) of a weight with {total} rows")
        return self._replace(shape=torch.Size((stop - start, k)), first=first + start * stride, row_stride=stride)

    def columns(self, start: int, stop: int) -> NF4Weight:
        """Columns [start, stop) of a matrix, sharing its memory."""
        n, k, stride, first, *_ = self.layout
        if not 0 <= start <= stop <= k:
            raise IndexError(f"NF4Weight.columns: [{start}, {stop}) of a weight with {k} columns")
        return self._replace(shape=torch.Size((n, stop - start)), first=first + start, row_stride=stride)

    def expert(self, index: int) -> NF4Weight:
        """The matrix [out_features, in_features] of one expert of a stack, sharing its memory."""
        if len(self.shape) != 3:
            raise ValueError(f"NF4Weight.expert: shape is {tuple(self.shape)}; expected (experts, out, in)")
        e, n, _ = self.shape
        if not 0 <= index < e:
            raise IndexError(f"NF4Weight.expert: {index} of {e} experts")
        return self.rows(index * n, (index + 1) * n)

    def to(self, device: torch.device | str) -> NF4Weight:
        """The same weight on another device; itself where it is there already."""
        return self.with_tensors([tensor.to(device) for tensor in self.tensors])

    def with_tensors(self, tensors: Sequence[Tensor]) -> NF4Weight:
        """The same shape, dtype and layout over other tensors, in the order of `tensors`."""
        fields: dict[str, Any] = dict(zip(TENSOR_FIELDS, tensors, strict=False))
        return self._replace(**fields)

    def to_bitsandbytes(self, quant_storage: torch.dtype = torch.uint8) -> Any:
        """The weight as a `bitsandbytes.nn.Params4bit` over the same memory: see `formats.nf4_bitsandbytes`."""
        from peft_kernels.formats import nf4_bitsandbytes

        return nf4_bitsandbytes.to_bitsandbytes(self, quant_storage)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in full: see `functional.nf4_dequantize`. None takes the dtype of what was quantised."""
        from peft_kernels.functional import nf4_dequantize

        return nf4_dequantize(self, dtype)


TENSOR_FIELDS = ("packed", "absmax", "nested_absmax", "nested_map", "nested_offset")


def from_layout(tensors: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype) -> NF4Weight:
    """The matrix that `tensors` and `layout` of an `NF4Weight` describe, `dtype` what its elements round to."""
    n, k, stride, first, blocksize, _ = layout
    packed, absmax, *nested = tensors
    nested_absmax, nested_map, nested_offset = nested if nested else (None, None, None)
    shape = torch.Size((n, k))
    return NF4Weight(packed, absmax, nested_absmax, nested_map, nested_offset, shape, dtype, blocksize, first, stride)


LAYOUT_SIZE = 6
"""How many numbers a `layout` has."""


def quantize(weight: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantises a weight: see `functional.nf4_quantize`."""
    from peft_kernels.functional import nf4_quantize

    return nf4_quantize(weight, blocksize, double_quant)


def _dynamic_values() -> tuple[float, ...]:
    fractions: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2.0
        fractions += ((10.0 ** (exponent - 6)) * means).tolist()
        fractions += (-(10.0 ** (exponent - 6)) * means).tolist()
    return tuple(sorted(fractions))


_DYNAMIC = _dynamic_values()


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """bitsandbytes' signed dynamic map of 8 bits, float32 [256], ascending: what double quantisation rounds absmax to.
    A new tensor each time: one that is shared would stay an inference or a fake tensor if it was first asked for where
    such are made."""
    return torch.tensor(_DYNAMIC, dtype=torch.float32, device=device)


def nested(q: NF4Weight) -> NF4Weight:
    """Double quantisation: the absmax values of `q`, less their mean, in 8 bits, in blocks of 256 with an absmax each.

    A value takes the nearest entry of `dynamic_map` after multiplication by the float32 reciprocal of its block's
    absmax, of two that are as near the lower one; in a block of zeros, the first. On a CPU bitsandbytes first rounds it
    to one of 65536 even steps of [-1, 1]; so that its bytes come out, so does this on a CPU.

    Raises:
        ValueError: the absmax values are too large for float32 to hold their sum.
    """
    table = dynamic_map(q.device)
    offset = q.absmax.mean() if q.absmax.numel() else q.absmax.new_zeros(())
    if not q.absmax.is_meta and not offset.isfinite():
        raise ValueError("double quantisation: weight is too large, the mean of its absmax values is not finite")
    values = q.absmax - offset
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    scales = blocks.abs().amax(1)
    normed = (blocks * (1 / scales).unsqueeze(1)).clamp_(-1, 1).nan_to_num_(0.0)
    midpoints = (table[:-1] + table[1:]) * 0.5
    if q.device.type == "cpu":
        steps = -1.0 + 2.0 * torch.arange(65536, dtype=torch.float32) / 65535
        indices = torch.bucketize(steps, midpoints)[((normed + 1) * 0.5 * 65535 + 0.5).int()]
    else:
        indices = torch.bucketize(normed, midpoints)
    indices = torch.where((scales > 0).unsqueeze(1), indices, 0).to(torch.uint8).view(-1)[: values.numel()]
    return q._replace(absmax=indices.clone(), nested_absmax=scales, nested_map=table, nested_offset=offset)


def from_bitsandbytes(params: Any) -> NF4Weight:
    """The weight of a `bitsandbytes.nn.Params4bit`: see `formats.nf4_bitsandbytes`."""
    from peft_kernels.formats import nf4_bitsandbytes

    return nf4_bitsandbytes.from_bitsandbytes(params)


def to_state(q: NF4Weight, prefix: str = "weight", quant_storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The weight under the keys of bitsandbytes' checkpoints: see `formats.nf4_state`."""
    from peft_kernels.formats import nf4_state

    return nf4_state.to_state(q, prefix, quant_storage)


def from_state(state: Mapping[str, Tensor], prefix: str = "weight") -> NF4Weight:
    """The weight that a checkpoint has under `prefix`: see `formats.nf4_state`."""
    from peft_kernels.formats import nf4_state

    return nf4_state.from_state(state, prefix)
