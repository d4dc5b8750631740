"""`nf4_quantize`: every implementation gives the bytes of the specification, which are those of the nearest numbers.

That they are bitsandbytes' bytes is tested in tests/formats.
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels import functional, use_backend
from peft_kernels.formats.nf4 import BLOCKSIZES, CODE
from peft_kernels.kernels.reference import nf4_quantize as reference
from tests.backends import everywhere
from tests.problems.base import drawer

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("nf4_quantize"), indirect=True)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SIZES = ((1, 1), (1, 7), (5, 33), (7, 3420), (64, 64), (3, 4096), (101, 67), (2, 3, 65))


def weight_of(*shape, dtype=F32, device="cpu", seed=1) -> torch.Tensor:
    return drawer(seed, device)(*shape, scale=0.1, dtype=dtype).detach()


def specification(weight: torch.Tensor, blocksize: int):
    with use_backend("reference"):
        return functional.nf4_quantize(weight, blocksize, False)


def assert_same(q, expected) -> None:
    assert q[3:] == expected[3:]
    assert torch.equal(q.packed, expected.packed)
    assert torch.equal(q.absmax.view(torch.int32), expected.absmax.view(torch.int32))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_specification_takes_the_nearest_number(shape, blocksize):
    """Against a search over all 16 in float64: no other number is nearer by more than a rounding."""
    weight = weight_of(*shape)
    q = functional.nf4_quantize(weight, blocksize, False)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % blocksize)).view(-1, blocksize)
    assert torch.equal(q.absmax, flat.abs().amax(1))
    indices = torch.stack((q.packed >> 4, q.packed & 15), 1).view(-1)
    assert indices.numel() == weight.numel() or (indices.numel() == weight.numel() + 1 and indices[-1] == 7)
    normed = (flat.double() / q.absmax.double().unsqueeze(1)).view(-1)[: weight.numel()]
    distances = (normed.unsqueeze(1) - torch.tensor(CODE, dtype=torch.float64)).abs()
    chosen = distances.gather(1, indices[: weight.numel()].long().unsqueeze(1)).squeeze(1)
    assert (chosen - distances.amin(1)).max() < 1e-6
    assert (q.shape, q.dtype, q.blocksize) == (weight.shape, weight.dtype, blocksize)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@EVERYWHERE
def test_bytes_of_the_specification(backend, dtype):
    for i, shape in enumerate(SIZES):
        for blocksize in {BLOCKSIZES[i], 64}:
            weight = weight_of(*shape, dtype=dtype, device=backend.device)
            assert_same(functional.nf4_quantize(weight, blocksize, False), specification(weight, blocksize))


@EVERYWHERE
def test_numbers_at_which_implementations_part(backend):
    """Midpoints and their neighbours, both zeros, subnormals, the largest, blocks of zeros and a short one of zeros."""
    table = torch.tensor(CODE)
    midpoints = (table[1:] + table[:-1]) / 2
    near = [torch.nextafter(midpoints, torch.tensor(side)) for side in (-2.0, 2.0)]
    values = torch.cat((midpoints, *near, table))  # 61, the largest magnitude of which is 1
    filled = torch.cat((values, torch.tensor([0.0, -0.0, 1e-45])))
    scales = (1.0, 3.0, 0.1, 1e-37, 1e-39, 1e-44, 3e38)
    blocks = [filled * scale for scale in scales] + [torch.zeros(64), -torch.zeros(64), torch.full((64,), -0.5)]
    for tail in (torch.empty(0), torch.zeros(9), midpoints * 1e-39, -values):
        weight = torch.cat((*blocks, tail)).to(backend.device).unsqueeze(0)
        for blocksize in (32, 64, 256):
            assert_same(functional.nf4_quantize(weight, blocksize, False), specification(weight, blocksize))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@EVERYWHERE
def test_strides(backend, layout):
    """Blocks follow the rows of the weight, whatever its order in memory."""
    big = weight_of(66, 134, device=backend.device)
    weight = {"transposed": big.t(), "sliced": big[1:, 3::2], "expanded": big[:1].expand(20, 134)}[layout]
    assert not weight.is_contiguous()
    assert_same(functional.nf4_quantize(weight, 64, False), specification(weight.contiguous(), 64))


@EVERYWHERE
def test_no_elements_and_nothing_written_into(backend):
    assert functional.nf4_quantize(torch.empty(0, 64, device=backend.device), 64, False).packed.numel() == 0
    weight = weight_of(5, 33, device=backend.device).requires_grad_()
    before, version = weight.detach().clone(), weight._version
    q = functional.nf4_quantize(weight, 64, False)
    assert not any(tensor.requires_grad for tensor in q.tensors)
    assert torch.equal(weight, before)
    assert weight._version == version


@pytest.mark.parametrize("nested", [False, True])
@EVERYWHERE
def test_a_round_trip_changes_nothing_more(backend, nested):
    """What was dequantised quantises to the same bytes again, where absmax is kept in full."""
    weight = weight_of(33, 65, device=backend.device)
    q = functional.nf4_quantize(weight, 64, nested)
    again = functional.nf4_quantize(q.dequantize(), 64, False)
    assert torch.equal(again.packed, q.packed)
    if not nested:
        assert torch.equal(again.absmax, q.absmax)
    error = (q.dequantize() - weight).norm() / weight.norm()
    assert 0.05 < error < 0.15, "4 bits of normal numbers"


@pytest.mark.parametrize("piece", [4096, 8192])
def test_reference_in_pieces(monkeypatch, piece):
    weight = weight_of(5, 3420)
    expected = reference.forward(weight, 4096)
    monkeypatch.setattr(reference, "_PIECE", piece)
    for value, truth in zip(reference.forward(weight, 4096), expected, strict=True):
        assert torch.equal(value, truth)
