"""Quantised weights have the bytes of bitsandbytes and mean what the formula says; parts are parts of the whole."""

from __future__ import annotations

import copy
import hashlib
import pickle

import pytest
import torch

import peft_kernels
from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import BLOCKSIZES, NF4Weight
from tests.backends import everywhere, on_cpu
from tests.formats.nf4_bytes import BF16, F16, F32, equal, formula, same_weight, weight_of

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'peft-kernels[bnb]'")

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("nf4_quantize"), indirect=True)
SHAPES = ((1, 1), (1, 64), (3, 65), (5, 96), (7, 7), (64, 48), (13, 3420), (131, 128), (2, 5, 7), (3, 16, 96))


def quantised_there(weight: torch.Tensor, blocksize: int, nested: bool) -> NF4Weight:
    """What bitsandbytes makes of a weight, in our fields."""
    packed, state = bnb.functional.quantize_4bit(
        weight.cpu(), blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
    )
    inner = (state.state2.absmax, state.state2.code, state.offset) if nested else (None, None, None)
    q = NF4Weight(packed.view(-1), state.absmax, *inner, weight.shape, weight.dtype, blocksize)
    return q.to(weight.device)


def assert_bytes_of_bitsandbytes(weight: torch.Tensor, blocksize: int) -> None:
    for nested in (False, True):
        q = nf4.quantize(weight, blocksize, nested)
        there = quantised_there(weight, blocksize, nested)
        if weight.device.type != "cpu" and nested:  # bitsandbytes' own bytes differ from device to device
            there = nf4.nested(quantised_there(weight, blocksize, False))
        for name in ("packed", "absmax", "nested_absmax", "nested_map", "nested_offset"):
            assert equal(getattr(q, name), getattr(there, name)), (name, nested)
        assert same_weight(q, there)


def test_the_dynamic_map():
    table = nf4.dynamic_map()
    assert hashlib.sha1(table.numpy().tobytes()).hexdigest() == "cb07ba0d1557267d68103e0f7bc95af7a44d75f8"
    assert equal(table, bnb.functional.create_dynamic_map().float())
    assert equal(nf4.code(), bnb.functional.get_4bit_type("nf4", "cpu"))


# Each dtype is read by its own code, all of them before anything depends on the shape.
@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, F32) for shape in SHAPES), *zip(SHAPES, (F16, BF16) * 5, strict=True)], ids=str
)
@EVERYWHERE
def test_bytes_of_bitsandbytes(backend, shape, dtype):
    weight = weight_of(*shape, dtype=dtype).to(backend.device)
    for blocksize in BLOCKSIZES:
        assert_bytes_of_bitsandbytes(weight, blocksize)


@EVERYWHERE
def test_bytes_within_roundings_of_the_midpoints(backend):
    """Values all around the midpoints, where division instead of the reciprocal, another tie or another rounding of a
    midpoint picks the other index. Each row has its own absmax; a short block divides."""
    midpoints = (nf4.code()[1:] + nf4.code()[:-1]) / 2
    scale = torch.rand(400, 1) * 1.5 + 0.25
    near = midpoints.repeat(4)[None] * scale
    steps = torch.randint(-3, 4, near.shape, dtype=torch.int32)
    near = (near.view(torch.int32) + steps).view(torch.float32)
    weight = torch.cat((near, scale, -scale, near[:, :2]), 1).to(backend.device)
    assert weight.shape == (400, 64)
    assert_bytes_of_bitsandbytes(weight, 64)
    assert_bytes_of_bitsandbytes(weight.view(-1)[:-7].view(1, -1), 64)
    divided, multiplied = torch.bucketize(near / scale, midpoints), torch.bucketize(near * (1 / scale), midpoints)
    apart = (divided != multiplied)[:, :58].any(1)
    assert apart.sum() > 40, "the values tell the two rules apart"
    for row in torch.cat((near[:, :58], scale, -scale), 1)[apart][:40]:  # each a short block of its own
        assert_bytes_of_bitsandbytes(row.view(1, -1).to(backend.device), 64)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 64),
        torch.zeros(3, 65),  # a short block of zeros: bitsandbytes gives it an absmax of 1e-38
        torch.cat((torch.randn(64), torch.zeros(7))).view(1, -1),
        -torch.zeros(2, 64),
        torch.randn(8, 65) * 1e-40,  # subnormal
        torch.randn(8, 65) * 1e-38,
        torch.randn(8, 65) * 3e36,
        torch.randn(64, 65) * 10 ** (torch.rand(64, 1) * 60 - 45),
        torch.full((5, 33), 0.7),
        torch.full((5, 33), -0.7),
    ],
    ids=["zeros", "zeros, odd", "short zeros", "-0", "subnormal", "small", "large", "mixed", "equal", "negative"],
)
@EVERYWHERE
def test_bytes_of_extreme_weights(backend, weight):
    for blocksize in (32, 64, 4096):
        assert_bytes_of_bitsandbytes(weight.to(backend.device), blocksize)


@EVERYWHERE
def test_zeros_stay_zeros(backend):
    weight = weight_of(9, 65).to(backend.device)
    weight[2:6] = 0
    for nested in (False, True):
        q = nf4.quantize(weight, 32, nested)
        assert (q.dequantize()[2:6] == 0).all()
        assert (nf4.quantize(torch.zeros(3, 64, device=backend.device), 64, nested).packed == 0x77).all()
    odd = nf4.quantize(torch.ones(1, 7, device=backend.device), 64, False)
    assert odd.packed.tolist() == [0xFF, 0xFF, 0xFF, 0xF7]


@pytest.mark.parametrize("length", [1, 255, 256, 257, 5000])
def test_double_quantisation_of_any_values(length):
    """Of any number of absmax values, also equal and extreme ones, against bitsandbytes' blockwise quantisation."""
    generator = torch.Generator().manual_seed(length)
    for values in (
        torch.rand(length, generator=generator),
        torch.rand(length, generator=generator) ** 8 * 1e4,
        torch.full((length,), 0.3),
        torch.zeros(length),
        10 ** (torch.rand(length, generator=generator) * 40 - 35),
    ):
        q = nf4.quantize(torch.zeros(length, 32), 32, False)._replace(absmax=values)
        made, offset = nf4.nested(q), values.mean()
        indices, state = bnb.functional.quantize_blockwise(values - offset, blocksize=256)
        assert equal(made.absmax, indices)
        assert equal(made.nested_absmax, state.absmax)
        assert equal(made.nested_offset, offset)


def absmax_of(q: NF4Weight) -> torch.Tensor:
    """float32 absmax values by the definition of double quantisation: two roundings."""
    if not q.is_nested:
        return q.absmax
    scales = q.nested_absmax.repeat_interleave(256)[: len(q.absmax)]
    return (q.nested_map[q.absmax.long()].double() * scales.double()).float() + q.nested_offset


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantised_bits(shape, nested):
    """The formula; and bitsandbytes, where blocks end with rows, which is where it is right on every CPU."""
    for dtype in (F32, F16, BF16):
        for blocksize in BLOCKSIZES:
            q = nf4.quantize(weight_of(*shape, dtype=dtype), blocksize, nested)
            for wanted in (None, F32, F16, BF16) if dtype == F32 else (None,):
                expected = formula(q.packed, absmax_of(q), blocksize, shape, wanted or dtype)
                assert equal(q.dequantize(wanted), expected), (dtype, wanted, blocksize)
            if shape[-1] % blocksize == 0 and blocksize < 2048:
                assert equal(q.dequantize(), bnb.functional.dequantize_4bit(*there(q)))


def there(q: NF4Weight) -> tuple:
    params = q.to_bitsandbytes()
    return params.data, params.quant_state


def test_a_weight_in_two_dimensions_or_three():
    """A stack of experts is its matrices one after another: blocks run on from one to the next."""
    weight = weight_of(3, 5, 33)
    stack, matrix = nf4.quantize(weight, 32), nf4.quantize(weight.view(15, 33), 32)
    assert same_weight(stack, matrix._replace(shape=weight.shape))
    assert equal(stack.dequantize(), matrix.dequantize().view(3, 5, 33))


@pytest.mark.parametrize("nested", [False, True])
def test_parts(nested):
    weight = weight_of(3, 7, 33)
    q = nf4.quantize(weight, 32, nested)
    dense = q.dequantize()
    for e in range(3):
        expert = q.expert(e)
        assert equal(expert.dequantize(), dense[e])
        assert equal(expert.rows(2, 5).dequantize(), dense[e, 2:5])
        assert equal(expert.columns(1, 30).dequantize(), dense[e, :, 1:30])
        assert equal(expert.columns(3, 20).rows(1, 6).dequantize(BF16), dense[e, 1:6, 3:20].to(BF16))
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(expert.tensors, q.tensors, strict=True))
    assert equal(q.rows(6, 9).dequantize(), dense.view(21, 33)[6:9])


def test_non_contiguous_weights():
    weight = weight_of(40, 65)
    for view in (weight.t(), weight[:, ::2], weight[3:9, 1:].unsqueeze(0), weight[:1].expand(5, 65)):
        assert same_weight(nf4.quantize(view), nf4.quantize(view.contiguous()))


def test_weights_that_require_gradients_and_parameters():
    weight = weight_of(8, 64)
    for kind in (weight.clone().requires_grad_(), torch.nn.Parameter(weight)):
        q = nf4.quantize(kind)
        assert same_weight(q, nf4.quantize(weight))
        assert not any(tensor.requires_grad for tensor in q.tensors)


def test_memory():
    """0.5 bytes a weight, 4 bytes a block or, with double quantisation, 1 and 4 more for each 256."""
    weight = torch.randn(64, 256)
    assert nf4.quantize(weight, 64, False).nbytes == 8192 + 256 * 4
    assert nf4.quantize(weight, 64, True).nbytes == 8192 + 256 + 4 + 1024 + 4
    assert nf4.quantize(torch.randn(3, 3), 64, False).packed.untyped_storage().nbytes() == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@EVERYWHERE
def test_non_finite_weights_are_refused(backend, dtype, value):
    for shape, place in (((4, 64), (2, 5)), ((4, 65), (3, 64)), ((2, 3, 5), (1, 2, 4))):
        weight = weight_of(*shape, dtype=dtype).to(backend.device)
        weight[place] = value
        for nested in (False, True):
            with pytest.raises(ValueError, match="weight is not finite"):
                nf4.quantize(weight, 32, nested)


def test_a_mean_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="weight is too large"):
        nf4.quantize(torch.full((64, 64), 3e38), 32)
    assert nf4.quantize(torch.full((64, 64), 3e38), 32, False).dequantize().isfinite().all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0), (0, 5, 8)])
def test_empty(shape, nested):
    q = nf4.quantize(torch.zeros(shape), 64, nested)
    assert q.dequantize().shape == shape
    assert all(tensor.isfinite().all() for tensor in q.tensors)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(33, 3420), (3, 7, 5), (1, 1)])
def test_meta(shape, nested):
    """Shapes, dtypes and layout alone, without memory."""
    there, here = (nf4.quantize(torch.zeros(shape, dtype=BF16, device=d), 32, nested) for d in ("meta", "cpu"))
    assert there.layout == here.layout
    assert (there.shape, there.dtype, there.blocksize) == (here.shape, here.dtype, here.blocksize)
    for one, two in zip(there.tensors, here.tensors, strict=True):
        assert one.is_meta
        assert (one.shape, one.dtype) == (two.shape, two.dtype)
    dense = there.dequantize()
    assert dense.is_meta
    assert (dense.shape, dense.dtype) == (shape, BF16)
    assert same_weight(here.to("cpu"), here)
    assert all(tensor.is_meta for tensor in here.to("meta").tensors)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies(copier):
    for q in (nf4.quantize(weight_of(5, 33)), nf4.quantize(weight_of(2, 5, 33), 32, False).expert(1).columns(1, 9)):
        copied = copier(q)
        assert type(copied) is NF4Weight
        assert same_weight(copied, q)


def test_every_implementation_makes_the_same_bytes():
    """Of a size at which several threads and pieces are at work."""
    weight = weight_of(600, 1001, dtype=BF16)
    made = []
    for name in on_cpu("nf4_quantize"):
        with peft_kernels.use_backend(name):
            made.append(nf4.quantize(weight, 64, False))
    assert all(same_weight(made[0], other) for other in made[1:])
