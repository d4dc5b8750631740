"""Packed masks in the Triton kernels: the bits of the reference, of every dtype and any strides."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import explain, functional, use_backend
from peft_kernels.formats.mask import PackedMask, pack
from peft_kernels.kernels.reference import mask_apply as apply_specification
from peft_kernels.kernels.reference import mask_pack as pack_specification
from peft_kernels.kernels.reference import mask_unpack as unpack_specification
from peft_kernels.kernels.triton import _launch, mask_apply, mask_pack, mask_unpack
from peft_kernels.kernels.triton._masked_tile import ASSEMBLY
from tests.problems.masked import drawn_mask
from tests.triton.launches import record_launches
from tests.triton.test_nf4_assembly import Machine

F16, F32 = torch.float16, torch.float32
# Less than a word, whole words, a tile and a bit of the next in both directions.
SHAPES = ((3, 5), (1, 64), (17, 300), (70, 33))
NAN, INF = float("nan"), float("inf")


def _scores(n: int, k: int, dtype: torch.dtype = F32) -> torch.Tensor:
    """With zeros of both signs, infinities and NaN, next to each other in every row."""
    values = torch.randn(n, k).to(dtype)
    for place, value in enumerate((0.0, -0.0, NAN, INF, -INF)):
        values[:, place::7] = torch.where(torch.rand(values[:, place::7].shape) < 0.5, value, values[:, place::7])
    return values


def _layouts(values: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous, transposed, and every second element of a larger one."""
    wide = torch.ones(values.shape[0], 2 * values.shape[1], dtype=values.dtype)
    wide[:, ::2] = values
    return [values, values.t().contiguous().t(), wide[:, ::2]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_what_is_not_0(shape):
    kept, scores = drawn_mask(*shape, 0.5), _scores(*shape)
    for values in (*_layouts(kept), kept.to(torch.int64) << 40, kept.to(torch.int8) * -128, *_layouts(scores)):
        words = mask_pack.forward(values, None, False)
        assert torch.equal(words, pack_specification.forward(values, None, False)), values.dtype
    assert torch.equal(unpack_specification.forward(mask_pack.forward(kept, None, False), shape[1]), kept)


@pytest.mark.parametrize("magnitude", [False, True], ids=["above", "magnitude"])
@pytest.mark.parametrize("dtype", [F16, F32], ids=["float16", "float32"])
def test_pack_what_is_above_a_threshold(dtype, magnitude):
    """Of the whole or of each row; equal is not above, NaN never is, and values are compared in float32."""
    values = _scores(17, 70, dtype)
    values[2, 9] = 0.6
    edge = values[2, 9].float()
    rows = torch.linspace(-0.5, 0.5, 34)[::2, None].contiguous()
    rows[3] = edge + 1e-6
    for threshold in (torch.tensor(0.1), edge, rows, rows.expand(17, 2)[:, :1], edge.double() + 1e-9):
        words = mask_pack.forward(values, threshold, magnitude)
        assert torch.equal(words, pack_specification.forward(values, threshold, magnitude))
        assert 0 < PackedMask(words, values.shape).density() < 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack(shape):
    kept = drawn_mask(*shape, 0.5)
    words = pack_specification.forward(kept, None, False)
    assert torch.equal(mask_unpack.forward(words, shape[1]), kept)
    apart = torch.full((shape[0], words.shape[1] + 3), -1, dtype=torch.int32)
    apart[:, 1:-2] = words
    assert torch.equal(mask_unpack.forward(apart[:, 1:-2], shape[1]), kept)


@pytest.mark.parametrize("dtype", [F16, F32], ids=["float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apply(shape, dtype):
    """Also to infinities and NaN, rounded to another dtype, and of no -0."""
    kept = drawn_mask(*shape, 0.5)
    words = pack_specification.forward(kept, None, False)
    for values in _layouts(_scores(*shape, dtype)):
        for out_dtype in (F16, F32):
            expected = apply_specification.forward(values, words, out_dtype)
            result = mask_apply.forward(values, words, out_dtype)
            assert result.dtype == out_dtype
            assert result.is_contiguous()
            assert _bits(result) == _bits(expected)
        beside = values.as_strided(shape, values.stride(), 1) if values.stride(1) == 2 else torch.ones(shape)
        expected = apply_specification.forward(values, words, dtype)
        mask_apply.forward_(values, words)
        assert _bits(values) == _bits(expected)
        assert torch.equal(beside, torch.ones_like(beside))


def _bits(values: torch.Tensor) -> list:
    return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32).tolist()


def test_nothing(monkeypatch):
    launched = record_launches(monkeypatch)
    for n, k in ((0, 5), (5, 0)):
        mask = pack(torch.zeros(n, k, dtype=torch.bool))
        assert mask.unpack().shape == (n, k)
        assert functional.mask_apply(torch.zeros(n, k), mask).shape == (n, k)
    assert launched == []


def test_one_launch_each(monkeypatch):
    launched = record_launches(monkeypatch)
    mask = pack(drawn_mask(5, 40, 0.5))
    weight = torch.ones(5, 40)
    assert torch.equal(functional.mask_apply(weight, mask), mask.unpack().float())
    functional.mask_apply_(weight, mask)
    assert launched == ["mask_pack", "mask_apply", "mask_unpack", "mask_apply"]


def test_the_interpreter_is_never_chosen_by_itself():
    with use_backend(None):
        choice = explain("mask_pack", torch.ones(2, 70))
        assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in choice.rejected


def test_the_assembly_keeps_what_the_interpreter_keeps():
    """Two 16-bit weights at once, by the signs of two registers, whatever the rest of those is."""
    for lower in (0, 1):
        for upper in (0, 1):
            operands = {"$1": 0xFC01_7C02, "$2": lower << 31 | 0x7FFF_FF7F, "$3": upper << 31 | 0x0080_8080}
            result = Machine(operands).run(ASSEMBLY)["$0"]
            assert result == upper * 0xFC01_0000 + lower * 0x7C02
