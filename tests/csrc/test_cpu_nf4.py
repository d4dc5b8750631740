"""csrc/nf4_dequantize.cpp and csrc/nf4_quantize.cpp: the bits of the specification at every vector width.

The grid of shapes that all implementations share is in tests/ops.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.nf4 import CODE, NF4Weight
from peft_kernels.kernels.cpu import nf4_dequantize, nf4_quantize
from peft_kernels.kernels.reference import nf4_dequantize as decoded
from peft_kernels.kernels.reference import nf4_quantize as quantised
from tests.problems.nf4 import PARTS, part_of

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
SHAPES = ((1, 1), (1, 31), (7, 3420), (5, 96), (33, 65), (40, 1), (3, 64), (2, 8300))  # (n, k)
BLOCKSIZES = (32, 64, 256, 4096)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, except that any NaN equals any other."""
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and bool(((a.view(whole) == b.view(whole)) | (a.isnan() & b.isnan())).all())


# Rounding to the result's dtype and the two forms of absmax have code of their own, and do not meet.
@pytest.mark.parametrize(
    ("dtype", "nested"),
    [(F32, False), (F32, True), (BF16, True), (F16, False)],
    ids=["float32", "nested", "bf16", "f16"],
)
@pytest.mark.parametrize("part", PARTS)
def test_dequantised_bits(nf4_width, part, dtype, nested):
    """Rows that begin in either half of a byte, inside blocks, and end inside them; blocks that straddle rows."""
    for i, (n, k) in enumerate(SHAPES):
        blocksize = BLOCKSIZES[(i + PARTS.index(part)) % len(BLOCKSIZES)]
        q = part_of(part, n, k, blocksize=blocksize, nested=nested, seed=i)._replace(dtype=dtype)
        assert same(nf4_dequantize.forward(q), decoded.forward(q)), (n, k, blocksize)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_dequantised_bits_by_any_number_of_threads(cpu, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for q in (part_of("whole", 40, 6000), part_of("corner", 40, 6000), part_of("columns", 9000, 13)):
        assert same(nf4_dequantize.forward(q), decoded.forward(q))


def test_a_nested_absmax_is_rounded_twice(nf4_width):
    """Of 4096 absmax values many would differ if product and sum were rounded once, as a fused multiply-add does."""
    q = part_of("whole", 64, 4096)
    scaled = q.nested_map.double()[q.absmax.long()] * q.nested_absmax.double().repeat_interleave(256)
    fused = (scaled + q.nested_offset.double()).float()
    assert (fused != decoded.absmax(q, torch.arange(len(q.absmax)))).sum() > 100
    assert same(nf4_dequantize.forward(q), decoded.forward(q))


@DTYPES
def test_an_absmax_out_of_the_ordinary(nf4_width, dtype):
    """Zero, subnormal, negative, overflowing, infinite and each kind of NaN reach their own block and no other."""
    values = [0.0, -0.0, 1e-45, 1e-40, 7e-6, -1.5, 3e38, 65520.0, 65504.0, float("inf"), -float("inf"), 0.75]
    half = torch.tensor([0.5]).view(torch.int32).item()
    # The second and third NaN would become -0 and 0 in bfloat16 if only a rounding were added to their bits.
    patterns = [pattern for nan in (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001) for pattern in (nan, half)]
    absmax = torch.cat([torch.tensor(values), torch.tensor(patterns, dtype=torch.int32).view(F32)])
    packed = torch.randint(0, 256, (32 * len(absmax),), dtype=torch.uint8)
    q = NF4Weight(packed, absmax, None, None, None, torch.Size((len(absmax), 64)), dtype, 64)
    for part in (q, q.columns(1, 60)._replace(dtype=dtype)):
        got = nf4_dequantize.forward(part)
        assert same(got, decoded.forward(part))
        assert got[-8::2].isnan().all()
        assert not got[-7::2].isnan().any()


def test_nothing_is_read_or_written_beyond_the_weight(nf4_width):
    """A part in the middle of larger buffers: its neighbours' absmax is NaN, and what surrounds the result stays."""
    for first, k in ((64, 64), (65, 63), (127, 33), (64, 1), (191, 1), (66, 190)):
        absmax = torch.full((6,), float("nan"))
        absmax[first // 64 : (first + k - 1) // 64 + 1] = 0.5
        packed = torch.randint(0, 256, (192,), dtype=torch.uint8)
        q = NF4Weight(packed, absmax, None, None, None, torch.Size((1, k)), F32, 64, first, k)
        memory = torch.full((k + 64,), 7.0)
        inside = memory[32 : 32 + k]
        _native.load("_cpu").nf4_dequantize(*nf4_dequantize.arguments(q), 0, inside.data_ptr(), 1)
        assert same(inside.view(1, k), decoded.forward(q))
        assert not inside.isnan().any()
        assert (memory[:32] == 7).all()
        assert (memory[32 + k :] == 7).all()


def awkward(numel: int, dtype: torch.dtype, scale: float = 0.25) -> Tensor:
    """Random values, a run of zeros, and as many as there is room for of the midpoints and their neighbours, times
    `scale`, which is the absmax of their block."""
    values = torch.randn(numel) * 0.05
    values[numel // 3 : numel // 2] = 0.0
    table = torch.tensor(CODE)
    midpoints = (table[1:] + table[:-1]) / 2
    near = [torch.nextafter(midpoints, torch.tensor(side)) for side in (-2.0, 2.0)]
    exact = torch.cat([torch.tensor([1.0, -1.0]), midpoints, *near]) * scale
    values[: len(exact)] = exact[:numel]
    return values.to(dtype)


@pytest.mark.parametrize(
    ("blocksize", "dtype"),
    [(32, F32), (64, F32), (512, F32), (4096, F32), (64, BF16), (512, BF16), (32, F16), (4096, F16)],
    ids=str,
)
def test_quantised_bytes(nf4_width, blocksize, dtype):
    for numel in (1, 2, 30, 31, 33, 48, 62, 64, 65, 96, 1000, 4097, 12289):
        weight = awkward(numel, dtype, 0.25 if numel % 2 else 0.3)
        expectation = quantised.forward(weight, blocksize)
        for got, expected in zip(nf4_quantize.forward(weight, blocksize), expectation, strict=True):
            assert torch.equal(bits(got), bits(expected)), numel


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_quantised_bytes_by_any_number_of_threads(cpu, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = awkward(200_001, F32)
    for got, expected in zip(nf4_quantize.forward(weight, 64), quantised.forward(weight, 64), strict=True):
        assert torch.equal(bits(got), bits(expected))


def test_quantising_what_has_no_absmax(nf4_width):
    """NaN and infinity spoil their own block, as the specification does, and no other."""
    weight = torch.randn(6, 64)
    weight[1, 7], weight[3, 5], weight[4, 63] = float("nan"), float("inf"), -float("inf")
    for shape in ((6, 64), (6 * 64 - 9,)):
        given = weight.view(-1)[: -9 or None].view(shape) if len(shape) == 1 else weight
        packed, absmax = nf4_quantize.forward(given, 64)
        expected, scale = quantised.forward(given, 64)
        assert torch.equal(packed, expected)
        assert same(absmax, scale)
        assert absmax.isnan().tolist()[:5] == [False, True, False, False, False]


def test_a_weight_survives_requantisation(nf4_width):
    """Quantising what was decoded gives the bytes back: every index, in every place of a vector."""
    q = part_of("whole", 64, 320, nested=False)._replace(dtype=F32)
    dense = nf4_dequantize.forward(q)
    dense.view(-1, 64)[:, 0] = q.absmax  # each block holds its absmax, which sets the scale
    packed, absmax = nf4_quantize.forward(dense, 64)
    assert torch.equal(absmax, q.absmax)
    assert torch.equal(packed & 15, q.packed & 15)
    assert torch.equal(packed.view(-1, 32)[:, 1:], q.packed.view(-1, 32)[:, 1:])
