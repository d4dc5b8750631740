"""Pruned weights as bits and nonzeros: exact roundtrips, where everything is, and how many bytes it takes."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.formats import mask as masks
from peft_kernels.formats.bitmap import BitmapWeight, compress_bitmap, from_numbers, panels_of

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = ((1, 1), (16, 256), (17, 300), (70, 2500), (3, 9000), (0, 5), (5, 0))


def drawn(n: int, k: int, density: float, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight that is nowhere 0 but has every special number in turn, and the mask of what is kept."""
    draw = torch.Generator().manual_seed(n * k + 1)
    weight, kept = torch.randn(n, k, generator=draw).to(dtype), torch.rand(n, k, generator=draw) < density
    special = torch.tensor([-0.0, float("nan"), float("inf"), -float("inf"), 1e-45], dtype=dtype)
    weight.view(-1)[::7] = special.repeat(n * k // 7 + 1)[: len(weight.view(-1)[::7])]
    return weight, kept


def bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(INTEGERS[weight.element_size()])


@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_bit_comes_back(dtype, density):
    for n, k in SHAPES:
        weight, kept = drawn(n, k, density, dtype)
        packed = compress_bitmap(weight, masks.pack(kept))
        expected = bits(weight) * kept
        assert torch.equal(bits(packed.dense()), expected), (n, k)
        assert (packed.shape, packed.dtype, packed.kept) == (weight.shape, dtype, int(kept.sum()))
        assert packed.density == (int(kept.sum()) / (n * k) if n * k else 1.0)
        again = from_numbers([t.clone() for t in packed.tensors], packed.numbers)
        assert torch.equal(bits(again.dense()), expected)
        assert again[4:] == packed[4:]


def test_without_a_mask_what_is_not_zero_is_kept():
    weight, kept = drawn(40, 300, 0.3)
    weight = torch.where(kept, weight, 0)
    weight[3, 3], weight[20, 299] = -0.0, float("nan")
    packed = compress_bitmap(weight)
    assert packed.kept == int((weight != 0).sum())
    assert torch.equal(bits(packed.dense()), bits(weight) * (weight != 0))
    assert torch.equal(packed.dense(torch.float32).nan_to_num(7), weight.float().nan_to_num(7))


def test_where_everything_is():
    """Bits and values one by one, from the format's words: this is what the GPU kernel relies on."""
    n, k = 21, 4 * 256 + 40
    weight, kept = drawn(n, k, 0.4)
    packed = compress_bitmap(weight, masks.pack(kept), panels=2)
    assert packed.numbers == [n, k, 2, int(packed.starts.diff().max()), int(kept.sum())]
    order = packed.order.tolist()
    assert sorted(order) == [*range(n), *[n] * 11]
    counts = kept.sum(1).tolist()
    assert [counts[row] for row in order[:n]] == sorted(counts, reverse=True)
    stored, mark = packed.bits.tolist(), bits(packed.values).tolist()
    seen = 0
    for strip in range(2):
        for panel, chunks in enumerate((range(3), range(3, 5))):
            first, end = packed.starts[2 * strip + panel : 2 * strip + panel + 2].tolist()
            longest = 0
            for lane in range(32):
                at = [first, first]
                for chunk in chunks:
                    for tile in range(16):
                        for bit in range(8):
                            v, h, e = bit // 4, bit // 2 % 2, bit % 2
                            place = order[16 * strip + lane // 4 + 8 * h]
                            column = 256 * chunk + 32 * (tile // 2) + 8 * (lane % 4) + 4 * (tile % 2) + 2 * v + e
                            there = place < n and column < k and bool(kept[place, column])
                            assert stored[strip][chunk][lane][tile] >> bit & 1 == there
                            if there:
                                assert mark[at[e]][lane][e] == bits(weight)[place, column]
                                at[e] += 1
                                seen += 1
                longest = max(longest, *at)
            assert longest == end
    assert seen == packed.kept


@pytest.mark.parametrize(("density", "most"), [(0.5, 1.22), (0.3, 0.82), (0.1, 0.39)])
def test_bytes_of_a_weight(density, most):
    """256 rows of a weight with 4096 columns, 16 bits a number, 2 bytes dense."""
    weight, kept = drawn(256, 4096, density)
    packed = compress_bitmap(weight, masks.pack(kept), panels=1)
    assert 2 * density + 0.125 < packed.nbytes / weight.numel() < most


def test_rows_of_uneven_length_take_little_more():
    """Sorted by length, rows of a strip are alike. A weight that is dense takes 1/8 byte more than that, at most."""
    draw = torch.Generator().manual_seed(5)
    kept = torch.rand(512, 1024, generator=draw) < torch.rand(512, 1, generator=draw)
    packed = compress_bitmap(torch.ones(512, 1024).bfloat16(), masks.pack(kept), panels=1)
    assert packed.nbytes < 1.3 * (2 * packed.kept + kept.numel() / 8)
    whole = compress_bitmap(torch.ones(512, 1024).bfloat16())
    assert whole.nbytes < 2.13 * kept.numel()


def test_pieces_have_each_row_once(monkeypatch):
    from peft_kernels.formats import bitmap

    monkeypatch.setattr(bitmap, "PIECE", 40 * 300)
    weight, kept = drawn(75, 300, 0.3)
    packed = compress_bitmap(weight, masks.pack(kept))
    pieces = list(packed.pieces(torch.float32))
    assert len(pieces) > 2
    rows = torch.cat([rows for rows, _ in pieces])
    assert torch.equal(rows.sort().values, torch.arange(75))
    expected = torch.where(kept, weight, 0).float()
    assert torch.equal(torch.cat([piece for _, piece in pieces]).nan_to_num(7), expected[rows].nan_to_num(7))


def test_strided_weights_and_masks():
    weight, kept = drawn(300, 80, 0.3)
    packed = compress_bitmap(weight.t(), masks.pack(kept.t()))
    assert torch.equal(bits(packed.dense()), (bits(weight) * kept).t())
    part = compress_bitmap(weight[10:50], masks.pack(kept).rows(10, 50))
    assert torch.equal(bits(part.dense()), (bits(weight) * kept)[10:50])


def test_how_many_panels():
    sizes = {
        (4096, 4096): 1,
        (14336, 4096): 1,
        (4096, 14336): 4,
        (1024, 4096): 2,
        (256, 4096): 4,
        (1, 1): 1,
        (16, 0): 1,
    }
    assert {size: panels_of(*size) for size in sizes} == sizes


def test_errors():
    weight, kept = drawn(20, 40, 0.5)
    mask = masks.pack(kept)
    for arguments, error, text in (
        ((weight[0],), ValueError, "has shape"), ((weight.int(),), TypeError, "has dtype"),
        ((weight, kept), TypeError, "PackedMask"), ((weight, mask.rows(0, 10)), ValueError, "shape"),
        ((weight, mask.to("meta")), ValueError, "meta"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            compress_bitmap(*arguments)
    for panels in (0, 2, -1):
        with pytest.raises(ValueError, match="panels is"):
            compress_bitmap(weight, panels=panels)
    with pytest.raises(ValueError, match="panels is"):
        compress_bitmap(torch.zeros(1, 5000), panels=1)


def test_moves_as_a_whole():
    packed = compress_bitmap(*[drawn(20, 300, 0.5)[0]])
    moved = packed.to("meta")
    assert isinstance(moved, BitmapWeight)
    assert {t.device.type for t in moved.tensors} == {"meta"}
    assert moved.numbers == packed.numbers
    assert packed.to("cpu").values is packed.values
