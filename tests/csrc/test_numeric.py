"""Conversions of csrc between float32 and the 16-bit types, bit for bit as torch's, scalar and at every width."""

from __future__ import annotations

import struct

import pytest
import torch

from peft_kernels import _native

HALVES = (torch.bfloat16, torch.float16)


def awkward_floats() -> torch.Tensor:
    """Ties and near ties of both 16-bit types, their subnormals and overflows, infinities, zeros, random bits."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = torch.cat([patterns.view(half).float() for half in HALVES])
    values = values[values.isfinite()]
    bits = values.view(torch.int32)
    ties = [(bits + d).view(torch.float32) for d in (-1, 1, 1 << 12, (1 << 12) + 1, 1 << 15, (1 << 15) - 1)]
    random = torch.randint(-(2**31), 2**31 - 1, (20000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 65504.0, 65519.0, 65520.0, 65536.0, 3.4e38, 1e-45])
    return torch.cat([values, *ties, random, special])


def convert(cpu, x: torch.Tensor, scale: float, out_dtype: torch.dtype) -> torch.Tensor:
    """x · scale, rounded once by the vector code: dropout that keeps everything."""
    assert x.dtype == out_dtype
    out, seed = torch.empty_like(x), torch.tensor([0])
    code = _native.DTYPES[x.dtype]
    cpu.philox_dropout(x.data_ptr(), x.numel(), out.data_ptr(), 1, x.numel(), 0, code, seed.data_ptr(), 0, scale, 1)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, except that any NaN equals any other."""
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return bool(((a.view(bits) == b.view(bits)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scalar_rounding(cpu, dtype):
    round_scalar = {torch.bfloat16: cpu.bfloat16_from_float, torch.float16: cpu.float16_from_float}[dtype]
    x = awkward_floats()[::7]
    x = torch.cat([x, torch.tensor([float("nan"), struct.unpack("f", b"\x01\x00\x80\xff")[0]])])
    got = torch.tensor([round_scalar(v) for v in x.tolist()], dtype=torch.int32).to(torch.int16).view(dtype)
    assert same(got, x.to(dtype))


def test_scalar_float_from_float16(cpu):
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    got = torch.tensor([cpu.float_from_float16(int(v) & 0xFFFF) for v in patterns.tolist()])
    assert same(got, patterns.view(torch.float16).float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1 / 0.9, 1 / 3, 1.5 / 65536, 300.0])
def test_vector_rounding_of_every_value(width, cpu, dtype, scale):
    """All 65,536 values times a factor in float32, rounded: normal, subnormal, overflowing and tied results."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    expected = (x.float() * torch.tensor(scale, dtype=torch.float32)).to(dtype)
    assert same(convert(cpu, x, scale, dtype), expected)


def test_float64_is_not_rounded_to_float32(width, cpu):
    x = torch.randn(1001, dtype=torch.float64)
    assert torch.equal(convert(cpu, x, 1 / 0.7, torch.float64), x * (1 / 0.7))
