"""`splitk_reduce` as a Triton kernel: the bits of the specification, whose order of additions is fixed."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import functional
from peft_kernels.kernels.reference import splitk_reduce as reference
from peft_kernels.kernels.triton import splitk_reduce

F16, F32 = torch.float16, torch.float32


@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
@pytest.mark.parametrize("parts", [0, 1, 2, 9, 33])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (40, 16), (1025,), (0, 4)])
def test_bits_of_the_specification(parts, shape, dtype):
    # Magnitudes far apart: another order of additions gives other bits.
    partials = torch.randn(parts, *shape) * 10 ** torch.empty(parts, *shape).uniform_(-4, 4)
    out = splitk_reduce.forward(partials, 0.3, dtype)
    assert out.shape == shape
    assert torch.equal(out, reference.forward(partials, 0.3, dtype))


def test_strides():
    partials = torch.randn(5, 12, 8).transpose(1, 2)
    assert torch.equal(splitk_reduce.forward(partials, 2.0, F32), reference.forward(partials, 2.0, F32))


def test_the_op():
    partials = torch.randn(6, 10)
    expected = reference.forward(partials, 0.5, F16)
    assert torch.equal(functional.splitk_reduce(partials, scale=0.5, dtype=F16), expected)
