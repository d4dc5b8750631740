"""F76: masks and chosen weights of sparse layers, whole, empty, in any order, repeated, out of range, elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from peft_kernels import functional
from peft_kernels.formats import mask as masks
from tests.backends import across

MASKED = pytest.mark.parametrize("backend", across("masked_linear"), indirect=True)
DELTA = pytest.mark.parametrize("backend", across("sparse_delta_linear"), indirect=True)


def operands(device: str):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device) for shape in ((9, 37), (23, 37), (23,))]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.int64])
@MASKED
def test_f76_a_mask_of_any_dtype(backend, dtype):
    """A mask that a library stores in another dtype than the weight's."""
    x, weight, bias = operands(backend.device)
    kept = weight.abs() > 0.5
    y = functional.masked_linear(x, weight, masks.pack(kept.to(dtype)), bias)
    torch.testing.assert_close(y, F.linear(x, weight * kept, bias), rtol=1e-5, atol=1e-5)


@MASKED
def test_f76_everything_and_nothing_kept(backend):
    x, weight, bias = operands(backend.device)
    weight.requires_grad_()
    whole = functional.masked_linear(x, weight, masks.full(23, 37, device=backend.device), bias)
    torch.testing.assert_close(whole, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    nothing = functional.masked_linear(x, weight, masks.empty(23, 37, device=backend.device), bias)
    assert torch.equal(nothing, bias.expand(9, -1))
    (grad,) = torch.autograd.grad(nothing.sum(), weight)
    assert not grad.any()


@DELTA
def test_f76_chosen_weights_in_any_order(backend):
    x, weight, bias = operands(backend.device)
    places = torch.randperm(23 * 37, generator=torch.Generator().manual_seed(1))[:50].to(backend.device)
    values = torch.randn(50, generator=torch.Generator().manual_seed(2)).to(backend.device).requires_grad_()
    y = functional.sparse_delta_linear(x, weight, places, values, bias)
    tuned = weight.flatten().index_add(0, places, values).view_as(weight)
    expected = F.linear(x, tuned, bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), values)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("places", [[5, 7, 5], [0, 23 * 37], [-1, 3]], ids=["repeated", "beyond", "negative"])
@DELTA
def test_f76_wrong_places_are_refused(backend, places):
    x, weight, _ = operands(backend.device)
    places = torch.tensor(places, device=backend.device)
    with pytest.raises(ValueError, match=r"indices has|places"):
        functional.sparse_delta_linear(x, weight, places, torch.ones(len(places), device=backend.device))


@pytest.mark.parametrize("pair", [[[-1], [3]], [[0], [37]], [[23], [0]], [[0], [-2]]], ids=str)
def test_f76_wrong_rows_and_columns_are_refused(pair):
    x, weight, _ = operands("cpu")
    with pytest.raises(ValueError, match=r"indices has (row|column)s -?\d+ to -?\d+; expected them in"):
        functional.sparse_delta_linear(x, weight, torch.tensor(pair), torch.ones(1))


def test_f76_a_mask_elsewhere_is_refused():
    x, weight, _ = operands("cpu")
    with pytest.raises(ValueError, match="mask is on meta, but weight is on cpu"):
        functional.masked_linear(x, weight, masks.full(23, 37, device="meta"))
