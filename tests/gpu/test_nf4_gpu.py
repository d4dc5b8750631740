"""The 4-bit Triton kernels on a GPU: the bits of the format, in the form of decoding that no interpreter runs."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.kernels.reference import nf4_dequantize as specification
from peft_kernels.kernels.triton import _launch, nf4_dequantize, nf4_linear, nf4_lora_linear
from tests.problems.nf4 import PARTS, part_of

WHY_NOT = _launch.unavailable("cuda", None)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (N, K, blocksize): blocks that divide rows, half blocks, blocks across rows at even and odd elements.
SHAPES = ((520, 1024, 64), (259, 96, 64), (130, 3420, 64), (67, 65, 64), (100, 352, 32), (70, 4160, 4096))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    whole = torch.int16 if a.element_size() == 2 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.view(whole), b.view(whole))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantise(shape, dtype, nested):
    n, k, blocksize = shape
    for part in PARTS:
        q = part_of(part, n, k, blocksize=blocksize, nested=nested, device="cuda")._replace(dtype=dtype)
        assert _same_bits(nf4_dequantize.forward(q), specification.forward(q)), part


@pytest.mark.parametrize("m", [1, 16, 17, 33, 64, 65, 200, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_products(shape, dtype, m):
    """Products with 1 and 0 are exact: y and dx show the weights, each of them once M passes K or N."""
    n, k, blocksize = shape
    for part in PARTS:
        q = part_of(part, n, k, blocksize=blocksize, device="cuda")._replace(dtype=dtype)
        weight = specification.forward(q)
        for first in range(0, k, m) if m == 1024 else (0, k // 2):
            hot = (first + torch.arange(m, device="cuda")) % k
            x = torch.zeros(m, k, dtype=dtype, device="cuda")
            x[torch.arange(m, device="cuda"), hot] = 1
            assert torch.equal(nf4_linear.forward(x, q, None), weight.t()[hot]), part
        hot = torch.arange(m, device="cuda") % n
        grad_y = torch.zeros(m, n, dtype=dtype, device="cuda")
        grad_y[torch.arange(m, device="cuda"), hot] = 1
        assert torch.equal(nf4_linear.backward(grad_y, q), weight[hot]), part


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_under_an_adapter(dtype):
    """With B = 0 the base product alone, the same bits; with x and dY of one 1 a row they are the weights."""
    q = part_of("whole", 520, 1024, device="cuda")._replace(dtype=dtype)
    weight = specification.forward(q)
    a = torch.randn(16, 1024, device="cuda")
    b = torch.zeros(520, 16, device="cuda")
    y, s = nf4_lora_linear.forward(torch.eye(1024, dtype=dtype, device="cuda"), q, None, a, b, 2.0, 0.0, None)
    assert torch.equal(y, weight.t())
    grad_y = torch.eye(520, dtype=dtype, device="cuda")
    x, needs = torch.zeros(520, 1024, dtype=dtype, device="cuda"), (True, False, False, True, True)
    grads = nf4_lora_linear.backward(grad_y, x, s[:520], q, a, b, 2.0, 0.0, None, needs)
    assert torch.equal(grads[0], weight)


def test_the_last_bytes_of_memory_are_not_passed():
    """Packed bytes that end in the middle of a word of 4, at the end of their allocation."""
    for k in (65, 67, 130):
        q = part_of("whole", 3, k, device="cuda")
        packed = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")[-len(q.packed) :].copy_(q.packed)
        for dtype in DTYPES:
            moved = q._replace(packed=packed, dtype=dtype)
            assert _same_bits(nf4_dequantize.forward(moved), specification.forward(moved))
            x = torch.eye(k, dtype=dtype, device="cuda")
            assert torch.equal(nf4_linear.forward(x, moved, None), specification.forward(moved).t())
