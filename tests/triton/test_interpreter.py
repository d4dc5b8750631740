"""The interpreter, of which `interpreter.speed_up` replaces parts, still finds what its checks are for."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _product(x, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out + places, tl.load(x + places) * 65536)


@pytest.mark.parametrize(("value", "fits"), [(32767, True), (-32768, True), (32768, False), (-32769, False)])
def test_an_overflow_of_32_bits_is_an_error(value, fits):
    x, out = torch.tensor([0, value], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    if fits:
        _product[(1,)](x, out, 2)
        assert out.tolist() == [0, value * 65536]
    else:
        with pytest.raises(Exception, match="int32 overflow detected for operation mul"):
            _product[(1,)](x, out, 2)


@triton.jit
def _odd(out, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, 1), tl.sum(tl.full((SIZE,), 1.0, tl.float32)))


def test_a_block_that_is_no_power_of_two_is_an_error():
    with pytest.raises(Exception, match="power of 2"):
        _odd[(1,)](torch.zeros(1), 3)
