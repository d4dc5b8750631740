"""`splitk_reduce`: the sum over the first dimension in its own order, to the bit."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import functional
from peft_kernels.ops.splitk_reduce import problem
from tests.backends import everywhere

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("splitk_reduce"), indirect=True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def in_order(partials: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """One float32 addition after another, one multiplication, one rounding."""
    total = torch.zeros(partials.shape[1:])
    for partial in partials:
        total += partial
    return (total * torch.tensor(scale, dtype=torch.float32)).to(dtype)


SHAPES = ((1, 7), (2, 33), (3, 5, 8), (17, 129), (64, 16, 40), (5, 1))


@pytest.mark.parametrize(
    ("scale", "shape", "dtype"),
    [
        ((1.0, 0.375, -2.7)[(i + j + i // 3) % 3], shape, dtype)
        for i, shape in enumerate(SHAPES)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
@EVERYWHERE
def test_bits(backend, scale, shape, dtype):
    """Numbers of very different size, so that any other order of the additions shows."""
    partials = torch.randn(shape) * torch.logspace(-4, 4, shape[0]).view(-1, *[1] * (len(shape) - 1))
    y = functional.splitk_reduce(partials.to(backend.device), scale=scale, dtype=dtype)
    assert y.dtype == dtype
    assert torch.equal(y.cpu(), in_order(partials, scale, dtype))


@EVERYWHERE
def test_order_matters_and_is_kept(backend):
    """(1e8 + 1) - 1e8 is 0 in float32, (1e8 - 1e8) + 1 is 1."""
    big = torch.tensor([[1e8], [1.0], [-1e8]], device=backend.device)
    assert functional.splitk_reduce(big).item() == 0.0
    assert functional.splitk_reduce(big[[0, 2, 1]]).item() == 1.0


@EVERYWHERE
def test_rounds_once(backend):
    """4097 parts of 1 sum to 4097 in float32; a bfloat16 accumulator would stop at 256."""
    y = functional.splitk_reduce(torch.ones(4097, 3, device=backend.device), dtype=torch.bfloat16)
    assert y.tolist() == [float(torch.tensor(4097.0).bfloat16())] * 3


@EVERYWHERE
def test_no_parts_and_no_elements(backend):
    assert functional.splitk_reduce(torch.empty(0, 3, 2, device=backend.device)).tolist() == [[0.0, 0.0]] * 3
    assert functional.splitk_reduce(torch.empty(4, 0, device=backend.device)).shape == (0,)
    assert functional.splitk_reduce(torch.tensor([1.0, 2.0, 4.0], device=backend.device)).item() == 7.0


@EVERYWHERE
def test_strided_parts(backend):
    wide = torch.randn(9, 20, 14, device=backend.device)
    for partials in (wide[::2], wide.transpose(1, 2), wide[:, 3:11, 1::2], wide[:1].expand(6, 20, 14)):
        expected = in_order(partials.cpu().contiguous(), 1.0, torch.float32)
        assert torch.equal(functional.splitk_reduce(partials).cpu(), expected)


@EVERYWHERE
def test_float64(backend):
    partials = torch.randn(7, 33, dtype=torch.float64, device=backend.device)
    backend.skip_unless_runnable(problem(partials))
    y = functional.splitk_reduce(partials, scale=3.0)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, partials.sum(0) * 3, rtol=1e-14, atol=1e-14)


@EVERYWHERE
def test_nan_and_infinity_stay_where_they_are(backend):
    partials = torch.ones(5, 40, device=backend.device)
    partials[2, 7], partials[3, 9] = float("nan"), float("inf")
    y = functional.splitk_reduce(partials)
    assert y[7].isnan()
    assert y[9].isinf()
    assert int((y == 5).sum()) == 38
