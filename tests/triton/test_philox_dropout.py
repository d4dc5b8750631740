"""`philox_dropout` as a Triton kernel: the bits of the specification."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import functional, use_backend
from peft_kernels.kernels.reference import philox_dropout as reference
from peft_kernels.kernels.triton import philox_dropout

F16, F32 = torch.float16, torch.float32


# Each size in each dtype, each probability in each dtype.
@pytest.mark.parametrize(
    ("m", "k", "p", "dtype"),
    [
        (1, 1, 0.5, F32), (5, 8, 0.0, F32), (17, 129, 0.1, F32), (3, 1030, 0.5, F32), (600, 9, 0.1, F32),
        (5, 8, 1.0, F32), (1, 1, 1.0, F16), (5, 8, 0.5, F16), (17, 129, 0.5, F16), (3, 1030, 0.1, F16),
        (600, 9, 0.5, F16), (17, 129, 0.0, F16),
    ],
)  # fmt: skip
def test_bits_of_the_specification(m, k, p, dtype):
    x, seed = torch.randn(m, k).to(dtype), torch.tensor([1234567890123456789])
    assert torch.equal(philox_dropout.forward(x, p, seed), reference.forward(x, p, seed))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32, -(2**32) + 7])
def test_any_64_bit_seed(seed):
    x, seed = torch.ones(9, 50), torch.tensor([seed])
    assert torch.equal(philox_dropout.forward(x, 0.5, seed), reference.forward(x, 0.5, seed))


@pytest.mark.parametrize("row_offset", [1, 16, 12345, 2**31, 2**33 + 5])
def test_row_offset_continues_the_counter(row_offset):
    """At 2^33 rows of 7 groups the counter needs its high word."""
    x, seed = torch.ones(6, 50), torch.tensor([77])
    out = philox_dropout.forward(x, 0.5, seed, row_offset)
    assert torch.equal(out, reference.forward(x, 0.5, seed, row_offset))


def test_a_block_of_rows_has_the_mask_of_the_whole():
    x, seed = torch.randn(40, 30), torch.tensor([5])
    whole = philox_dropout.forward(x, 0.5, seed)
    assert torch.equal(philox_dropout.forward(x[23:], 0.5, seed, 23), whole[23:])


def test_strides():
    x, seed = torch.randn(33, 20), torch.tensor([5])
    expected = philox_dropout.forward(x, 0.3, seed)
    wide = torch.full((33, 60), float("nan"))
    wide[:, ::3] = x
    for same in (x.t().contiguous().t(), wide[:, ::3]):
        assert torch.equal(philox_dropout.forward(same, 0.3, seed), expected)


def test_nan_is_dropped_where_the_mask_says():
    x, seed = torch.full((8, 16), float("nan")), torch.tensor([9])
    out = philox_dropout.forward(x, 0.5, seed)
    assert torch.equal(out.isnan(), reference.keep_mask(8, 16, 0.5, seed))
    assert out[~out.isnan()].eq(0).all()


def test_the_op_and_its_gradient():
    x = torch.randn(2, 3, 21, requires_grad=True)
    y = functional.philox_dropout(x, 0.4, 99)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    with use_backend("reference"):
        assert torch.equal(y, functional.philox_dropout(x, 0.4, 99))
        assert torch.equal(grad, functional.philox_dropout(torch.ones_like(x), 0.4, 99).detach())
