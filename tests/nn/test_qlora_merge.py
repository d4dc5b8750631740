"""`FusedQLoRALinear.merge` and `unmerge`: the merged weight rounded once, quantised again where asked, and undone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels import FusedQLoRALinear, MergeError
from peft_kernels.formats.nf4 import NF4Weight
from tests.helpers import relative_error
from tests.nn.quantised import same_bits, same_state
from tests.nn.test_qlora_linear import OPTIONS, K, N, R, exact_merge, trained


class TestMerge:
    @pytest.mark.parametrize("name", ["plain", "adapter bias", "DoRA"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_exact(self, name, dtype):
        """The sum of the 4-bit weight itself and the update, rounded once."""
        layer, x = trained(dtype, **OPTIONS[name]), torch.randn(33, K, dtype=dtype)
        unmerged, q, state = layer(x), layer.weight, copy.deepcopy(layer.state_dict())
        assert layer.merge() is None
        assert type(layer.weight) is nn.Parameter
        assert layer.weight.dtype == dtype
        assert not layer.weight.requires_grad
        once = exact_merge(layer).to(dtype)
        steps = (layer.weight - once).abs() / once.abs().clamp_min(1)
        assert steps.max() <= 8 * torch.finfo(dtype).eps
        assert (steps > 0).double().mean() < (0.7 if dtype == torch.float32 else 0.01)
        assert relative_error(layer(x).detach(), unmerged.detach()) < 4 * torch.finfo(dtype).eps
        assert same_state(layer.state_dict(), state)
        layer.unmerge()
        assert layer.weight is q
        assert torch.equal(layer(x), unmerged)
        assert same_state(layer.state_dict(), state)

    def test_without_update_it_is_the_unpacked_weight(self):
        layer = FusedQLoRALinear(K, N, R, dtype=torch.bfloat16)
        assert torch.equal(layer.merged_weight(), layer.dequantize())

    @pytest.mark.parametrize("name", ["plain", "adapter bias", "DoRA"])
    @pytest.mark.parametrize("blocksize", [32, 4096])
    @pytest.mark.parametrize("double_quant", [True, False])
    def test_into_4_bits_again(self, name, blocksize, double_quant):
        """What is reported is what an independent computation finds."""
        layer = trained(blocksize=blocksize, double_quant=double_quant, **OPTIONS[name])
        q, x, state = layer.weight, torch.randn(5, K), copy.deepcopy(layer.state_dict())
        error = layer.merge(requantize=True)
        assert isinstance(error, MergeError)
        new, exact = layer.weight, exact_merge(layer)
        assert isinstance(new, NF4Weight)
        assert (new.blocksize, new.is_nested, new.dtype, new.shape) == (blocksize, double_quant, q.dtype, q.shape)
        assert not same_bits(new, q)
        off = new.dequantize(torch.float32).double() - exact
        update = exact - q.dequantize(torch.float32).double()
        assert math.isclose(error.relative, off.norm() / exact.norm(), rel_tol=1e-5)
        assert math.isclose(error.relative_to_update, off.norm() / update.norm(), rel_tol=1e-5)
        assert math.isclose(error.max_abs, off.abs().max(), rel_tol=1e-5)
        assert 0.01 < error.relative < 0.3
        bias = layer.bias
        assert relative_error(layer(x).detach(), F.linear(x, new.dequantize(), bias).detach()) < 1e-6
        assert same_state(layer.state_dict(), state)
        layer.unmerge()
        assert layer.weight is q
        assert same_state(layer.state_dict(), state)

    def test_an_update_below_a_step_of_the_grid_is_reported_lost(self):
        layer = trained(double_quant=False)
        with torch.no_grad():
            layer.lora_B.mul_(1e-4)
        error = layer.merge(requantize=True)
        assert error.relative < 1e-2
        assert error.relative_to_update > 0.5
        with torch.no_grad():
            layer.unmerge()
            layer.lora_B.zero_()
        error = layer.merge(requantize=True)
        assert error.relative < 1e-6
        assert error.relative_to_update in (0.0, math.inf)

    def test_one_way_after_the_other(self):
        layer = trained()
        q = layer.weight
        first = layer.merge(requantize=True)
        assert layer.merge(requantize=True) == first
        four_bit = layer.weight
        layer.merge()
        assert type(layer.weight) is nn.Parameter
        assert relative_error(layer.weight, exact_merge(layer)) < 1e-6  # from the original, not from the 4 bits
        assert layer.merge() is None
        assert layer.merge(requantize=True) == first
        assert same_bits(layer.weight, four_bit)
        layer.unmerge()
        assert layer.weight is q
        with pytest.raises(TypeError, match="requantize is 1"):
            layer.merge(requantize=1)

    @pytest.mark.parametrize("requantize", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_x_of_another_dtype(self, requantize, dtype):
        layer, x = trained(torch.bfloat16), torch.randn(5, K, dtype=dtype)
        layer.merge(requantize=requantize)
        y = layer(x)
        assert y.dtype == dtype
        weight = layer.weight.dequantize(dtype) if requantize else layer.weight.to(dtype)
        exact = F.linear(x.double(), weight.double(), layer.bias.to(dtype).double())
        assert relative_error(y.detach(), exact.detach()) < 4 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("value", [math.inf, math.nan, 1e30])
    def test_not_finite(self, value):
        layer = trained(torch.float16)
        with torch.no_grad():
            layer.lora_B[0, 0] = value
        weight = layer.weight
        for method in (layer.merge, lambda: layer.merge(requantize=True), layer.merged_weight, layer.to_linear):
            with pytest.raises(ValueError, match="FusedQLoRALinear: the merged weight is not finite"):
                method()
            assert not layer.merged
            assert layer.weight is weight

    @pytest.mark.parametrize("merge", [None, {}, {"requantize": True}], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_to_linear_is_exact_however_the_layer_stands(self, merge, bias):
        layer, x = trained(torch.bfloat16, bias=bias).eval(), torch.randn(4, K).bfloat16()
        expected = layer.merged_weight()
        if merge is not None:
            layer.merge(**merge)
        if bias:
            layer.bias = nn.Parameter(layer.bias.detach().half(), requires_grad=False)
        linear = layer.to_linear()
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, expected)
        assert {p.dtype for p in linear.parameters()} == {torch.bfloat16}
        assert not linear.training
        linear(x)

    def test_token_mask_is_refused(self):
        layer = trained()
        layer.merge(requantize=True)
        with pytest.raises(ValueError, match="FusedQLoRALinear: token_mask is given, but the layer is merged"):
            layer(torch.randn(2, K), token_mask=torch.tensor([True, False]))
