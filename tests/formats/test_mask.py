"""`PackedMask`: the bits are where they should be, and sets, counts and comparisons are those of booleans."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_kernels.formats import mask as masks
from peft_kernels.formats.mask import PackedMask, empty, full, pack, popcount, stack, tail_bits, unpack
from tests.problems.masked import drawn_mask

SIZES = st.tuples(st.integers(0, 5), st.integers(0, 70), st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.5, 1.0]))


def drawn(n: int, k: int, seed: int, density: float) -> torch.Tensor:
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < density


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_packing_and_unpacking_restores_the_mask(sizes):
    kept = drawn(*sizes)
    mask = pack(kept)
    assert mask.words.shape == (sizes[0], masks.words_of(sizes[1]))
    assert torch.equal(unpack(mask), kept)
    assert not tail_bits(mask).any()
    assert int(mask.kept()) == int(kept.sum())
    assert mask.density() == (float(kept.double().mean()) if kept.numel() else 1.0)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1001, 2000))
def test_set_operations_are_those_of_booleans(sizes, seed):
    n, k, first, density = sizes
    a, b = drawn(n, k, first, density), drawn(n, k, seed, 0.5)
    one, two = pack(a), pack(b)
    results = {"&": (one & two, a & b), "|": (one | two, a | b), "^": (one ^ two, a ^ b), "-": (one - two, a & ~b)}
    results["~"] = (~one, ~a)
    for name, (got, expected) in results.items():
        assert torch.equal(got.unpack(), expected), name
        assert not tail_bits(got).any(), name
    assert one.equal(pack(a))
    assert one.equal(two) == torch.equal(a, b)


def test_bits_are_where_the_format_says():
    """Also seen as bytes: byte k // 8 of a row holds columns 8 (k // 8) and up, lowest bit first."""
    kept = torch.zeros(2, 70, dtype=torch.bool)
    for column in (0, 31, 32, 69):
        kept[1, column] = True
    mask = pack(kept)
    assert mask.words.tolist() == [[0, 0, 0], [1 | -(2**31), 1, 1 << 5]]
    as_bytes = mask.words[1].view(torch.uint8).tolist()
    assert {8 * i + bit for i, byte in enumerate(as_bytes) for bit in range(8) if byte >> bit & 1} == {0, 31, 32, 69}


def test_any_number_but_zero_is_kept():
    values = torch.tensor([[0.0, -0.0, 1e-40, -2.0, torch.inf, torch.nan]])
    assert pack(values).unpack().tolist() == [[False, False, True, True, True, True]]
    assert pack(torch.tensor([[0, -1, 256]])).unpack().tolist() == [[False, True, True]]


def test_full_and_empty():
    assert full(3, 33).unpack().all()
    assert full(3, 33).density() == 1
    assert not empty(3, 33).words.any()
    assert (~full(3, 33)).equal(empty(3, 33))
    assert not full(3, 33).equal(full(3, 34))


def test_positions_are_the_kept_places_in_order():
    kept = drawn_mask(130, 37, 0.2)
    places = pack(kept).positions()
    assert torch.equal(places.flat.long(), kept.flatten().nonzero().squeeze(1))
    assert places.starts.tolist() == [0, int(kept[:64].sum()), int(kept[:128].sum()), int(kept.sum())]


def test_rows_share_the_memory():
    kept = drawn_mask(9, 40, 0.5)
    mask = pack(kept)
    part = mask.rows(2, 5)
    assert torch.equal(part.unpack(), kept[2:5])
    assert part.words.data_ptr() == mask.words[2].data_ptr()


def test_popcount_counts_all_32_bits():
    words = torch.tensor([0, 1, -1, -(2**31), 0x0F0F0F0F], dtype=torch.int32)
    assert popcount(words).tolist() == [0, 1, 32, 1, 16]


def test_stacks():
    one, two = pack(drawn_mask(4, 40, 0.5)), pack(drawn_mask(4, 40, 0.1))
    both = stack([one, two])
    assert len(both) == 2
    assert both.mask(1).equal(two)
    with pytest.raises(ValueError, match="no masks"):
        stack([])
    with pytest.raises(ValueError, match=r"masks\[1\] has shape \(4, 41\)"):
        stack([one, empty(4, 41)])


@pytest.mark.parametrize(
    ("other", "error", "text"),
    [
        (torch.ones(3, 5), TypeError, "the other mask is Tensor"),
        (full(3, 6), ValueError, r"shapes \(3, 5\) and \(3, 6\)"),
        (PackedMask(torch.empty(3, 1, dtype=torch.int32, device="meta"), torch.Size((3, 5))), ValueError, "devices"),
    ],
    ids=["tensor", "shape", "device"],
)
def test_sets_of_what_does_not_fit(other, error, text):
    with pytest.raises(error, match=text):
        full(3, 5) & other
