"""Bad input of the ops on 4-bit weights: the exception names the argument, or the tensor of the weight, before anything
is computed."""

from __future__ import annotations

import math

import pytest
import torch

from peft_kernels import functional
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.problems import Draw, nf4_weight
from tests.ops.test_errors import refused

SIZES = "expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096"


def weight(**changes) -> NF4Weight:
    """[12, 16] in 6 blocks of 32, nested."""
    return nf4_weight(Draw("cpu"), 12, 16, blocksize=32)._replace(**changes)


def plain(**changes) -> NF4Weight:
    """The same with float32 absmax values."""
    return nf4_weight(Draw("cpu"), 12, 16, blocksize=32, nested=False)._replace(**changes)


def good() -> dict:
    return {
        "x": torch.ones(2, 3, 16), "q": weight(), "lora_A": torch.ones(4, 16), "lora_B": torch.ones(12, 4),
        "bias": torch.ones(12), "scaling": 2.0, "dropout_p": 0.5, "seed": 3,
    }  # fmt: skip


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


U8, META = torch.uint8, {"device": "meta"}
# (the weight, exception, message)
WEIGHTS = [
    (zeros(12, 16), TypeError, "q is Tensor; expected a peft_kernels.formats.nf4.NF4Weight"),
    (zeros(96, 1, dtype=U8), TypeError, "q is Tensor; expected a peft_kernels.formats.nf4.NF4Weight"),
    (None, TypeError, "q is NoneType; expected a peft_kernels.formats.nf4.NF4Weight"),
    (tuple(weight()), TypeError, "q is tuple; expected a peft_kernels.formats.nf4.NF4Weight"),
    (weight(blocksize=48), ValueError, f"q.blocksize is 48; {SIZES}"),
    (weight(blocksize=8192), ValueError, f"q.blocksize is 8192; {SIZES}"),
    (weight(blocksize=32.0), ValueError, f"q.blocksize is 32.0; {SIZES}"),
    (weight(blocksize=None), ValueError, f"q.blocksize is None; {SIZES}"),
    (weight(first=-2), ValueError, "q has shape (12, 16), first -2 and row_stride None; expected no negative number"),
    (weight(row_stride=-16), ValueError, "q has shape (12, 16), first 0 and row_stride -16; expected no negative"),
    (weight(shape=torch.Size((-12, 16))), ValueError, "q has shape (-12, 16), first 0 and"),
    (weight(packed=zeros(95, dtype=U8)), ValueError, "q.packed has 95 elements, but q has shape (12, 16); expected at "
     "least 96, contiguous"),
    (weight(packed=zeros(192, dtype=U8)[::2]), ValueError, "q.packed has 96 elements, but q has shape (12, 16); expec"),
    (weight(packed=zeros(96)), TypeError, "q.packed has dtype torch.float32; expected torch.uint8"),
    (weight(packed=zeros(96, dtype=torch.int8)), TypeError, "q.packed has dtype torch.int8; expected torch.uint8"),
    (weight(first=1), ValueError, "q.packed has 96 elements, but q has shape (12, 16); expected at least 97"),
    (weight(absmax=zeros(5, dtype=U8)), ValueError, "q.absmax has 5 elements, but q has shape (12, 16); expected at l"),
    (weight(absmax=zeros(6)), TypeError, "q.absmax has dtype torch.float32; expected torch.uint8"),
    (weight(absmax=zeros(6, dtype=U8, **META)), ValueError, "q.absmax is on meta, but q.packed is on cpu"),
    (weight(nested_absmax=zeros(0)), ValueError, "q.nested_absmax has 0 elements, but q has shape (12, 16); expected "),
    (weight(nested_absmax=zeros(1).double()), TypeError, "q.nested_absmax has dtype torch.float64; expected torch.flo"),
    (weight(nested_map=None), TypeError, "q.nested_map is NoneType; expected a torch.Tensor"),
    (weight(nested_map=zeros(255)), ValueError, "q.nested_map has 255 elements, but q has shape (12, 16); expected at"),
    (weight(nested_map=zeros(256).half()), TypeError, "q.nested_map has dtype torch.float16; expected torch.float32"),
    (weight(nested_offset=None), TypeError, "q.nested_offset is NoneType; expected a torch.Tensor"),
    (weight(nested_offset=0.5), TypeError, "q.nested_offset is float; expected a torch.Tensor"),
    (weight(nested_offset=zeros((), **META)), ValueError, "q.nested_offset is on meta, but q.packed is on cpu"),
    (weight(nested_absmax=None), TypeError, "q.absmax has dtype torch.uint8; expected torch.float32"),
    (plain(absmax=zeros(5)), ValueError, "q.absmax has 5 elements, but q has shape (12, 16); expected at least 6"),
    (plain(absmax=zeros(6).double()), TypeError, "q.absmax has dtype torch.float64; expected torch.float32"),
    (plain(absmax=zeros(6).bfloat16()), TypeError, "q.absmax has dtype torch.bfloat16; expected torch.float32"),
    (plain(absmax=zeros(6, dtype=U8)), TypeError, "q.absmax has dtype torch.uint8; expected torch.float32"),
    (plain(absmax=None), TypeError, "q.absmax is NoneType; expected a torch.Tensor"),
]  # fmt: skip
# What only matters beside an x: (what is changed, exception, message).
PRODUCTS = [
    ({"q": weight().to("meta")}, ValueError, "q is on meta, but x is on cpu; expected all on one device"),
    ({"x": zeros(2, 16, **META)}, ValueError, "q is on cpu, but x is on meta; expected all on one device"),
    ({"q": nf4_weight(Draw("cpu"), 2, 6, 16)}, ValueError, "q has shape (2, 6, 16), but x has 16 features; expected ("),
    ({"q": nf4_weight(Draw("cpu"), 16, 12)}, ValueError, "q has shape (16, 12), but x has 16 features; expected (out_"),
    ({"x": zeros(())}, ValueError, "x has no dimensions; expected (..., in_features)"),
    ({"x": zeros(2, 15)}, ValueError, "q has shape (12, 16), but x has 15 features; expected (out_features, 15)"),
    ({"x": zeros(2, 16, dtype=torch.int64)}, TypeError, "x has dtype torch.int64; expected float32, float16, bfloat16"),
    ({"x": [1.0]}, TypeError, "x is list; expected a torch.Tensor"),
    ({"bias": zeros(16)}, ValueError, "bias has shape (16,), but q has 12 output features; expected (12,)"),
    ({"bias": zeros(1, 12)}, ValueError, "bias has shape (1, 12), but q has 12 output features; expected (12,)"),
    ({"bias": zeros(12, dtype=torch.bool)}, TypeError, "bias has dtype torch.bool; expected float32"),
    ({"bias": zeros(12, **META)}, ValueError, "bias is on meta, but x is on cpu; expected all on one device"),
    ({"bias": 0.5}, TypeError, "bias is float; expected a torch.Tensor"),
]  # fmt: skip
ADAPTERS = [
    ({"lora_A": zeros(4, 15)}, ValueError, "lora_A has shape (4, 15), but x has 16 features; expected (r, 16)"),
    ({"lora_A": zeros(16)}, ValueError, "lora_A has shape (16,), but x has 16 features; expected (r, 16)"),
    ({"lora_A": zeros(4, 16, dtype=torch.int8)}, TypeError, "lora_A has dtype torch.int8; expected float32"),
    ({"lora_A": None}, TypeError, "lora_A is NoneType; expected a torch.Tensor"),
    ({"lora_A": zeros(4, 16, **META)}, ValueError, "lora_A is on meta, but x is on cpu; expected all on one device"),
    ({"lora_B": zeros(4, 12)}, ValueError, "lora_B has shape (4, 12), but q has 12 output features and lora_A rank 4; "
     "expected (12, 4)"),
    ({"lora_B": zeros(12, 4).half()}, TypeError, "lora_B has dtype torch.float16, but lora_A has torch.float32; expec"),
    ({"lora_B": zeros(12, 4, **META)}, ValueError, "lora_B is on meta, but x is on cpu; expected all on one device"),
    ({"lora_A": zeros(0, 16), "lora_B": zeros(12, 0)}, ValueError, "r is 0; expected 1 <= r <= 512"),
    ({"lora_A": zeros(513, 16), "lora_B": zeros(12, 513)}, ValueError, "r is 513; expected 1 <= r <= 512"),
    ({"scaling": math.nan}, ValueError, "scaling is nan; expected a finite number"),
    ({"scaling": "2"}, TypeError, "scaling is str; expected a number"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5; expected a probability in [0, 1]"),
    ({"dropout_p": True}, TypeError, "dropout_p is bool; expected a number"),
    ({"seed": 0.5}, TypeError, "seed is 0.5; expected an integer"),
    ({"seed": torch.tensor([3, 4])}, ValueError, "seed has shape (2,); expected (1,)"),
]  # fmt: skip


def ids(cases) -> list[str]:
    return [case[2][:50] for case in cases]


def linear(x, q, bias, **_):
    return functional.nf4_linear(x, q, bias)


def test_the_good_arguments_are_good():
    assert linear(**good()).shape == (2, 3, 12)
    assert functional.nf4_lora_linear(**good()).shape == (2, 3, 12)


@pytest.mark.parametrize(("q", "error", "message"), WEIGHTS, ids=ids(WEIGHTS))
def test_weights(q, error, message):
    refused("nf4_linear", linear, {**good(), "q": q}, error, message)
    refused("nf4_lora_linear", functional.nf4_lora_linear, {**good(), "q": q}, error, message)
    refused("nf4_dequantize", functional.nf4_dequantize, {"q": q}, error, message)


@pytest.mark.parametrize(("changes", "error", "message"), PRODUCTS, ids=ids(PRODUCTS))
def test_products(changes, error, message):
    refused("nf4_linear", linear, {**good(), **changes}, error, message)
    refused("nf4_lora_linear", functional.nf4_lora_linear, {**good(), **changes}, error, message)


@pytest.mark.parametrize(("changes", "error", "message"), ADAPTERS, ids=ids(ADAPTERS))
def test_adapters(changes, error, message):
    refused("nf4_lora_linear", functional.nf4_lora_linear, {**good(), **changes}, error, message)


QUANTIZE = [
    ({"weight": [1.0]}, TypeError, "weight is list; expected a torch.Tensor"),
    ({"weight": zeros(12, 16, dtype=U8)}, TypeError, "weight has dtype torch.uint8; expected float32"),
    ({"weight": zeros(12, 16).double()}, TypeError, "weight has dtype torch.float64; expected float32, float16 or b"),
    ({"weight": zeros(16)}, ValueError, "weight has shape (16,); expected (out, in) or (experts, out, in)"),
    ({"weight": zeros(1, 1, 2, 16)}, ValueError, "weight has shape (1, 1, 2, 16); expected (out, in) or"),
    ({"blocksize": 48}, ValueError, f"blocksize is 48; {SIZES}"),
    ({"blocksize": 16}, ValueError, f"blocksize is 16; {SIZES}"),
    ({"blocksize": 8192}, ValueError, f"blocksize is 8192; {SIZES}"),
    ({"blocksize": True}, ValueError, f"blocksize is True; {SIZES}"),
    ({"blocksize": 64.0}, ValueError, f"blocksize is 64.0; {SIZES}"),
    ({"blocksize": "64"}, ValueError, f"blocksize is '64'; {SIZES}"),
    ({"blocksize": None}, ValueError, f"blocksize is None; {SIZES}"),
]


@pytest.mark.parametrize(("changes", "error", "message"), QUANTIZE, ids=ids(QUANTIZE))
def test_quantize(changes, error, message):
    refused("nf4_quantize", functional.nf4_quantize, {"weight": zeros(12, 16), **changes}, error, message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantize_refuses_what_is_not_finite(value, double_quant):
    weight = torch.ones(12, 16)
    weight[5, 3] = value
    with pytest.raises(ValueError, match="nf4_quantize: weight is not finite"):
        functional.nf4_quantize(weight, 64, double_quant)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, None.__class__, "float32"], ids=str)
def test_dequantize_to_no_float(dtype):
    with pytest.raises(TypeError, match=r"nf4_dequantize: dtype is .*; expected a floating-point dtype"):
        functional.nf4_dequantize(weight(), dtype)


def test_no_gradient_is_half_written():
    """A backward pass that is refused leaves every .grad as it was."""
    leaves = {name: torch.ones_like(good()[name]).requires_grad_() for name in ("x", "lora_A", "lora_B", "bias")}
    y = functional.nf4_lora_linear(**{**good(), **leaves})
    with pytest.raises(RuntimeError, match="shape"):
        y.backward(torch.ones(2, 3, 11))
    assert all(leaf.grad is None for leaf in leaves.values())
