"""Kept numbers and their columns: exact roundtrips, where everything is, and wide rows."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.formats import csr, sparse
from peft_kernels.formats import mask as masks
from peft_kernels.formats.csr import compress_csr, from_numbers
from tests.formats.test_bitmap import SHAPES, bits, drawn

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32, torch.float64], ids=str)
def test_every_bit_comes_back(dtype, density, monkeypatch):
    """Also laid out in several pieces, one of which ends with rows that keep nothing."""
    monkeypatch.setattr(csr, "PIECE", 20_000)
    for n, k in SHAPES:
        weight, kept = drawn(n, k, density, dtype)
        kept[n // 3 : n // 2] = False
        packed = compress_csr(weight, masks.pack(kept))
        expected = bits(weight) * kept
        assert torch.equal(bits(packed.dense()), expected), (n, k)
        assert (packed.shape, packed.dtype, packed.kept) == (weight.shape, dtype, int(kept.sum()))
        packed.check("here")
        again = from_numbers([t.clone() for t in packed.tensors], packed.numbers)
        assert torch.equal(bits(again.dense_rows(0, n)), expected)
        assert again[3:] == packed[3:]


def test_without_a_mask_what_is_not_zero_is_kept():
    weight, kept = drawn(40, 300, 0.3)
    weight = torch.where(kept, weight, 0)
    weight[3, 3], weight[20, 299] = -0.0, float("nan")
    packed = compress_csr(weight)
    assert packed.kept == int((weight != 0).sum())
    assert torch.equal(bits(packed.dense()), bits(weight) * (weight != 0))


@pytest.mark.parametrize("k", [300, 65_535, 65_536, 70_000])
def test_where_everything_is(k):
    """Number by number, from the format's words: this is what the kernels rely on. Columns above 32,767 as well."""
    weight, kept = drawn(6, k, 0.01)
    kept[2] = False
    kept[4] = False
    kept[4, 5], kept[4, k - 1] = True, True
    packed = compress_csr(weight, masks.pack(kept))
    counts = kept.sum(1)
    groups = -(-counts // 8)
    assert packed.starts.tolist() == [0, *groups.cumsum(0).tolist()]
    assert packed.numbers == [6, k, int(groups.max()), int(counts.sum())]
    assert packed.columns.dtype == (torch.int16 if k <= 65_535 else torch.int32)
    columns = [c % 65_536 if k <= 65_535 else c for c in packed.columns.flatten().tolist()]
    values = bits(packed.values).flatten().tolist()
    for row in range(6):
        first, end = 8 * packed.starts[row], 8 * packed.starts[row + 1]
        found = kept[row].nonzero().flatten().tolist()
        padding = int(end - first) - len(found)
        assert padding < 8
        assert columns[first:end] == found + [k] * padding
        assert values[first:end] == bits(weight)[row, found].tolist() + [0] * padding


def test_a_group_is_two_aligned_loads_of_16_bytes():
    packed = sparse.compress(torch.eye(64).bfloat16(), "csr")
    for tensor in (packed.values, packed.columns):
        assert tensor.is_contiguous()
        assert tensor.stride(0) * tensor.element_size() == 16


def test_too_many_groups_are_refused(monkeypatch):
    monkeypatch.setattr(csr, "_MOST_GROUPS", 3)
    with pytest.raises(ValueError, match="4 groups of kept weights; expected at most 3"):
        compress_csr(torch.eye(4))


def test_columns_or_numbers_that_pad_wrongly_are_refused():
    """Padding between numbers, and a number among the padding."""
    weight = torch.zeros(2, 20)
    weight[0, :10], weight[1, :3] = 1, 1
    packed = compress_csr(weight)
    for place, column, message in ((4, 20, "in order"), (8, 20, "in order"), (11, 19, "in order")):
        columns = packed.columns.clone()
        columns.view(-1)[place] = column
        with pytest.raises(ValueError, match=message):
            packed._replace(columns=columns).check("w")
    with pytest.raises(ValueError, match="9 kept weights, at most 2 groups in a row; its tensors have 13 and 2"):
        packed._replace(kept=9).check("w")
