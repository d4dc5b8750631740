"""`nf4_dequantize`: the very bits of the format's formula, from any part of a weight, by every implementation."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
import torch

from peft_kernels.formats.nf4 import BLOCKSIZES, CODE
from peft_kernels.kernels.reference import nf4_dequantize as reference
from peft_kernels.ops.nf4_dequantize import problem
from peft_kernels.problems import Draw, nf4_decoded, nf4_weight
from tests.backends import everywhere
from tests.problems.nf4 import PARTS, huge_weight, part_of

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("nf4_dequantize"), indirect=True)
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = (F32, F16, BF16, F64)
SIZES = ((1, 1), (1, 3420), (3, 65), (5, 96), (7, 3420), (17, 64), (33, 31), (64, 48), (101, 67), (131, 128))
NAN = float("nan")


def grid() -> list[tuple]:
    """Each size, each part and each blocksize with every dtype, the rest seeded."""
    chance = random.Random(20240611)
    sizes = [(size, chance.choice(PARTS), chance.choice(BLOCKSIZES)) for size in SIZES]
    parts = [(chance.choice(SIZES), part, chance.choice(BLOCKSIZES)) for part in PARTS]
    blocks = [(chance.choice(SIZES[3:]), chance.choice(PARTS), blocksize) for blocksize in BLOCKSIZES]
    return [(*case, nested) for case in (*sizes, *parts, *blocks) for nested in (False, True)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, so that NaN equals itself and -0 is not 0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def test_the_16_numbers():
    words = (
        "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
        " 3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
    )
    assert [struct.pack(">f", value).hex() for value in CODE] == words.split()


@pytest.mark.parametrize("nested", [False, True])
def test_the_formula_number_by_number(nested):
    """The oracle of all tests, itself held against a loop that knows nothing of tensors: an odd part of an odd whole,
    blocks over the ends of rows, a short last block, absmax values of two groups of 256."""
    whole = nf4_weight(Draw("cpu"), 131, 67, blocksize=32, nested=nested)
    q = whole.rows(9, 131).columns(2, 67)
    packed, absmax = whole.packed.numpy(), whole.absmax.numpy()
    if nested:
        assert len(absmax) > 256
        groups, table, offset = whole.nested_absmax.numpy(), whole.nested_map.numpy(), whole.nested_offset.numpy()
        absmax = [np.float32(np.float32(table[u] * groups[i // 256]) + offset) for i, u in enumerate(absmax)]
    expected = np.empty((122, 65), dtype=np.float32)
    for i in range(122):
        for j in range(65):
            e = (9 + i) * 67 + 2 + j
            index = packed[e // 2] >> 4 if e % 2 == 0 else packed[e // 2] & 15
            expected[i, j] = np.float32(CODE[index]) * np.float32(absmax[e // 32])
    for dtype in DTYPES:
        assert torch.equal(bits(nf4_decoded(q, dtype)), bits(torch.from_numpy(expected).to(dtype))), dtype


@pytest.mark.parametrize(("size", "part", "blocksize", "nested"), grid(), ids=str)
@EVERYWHERE
def test_bits(backend, size, part, blocksize, nested):
    q = part_of(part, *size, blocksize=blocksize, nested=nested, device=backend.device)
    for dtype in DTYPES:
        backend.skip_unless_runnable(problem(q, dtype))
        weight = q.dequantize(dtype)
        assert (weight.shape, weight.dtype, weight.is_contiguous()) == (q.shape, dtype, True)
        assert torch.equal(bits(weight), bits(nf4_decoded(q, dtype))), dtype


@EVERYWHERE
def test_two_roundings_of_a_nested_absmax(backend):
    """Contracted to one multiply-add, thousands of float32 weights would be others."""
    q = nf4_weight(Draw("cpu"), 512, 512).to(backend.device)
    scaled = q.nested_map[q.absmax.long()].double() * q.nested_absmax.repeat_interleave(256)[: len(q.absmax)].double()
    contracted = q._replace(
        absmax=(scaled + q.nested_offset.double()).float(), nested_absmax=None, nested_map=None, nested_offset=None
    )
    weight = q.dequantize(F32)
    assert torch.equal(weight, nf4_decoded(q, F32))
    assert (weight != nf4_decoded(contracted, F32)).sum() > 1000


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-44, 3e38, float("inf"), NAN], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@EVERYWHERE
def test_any_absmax(backend, nested, value):
    """Zero, negative, subnormal, too large for float16, not finite: what the formula says, in that block alone."""
    q = nf4_weight(Draw("cpu"), 9, 37, blocksize=32, nested=nested).to(backend.device)
    if nested:  # the first group of 256 blocks is all there is here: one entry of the map stands for one block
        table = q.nested_map.clone()
        table[q.absmax[4].long()] = value
        q = q._replace(nested_map=table)
    else:
        q.absmax[4] = value
    for dtype in (F32, F16, BF16):
        weight = q.dequantize(dtype)
        assert torch.equal(weight.isnan(), nf4_decoded(q, dtype).isnan())
        assert torch.equal(weight.nan_to_num(7.0), nf4_decoded(q, dtype).nan_to_num(7.0))
        if not nested:
            assert weight.isfinite().view(-1)[torch.arange(9 * 37) // 32 != 4].all()


@EVERYWHERE
def test_past_2_to_the_32(backend):
    """Numbers of elements, bytes and blocks that 32 bits do not hold. The bytes are zeros that no memory backs, but
    for those that are read."""
    k = 75
    whole, weight = huge_weight(3, k, 2**31 + 5, backend.device)
    assert torch.equal(whole.dequantize(BF16), weight.to(BF16))
    assert torch.equal(whole.rows(1, 3).dequantize(BF16), weight[1:].to(BF16))
    assert torch.equal(whole.rows(2, 3).columns(1, k).dequantize(BF16), weight[2:, 1:].to(BF16))


@EVERYWHERE
def test_empty(backend):
    for n, k in ((0, 64), (64, 0), (0, 0)):
        q = nf4_weight(Draw("cpu"), n, k).to(backend.device)
        assert q.dequantize(BF16).shape == (n, k)
    whole = nf4_weight(Draw("cpu"), 4, 33).to(backend.device)
    assert whole.rows(2, 2).dequantize().shape == (0, 33)
    assert whole.columns(33, 33).dequantize().shape == (4, 0)


@EVERYWHERE
def test_a_stack_of_experts(backend):
    """Its own dtype by default; each expert is the same bits as in the stack."""
    q = nf4_weight(Draw("cpu"), 3, 5, 33, dtype=BF16).to(backend.device)
    stack = q.dequantize()
    assert (stack.shape, stack.dtype) == ((3, 5, 33), BF16)
    for e in range(3):
        assert torch.equal(q.expert(e).dequantize(), stack[e])


@EVERYWHERE
def test_the_result_is_new_and_nothing_is_written_into(backend):
    q = part_of("corner", 17, 33, device=backend.device)
    before = [(tensor.clone(), tensor._version) for tensor in q.tensors]
    first = q.dequantize()
    first.zero_()
    assert torch.equal(q.dequantize(), nf4_decoded(q, F32))
    for tensor, (values, version) in zip(q.tensors, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version


@pytest.mark.parametrize("piece", [1, 40, 100, 1000])
def test_reference_in_pieces(monkeypatch, piece):
    monkeypatch.setattr(reference, "_PIECE", piece)
    q = part_of("corner", 17, 33)
    assert torch.equal(reference.forward(q), nf4_decoded(q, F32))


def test_parts_name_what_is_outside():
    q = nf4_weight(Draw("cpu"), 2, 5, 33)
    with pytest.raises(IndexError, match=r"rows: \[3, 11\) of a weight with 10 rows"):
        q.rows(3, 11)
    with pytest.raises(IndexError, match=r"columns: \[-1, 2\) of a weight with 33 columns"):
        q.expert(0).columns(-1, 2)
    with pytest.raises(IndexError, match="2 of 2 experts"):
        q.expert(2)
    with pytest.raises(ValueError, match=r"expert: shape is \(5, 33\); expected \(experts, out, in\)"):
        q.expert(0).expert(0)
