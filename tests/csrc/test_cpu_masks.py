"""csrc/mask.cpp: the bits of the specification at every vector width, whatever the values."""

from __future__ import annotations

import itertools

import pytest
import torch

from peft_kernels.kernels.cpu import mask_apply, mask_pack, mask_unpack
from peft_kernels.kernels.reference import mask_apply as applied
from peft_kernels.kernels.reference import mask_pack as packed
from peft_kernels.kernels.reference import mask_unpack as unpacked

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
FLOATS = (F32, F16, BF16)
SIZES = ((1, 1), (3, 31), (2, 32), (4, 33), (5, 100), (2, 9000), (0, 5), (5, 0))


def drawn(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Half of it 0, with what comparisons treat in their own way."""
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    values = torch.where(values.abs() < 0.7, 0.0, values * 3)
    for i, special in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
        values.flatten()[i::37] = special
    return values.to(dtype)


def words_of(n: int, k: int) -> torch.Tensor:
    return packed.forward(torch.rand(n, k, generator=torch.Generator().manual_seed(k)) < 0.5, None, False)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool, torch.uint8, torch.int8], ids=str)
def test_what_is_not_zero_is_packed(width, dtype):
    for n, k in SIZES:
        values = drawn(n, k, F32).nan_to_num(1.0, 1.0, 1.0).to(dtype) if dtype not in FLOATS else drawn(n, k, dtype)
        assert torch.equal(mask_pack.forward(values, None, False), packed.forward(values, None, False)), (n, k)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_above_a_threshold_is_packed(width, dtype):
    """Of a row's own or of all, at values that are met exactly, in float32 and in float64 between two of float32."""
    for n, k in SIZES:
        values = drawn(n, k, dtype)
        some = values.float().flatten()[5::11][:1].nan_to_num(0.5).sum()  # 0 where there is none
        rows = torch.linspace(-1, 1, n).unsqueeze(1)
        for threshold in (some, -some, some.double() * (1 + 2**-40), some.double() * (1 - 2**-40), rows, rows.double()):
            for magnitude in (False, True):
                expected = packed.forward(values, threshold, magnitude)
                assert torch.equal(mask_pack.forward(values, threshold, magnitude), expected), (n, k, threshold)


def test_a_byte_of_any_value_but_zero_is_kept(width):
    values = torch.arange(256, dtype=torch.uint8).unsqueeze(0)
    assert torch.equal(mask_pack.forward(values, None, False), packed.forward(values, None, False))


def test_unpacked_bits(width):
    for n, k in SIZES:
        words = words_of(n, k)
        assert torch.equal(mask_unpack.forward(words, k), unpacked.forward(words, k)), (n, k)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"), [*itertools.product(FLOATS, FLOATS), (F64, F64)], ids=lambda dtype: str(dtype)[6:]
)
def test_a_masked_weight_is_chosen_and_not_multiplied(width, dtype, out_dtype):
    for n, k in SIZES:
        weight, words = drawn(n, k, dtype), words_of(n, k)
        expected = applied.forward(weight, words, out_dtype)
        made = mask_apply.forward(weight, words, out_dtype)
        assert torch.equal(made.nan_to_num(7.0), expected.nan_to_num(7.0)), (n, k)
        assert not made[~unpacked.forward(words, k)].signbit().any()
        if dtype == out_dtype:
            mask_apply.forward_(weight, words)
            assert torch.equal(weight.view(torch.uint8), made.view(torch.uint8))


def test_parts_of_wider_matrices(cpu):
    """Columns from a word on, of a weight and of a mask with longer rows; nothing beside them is written."""
    weight, words = torch.randn(6, 200), words_of(6, 200)
    part, some = weight[1:5, 64:150], words[1:5, 2:5]
    expected = applied.forward(part, some, F32)
    assert torch.equal(mask_apply.forward(part, some, F32), expected)
    assert torch.equal(mask_apply.forward(part.t().contiguous().t(), some, F32), expected)
    assert torch.equal(mask_unpack.forward(some, 86), unpacked.forward(some, 86))
    assert torch.equal(mask_pack.forward(part, None, False), packed.forward(part, None, False))
    whole = weight.clone()
    mask_apply.forward_(part, some)
    whole[1:5, 64:150] = expected
    assert torch.equal(weight, whole)
    turned = torch.randn(90, 4).t()
    expected = applied.forward(turned, words[:4, :3], F32)
    mask_apply.forward_(turned, words[:4, :3])
    assert torch.equal(turned, expected)
