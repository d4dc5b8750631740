"""Each option of `FusedLoRALinear` means what it means in PEFT: outputs and gradients of both, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels import FusedLoRALinear, functional
from tests.helpers import relative_error
from tests.nn.against_peft import pair, run
from tests.nn.models import assert_frozen

EXACT = 1e-13


def linear(bias: bool = True) -> nn.Module:
    return nn.Linear(12, 10, bias=bias)


def conv1d(n: int = 10, k: int = 12) -> nn.Module:
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(n, k)


# base layer, PEFT's configuration, our options
CASES = {
    "plain": (linear, {}, {}),
    "no bias": (lambda: linear(False), {}, {}),
    "trained bias": (linear, {"bias": "lora_only"}, {"train_bias": True}),
    "lora_bias": (linear, {"lora_bias": True}, {"lora_bias": True}),
    "both biases": (linear, {"lora_bias": True, "bias": "lora_only"}, {"lora_bias": True, "train_bias": True}),
    "rsLoRA": (linear, {"use_rslora": True}, {"use_rslora": True}),
    "alpha 0": (linear, {"lora_alpha": 0}, {"lora_alpha": 0}),
    "alpha -3": (linear, {"lora_alpha": -3}, {"lora_alpha": -3}),
    "alpha 0.7": (linear, {"lora_alpha": 0.7}, {"lora_alpha": 0.7}),
    "alpha 4096": (linear, {"lora_alpha": 4096}, {"lora_alpha": 4096}),
    "rank 1": (linear, {"r": 1}, {}),
    "rank above the sizes": (linear, {"r": 17}, {}),
    "Conv1D": (conv1d, {"fan_in_fan_out": True}, {}),
    "square Conv1D": (lambda: conv1d(12, 12), {"fan_in_fan_out": True}, {}),
    "DoRA": (linear, {"use_dora": True}, {"use_dora": True}),
    "DoRA without bias": (lambda: linear(False), {"use_dora": True}, {"use_dora": True}),
    "DoRA, trained bias": (
        linear, {"use_dora": True, "bias": "lora_only"}, {"use_dora": True, "train_bias": True},
    ),
    "DoRA, rsLoRA": (linear, {"use_dora": True, "use_rslora": True}, {"use_dora": True, "use_rslora": True}),
    "DoRA, square Conv1D": (
        lambda: conv1d(12, 12), {"use_dora": True, "fan_in_fan_out": True}, {"use_dora": True},
    ),
}  # fmt: skip


def both(name: str, **more):
    base, config, options = CASES[name]
    config = {"r": 3, "lora_alpha": 5, **config}
    return pair(base(), config, {"lora_alpha": config["lora_alpha"], **options, **more})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
class TestAsInPeft:
    def test_output_and_gradients(self, name):
        theirs, ours = both(name)
        x = torch.randn(4, 7, 12, dtype=torch.float64)
        (y, dx, grads), (their_y, their_dx, their_grads) = run(ours, x), run(theirs, x)
        assert relative_error(y, their_y) < EXACT
        assert relative_error(dx, their_dx) < EXACT
        assert grads.keys() == their_grads.keys()
        for key, grad in grads.items():
            assert relative_error(grad, their_grads[key]) < EXACT, key

    def test_merged(self, name):
        theirs, ours = both(name)
        x = torch.randn(4, 12, dtype=torch.float64)
        expected, state = ours(x), {key: value.clone() for key, value in ours.state_dict().items()}
        weight, bias = ours.weight, ours.bias
        merged = copy.deepcopy(theirs)  # PEFT writes into the weight, which both layers share
        merged.merge()
        assert relative_error(merged(x), expected) < EXACT
        ours.merge()
        assert ours.merged
        assert relative_error(ours(x), expected) < EXACT
        assert relative_error(ours.to_linear()(x), expected) < EXACT
        assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
        assert ours.state_dict().keys() == state.keys()
        ours.unmerge()
        assert ours.weight is weight
        assert ours.bias is bias
        assert torch.equal(ours(x), expected)


class TestAdapterBias:
    def test_starts_as_the_frozen_layer_and_trains(self):
        layer = FusedLoRALinear(12, 10, 3, lora_bias=True)
        x = torch.randn(5, 12)
        assert_frozen(layer, x, layer(x))
        assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B", "lora_bias"]
        layer(x).sum().backward()
        assert torch.allclose(layer.lora_bias.grad, torch.full((10,), 5 * layer.scaling))
        assert layer.bias.grad is None

    def test_merged_where_the_layer_has_no_bias(self):
        """PEFT refuses to merge this; here the merged layer gets a bias, which no checkpoint shows."""
        layer = FusedLoRALinear(12, 10, 3, lora_bias=True, bias=False)
        nn.init.normal_(layer.lora_bias)
        x, keys = torch.randn(5, 12), list(layer.state_dict())
        expected = layer(x)
        layer.merge()
        assert relative_error(layer(x), expected) < 1e-6
        assert layer.bias is not None
        assert list(layer.state_dict()) == keys
        assert "bias=False" in repr(layer)
        twin = layer.to_linear()
        assert relative_error(twin(x), expected) < 1e-6
        layer.half().float().unmerge()
        assert layer.bias is None
        assert relative_error(layer(x), expected) < 1e-3

    def test_not_finite(self):
        layer = FusedLoRALinear(12, 10, 3, lora_bias=True, dtype=torch.float16)
        with torch.no_grad():
            layer.lora_bias[3] = 1e5
        weight, bias = layer.weight, layer.bias
        for method in (layer.merge, layer.to_linear, layer.merged_bias):
            with pytest.raises(ValueError, match="merged bias is not finite"):
                method()
        assert not layer.merged
        assert (layer.weight, layer.bias) == (weight, bias)

    def test_with_half_precision_the_bias_is_rounded_once(self):
        layer = FusedLoRALinear(12, 10, 3, lora_bias=True, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.fill_(1.0)
            layer.lora_bias.fill_(2.0**-8 / layer.scaling)  # lost if it were rounded before the sum
            layer.bias.fill_(2.0**-8)
        assert torch.equal(layer(torch.zeros(1, 12).bfloat16()), torch.full((1, 10), 2.0**-7).bfloat16())


class TestTrainedBias:
    def test_of_a_shared_parameter(self):
        base = nn.Linear(12, 10)
        layer = FusedLoRALinear.from_linear(base, 3, train_bias=True)
        assert layer.bias is base.bias
        assert layer.bias.requires_grad
        assert set(layer.adapter_parameters) == {"lora_A", "lora_B", "bias"}
        layer(torch.randn(5, 12)).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((10,), 5.0))

    def test_without_a_bias(self):
        base = nn.Linear(4, 4, bias=False)
        with pytest.raises(ValueError, match="train_bias is set, but the layer has no bias"):
            FusedLoRALinear.from_linear(base, 2, train_bias=True)
        assert base.weight.requires_grad


class TestFrozenA:
    @pytest.mark.parametrize("use_dora", [False, True])
    def test_same_gradients_but_for_a(self, use_dora):
        base = nn.Linear(12, 10)
        layers = [FusedLoRALinear.from_linear(base, 3, freeze_A=flag, use_dora=use_dora) for flag in (False, True)]
        nn.init.normal_(layers[0].lora_B)
        layers[1].load_state_dict(layers[0].state_dict())
        x = torch.randn(5, 12)
        (y, dx, free), (frozen_y, frozen_dx, frozen) = run(layers[0], x), run(layers[1], x)
        assert torch.equal(frozen_y, y)
        assert torch.equal(frozen_dx, dx)
        assert free.keys() - frozen.keys() == {"lora_A"}
        assert all(torch.equal(grad, free[name]) for name, grad in frozen.items())

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_x_is_not_kept(self, dropout):
        saved = []

        def pack(tensor):
            saved.append(tensor.numel())
            return tensor

        layer = FusedLoRALinear(64, 64, 2, freeze_A=True, lora_dropout=dropout)
        held = {p.numel() for p in layer.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(1000, 64, requires_grad=True))
        assert 1000 * 2 in saved  # x Aᵀ
        assert sum(size for size in saved if size not in held) <= 1000 * 2 + 1


class TestTokenMask:
    def test_the_rows_it_names_are_adapted(self):
        layer = FusedLoRALinear(12, 10, 3, lora_bias=True)
        nn.init.normal_(layer.lora_B)
        nn.init.normal_(layer.lora_bias)
        x, mask = torch.randn(4, 7, 12), torch.rand(4, 7) < 0.5
        y, base = layer(x, token_mask=mask), F.linear(x, layer.weight, layer.bias)
        assert relative_error(y[mask], layer(x)[mask]) < 1e-6
        assert relative_error(y[~mask], base[~mask]) < 1e-6
        assert relative_error(layer(x)[~mask], base[~mask]) > 0.1

    def test_no_gradient_from_the_others(self):
        layer = FusedLoRALinear(12, 10, 3).double()
        nn.init.normal_(layer.lora_B)
        x, mask = torch.randn(9, 12, dtype=torch.float64), torch.arange(9) >= 5
        layer(x, token_mask=mask).square().sum().backward()
        grads = layer.lora_A.grad.clone(), layer.lora_B.grad.clone()
        layer.zero_grad()
        layer(x[5:]).square().sum().backward()
        assert relative_error(grads[0], layer.lora_A.grad) < EXACT
        assert relative_error(grads[1], layer.lora_B.grad) < EXACT

    def test_refused_where_it_cannot_hold(self):
        x, mask = torch.randn(4, 12), torch.ones(4, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"token_mask.*DoRA"):
            FusedLoRALinear(12, 10, 3, use_dora=True)(x, token_mask=mask)
        layer = FusedLoRALinear(12, 10, 3)
        layer.merge()
        with pytest.raises(ValueError, match=r"token_mask.*merged"):
            layer(x, token_mask=mask)
        layer.unmerge()
        with pytest.raises(ValueError, match="token_mask has shape"):
            layer(x, token_mask=mask[:3])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"lora_bias": True, "use_dora": True}, ValueError, "lora_bias is set together with use_dora"),
        ({"use_dora": 1}, TypeError, "use_dora is 1"),
        ({"lora_bias": "all"}, TypeError, "lora_bias is 'all'"),
        ({"train_bias": None}, TypeError, "train_bias is None"),
        ({"freeze_A": 0}, TypeError, "freeze_A is 0"),
        ({"use_rslora": "yes"}, TypeError, "use_rslora is 'yes'"),
    ],
    ids=str,
)
def test_bad_options(arguments, error, text):
    base = nn.Linear(4, 4)
    for make in (lambda: FusedLoRALinear(4, 4, **arguments), lambda: FusedLoRALinear.from_linear(base, **arguments)):
        with pytest.raises(error, match=text):
            make()
    assert all(p.requires_grad for p in base.parameters())


def test_plain_layers_call_the_op_directly(monkeypatch):
    """What a layer computes is decided when it is made: plain LoRA takes no detour at each call."""
    layer = FusedLoRALinear(12, 10, 3)
    monkeypatch.setattr(FusedLoRALinear, "_forward", None)
    assert layer(torch.randn(2, 12)).shape == (2, 10)
    for options in ({"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(TypeError):
            FusedLoRALinear(12, 10, 3, **options)(torch.randn(2, 12))


def test_repr_names_what_is_not_plain():
    layer = FusedLoRALinear(12, 10, 4, use_dora=True, train_bias=True, freeze_A=True)
    assert repr(layer).endswith("lora_dropout=0, use_dora=True, train_bias=True, freeze_A=True)")
    layer = FusedLoRALinear(12, 10, 4, lora_bias=True)
    layer.merge()
    assert repr(layer).endswith("lora_dropout=0, lora_bias=True, merged)")


def test_functional_is_what_the_module_calls():
    layer = FusedLoRALinear(12, 10, 4, lora_bias=True)
    nn.init.normal_(layer.lora_bias)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 12)
    y = functional.lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling, bias=layer.bias, lora_bias=layer.lora_bias
    )
    assert torch.equal(layer(x), y)
