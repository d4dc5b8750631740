"""Weights to bitsandbytes' parameters and back: over the same memory, not a byte changed, and right in its layers."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import BLOCKSIZES, from_bitsandbytes
from tests.formats.nf4_bytes import BF16, F16, F32, equal, formula, same_weight, weight_of

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'peft-kernels[bnb]'")

STORAGES = pytest.mark.parametrize("storage", [torch.uint8, BF16, F16, F32], ids=str)
NESTED = pytest.mark.parametrize("nested", [False, True])


def params_of(weight: torch.Tensor, *, nested=True, storage=torch.uint8, blocksize=64, kind="nf4"):
    params = bnb.nn.Params4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind, quant_storage=storage
    )
    return params.to("cpu")


def linear4bit(k: int, n: int, **options) -> nn.Module:
    return bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=F32, quant_type="nf4", **options)


def state_tensors(params) -> list[torch.Tensor]:
    state = params.quant_state
    inner = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [params.data, state.absmax, *inner]


@STORAGES
@NESTED
def test_from_params(nested, storage):
    weight = weight_of(12, 64, dtype=BF16)
    params = params_of(weight, nested=nested, storage=storage)
    q = from_bitsandbytes(params)
    assert same_weight(q, nf4.quantize(weight, 64, nested))
    for one, two in zip(q.tensors, state_tensors(params), strict=True):
        assert one.data_ptr() == two.data_ptr()
        assert type(one) is torch.Tensor
        assert not one.requires_grad


@STORAGES
@NESTED
def test_to_params(nested, storage):
    weight = weight_of(12, 64, dtype=F16)
    q, theirs = nf4.quantize(weight, 64, nested), params_of(weight, nested=nested, storage=storage)
    params = q.to_bitsandbytes(storage)
    assert type(params) is bnb.nn.Params4bit
    assert equal(params.data, theirs.data)
    for fact in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized", "requires_grad"):
        assert getattr(params, fact) == getattr(theirs, fact), fact
    packed = params.quant_state.as_dict(packed=True), theirs.quant_state.as_dict(packed=True)
    assert packed[0].keys() == packed[1].keys()
    assert all(equal(packed[0][key], packed[1][key]) for key in packed[0])
    for one, two in zip(q.tensors, state_tensors(params), strict=True):
        assert one.data_ptr() == two.data_ptr()
    assert same_weight(from_bitsandbytes(params), q)


@pytest.mark.parametrize("shape", [(1, 1), (5, 96), (7, 7), (3, 65), (2, 5, 7)], ids=str)
@NESTED
def test_round_trips(nested, shape):
    for blocksize in BLOCKSIZES:
        for dtype in (F32, F16, BF16):
            params = params_of(weight_of(*shape, dtype=dtype), nested=nested, blocksize=blocksize)
            q = from_bitsandbytes(params)
            back = q.to_bitsandbytes()
            assert equal(back.data, params.data)
            assert all(equal(a, b) for a, b in zip(state_tensors(back), state_tensors(params), strict=True))
            assert same_weight(from_bitsandbytes(back), q)


@STORAGES
@NESTED
def test_in_a_layer_of_bitsandbytes(nested, storage):
    """Its forward and its gradient of x are those of the dense weight; its state dict is that of the weight."""
    weight, x = weight_of(24, 64), torch.randn(5, 64, requires_grad=True)
    q = nf4.quantize(weight, 64, nested)
    layer = linear4bit(64, 24)
    layer.weight = q.to_bitsandbytes(storage)
    y = layer(x)
    torch.testing.assert_close(y, x @ q.dequantize().t())
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.ones(5, 24) @ q.dequantize())
    saved, ours = layer.state_dict(), nf4.to_state(q, quant_storage=storage)
    assert saved.keys() == ours.keys()
    assert all(equal(saved[key], ours[key]) for key in saved)
    copied = copy.deepcopy(layer).to("cpu")
    assert same_weight(from_bitsandbytes(copied), q)
    assert torch.equal(copied(x), y)


def test_bitsandbytes_dequantises_it():
    for shape in ((24, 64), (6, 128)):
        q = nf4.quantize(weight_of(*shape, dtype=BF16))
        params = q.to_bitsandbytes()
        assert equal(bnb.functional.dequantize_4bit(params.data, params.quant_state), q.dequantize())


@STORAGES
def test_a_layer_stands_for_its_weight(storage):
    layer = linear4bit(64, 24, quant_storage=storage)
    layer.weight.data = weight_of(24, 64)
    layer = layer.to("cpu")
    assert same_weight(from_bitsandbytes(layer), from_bitsandbytes(layer.weight))
    kept = from_bitsandbytes(layer)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # as after FSDP
    assert same_weight(from_bitsandbytes(layer), kept)


@NESTED
def test_prequantised_params(nested):
    """As transformers makes them from a checkpoint."""
    q = nf4.quantize(weight_of(5, 96, dtype=BF16), 32, nested)
    state = nf4.to_state(q)
    packed = state.pop("weight")
    params = bnb.nn.Params4bit.from_prequantized(packed, state, device="cpu")
    assert same_weight(from_bitsandbytes(params), q)


def test_decoded_by_the_formula():
    params = params_of(weight_of(5, 96, dtype=BF16), nested=False)
    state = params.quant_state
    assert equal(from_bitsandbytes(params).dequantize(), formula(params.data, state.absmax, 64, state.shape, BF16))


def spoiled(**changes):
    params = params_of(weight_of(12, 64))
    for name, value in changes.items():
        target, _, last = name.rpartition("__")
        setattr(params.quant_state.state2 if target else params.quant_state, last, value)
    return params


REFUSED = [
    (lambda: None, TypeError, "params is NoneType; expected a bitsandbytes.nn.Params4bit"),
    (lambda: torch.zeros(3), TypeError, "params is Tensor; expected a bitsandbytes.nn.Params4bit"),
    (lambda: nn.Linear(3, 3), TypeError, "params is Parameter; expected a bitsandbytes.nn.Params4bit"),
    (lambda: nn.ReLU(), TypeError, "params is NoneType; expected a bitsandbytes.nn.Params4bit"),
    (lambda: bnb.nn.Params4bit(torch.zeros(3, 3)), ValueError, "params is not quantised yet"),
    (lambda: linear4bit(8, 8), ValueError, "params is not quantised yet"),
    (lambda: params_of(torch.ones(4, 64), kind="fp4"), ValueError, "quant_type is 'fp4'; expected 'nf4'"),
    (lambda: spoiled(blocksize=16), ValueError, "blocksize is 16; expected one of 32, 64"),
    (lambda: spoiled(state2__blocksize=64), ValueError, "nested blocksize is 64; expected 256"),
    (lambda: spoiled(packing_format_for_cpu=True), ValueError, "repacked for bitsandbytes' inference on a CPU"),
    (lambda: spoiled(shape=torch.Size((12, 66))), ValueError, "params.packed has 384 elements"),
    (lambda: spoiled(absmax=torch.zeros(3, dtype=torch.uint8)), ValueError, "params.absmax has 3 elements"),
    (lambda: spoiled(absmax=torch.zeros(12)), TypeError, "params.absmax has dtype torch.float32"),
    (
        lambda: spoiled(state2__absmax=torch.zeros(1, dtype=F16)),
        TypeError,
        "params.nested_absmax has dtype torch.float",
    ),
    (lambda: spoiled(state2__code=torch.zeros(16)), ValueError, "params.nested_map has 16 elements"),
    (lambda: spoiled(offset=None), TypeError, "params.nested_offset is NoneType"),
]


@pytest.mark.parametrize(("make", "error", "text"), REFUSED, ids=[text[:40] for _, _, text in REFUSED])
def test_refused(make, error, text):
    with pytest.raises(error) as caught:
        from_bitsandbytes(make())
    assert str(caught.value).startswith("from_bitsandbytes: ")
    assert text in str(caught.value)


def test_only_whole_weights_become_params():
    q = nf4.quantize(weight_of(2, 6, 33), 32)
    for part in (q.expert(1), q.rows(0, 6), q.expert(0).columns(0, 8)):
        with pytest.raises(ValueError, match="is a view of a larger one"):
            part.to_bitsandbytes()
    assert same_weight(from_bitsandbytes(q.rows(0, 12).to_bitsandbytes()), q._replace(shape=torch.Size((12, 33))))
    odd = nf4.quantize(weight_of(7, 7))
    with pytest.raises(ValueError, match=r"25 bytes do not fill whole elements of torch.bfloat16; use torch.uint8"):
        odd.to_bitsandbytes(BF16)
    with pytest.raises(TypeError, match=r"quant_storage is torch.int32; expected torch.uint8, torch.bfloat16"):
        odd.to_bitsandbytes(torch.int32)


def test_without_bitsandbytes(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    q = nf4.quantize(weight_of(4, 64))
    with pytest.raises(ImportError, match=r'to_bitsandbytes needs bitsandbytes: pip install "peft-kernels\[bnb\]"'):
        q.to_bitsandbytes()
    assert same_weight(nf4.from_state(nf4.to_state(q)), q)
