"""What adapters can have besides A and B: a bias, siblings that are active too, tokens from which on they count."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn

from peft_kernels import accelerate
from tests.integrations import models
from tests.integrations.models import assert_close, features, llama, randomise, tokens, toy, transformer

TARGETS = ["first", "second"]


def layers_of(model):
    return model.base_model.model.first, model.base_model.model.second


def with_adapters(*configs, active=None, **first):
    """Adapters `default`, `a1`, `a2`, ... of which all, or those named, are active together."""
    model = toy(**first)
    names = ["default"]
    for index, config in enumerate(configs, 1):
        names.append(f"a{index}")
        torch.manual_seed(20 + index)
        model.add_adapter(names[-1], LoraConfig(**{"target_modules": TARGETS, "lora_alpha": 6, **config}))
    model.base_model.set_adapter(active or names)
    return randomise(model)


def with_bias(**config):
    model = toy(lora_bias=True, **config)
    for layer in layers_of(model):
        nn.init.normal_(layer.lora_B["default"].bias, std=0.1)
    return model


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only"}], ids=str)
def test_lora_bias(config, fused):
    model = with_bias(**config)
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_close(model, stock, features())
    assert_close(model, stock, features(2, 3, 24))
    assert fused.ops() == {"lora_linear": 4}
    name = "base_model.model.second.lora_B.default.bias"
    assert name in models.gradients(model, features())[1]


def test_lora_bias_with_dropout_is_not_dropped(fused):
    model = with_bias(lora_dropout=0.5)
    accelerate(model, strict=True)
    first, _ = layers_of(model)
    first.lora_dropout["default"].p = 1.0
    x = features()
    bias = first.scaling["default"] * first.lora_B["default"].bias
    torch.testing.assert_close(first(x), first.base_layer(x) + bias)
    assert fused() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_several_adapters_are_summed_in_one_call(dtype, fused):
    model = with_adapters({"r": 3}, {"r": 1, "use_rslora": True}).to(dtype)
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_close(model, stock, features(dtype=dtype))
    assert_close(model, stock, features(2, 3, 24, dtype=dtype))
    assert fused.ops() == {"lora_linear_group": 4}
    names = models.gradients(model, features(dtype=dtype))[1]
    assert sum("lora_" in name for name in names) == 12


def test_several_adapters_of_which_some_are_in_the_layer(fused):
    model = with_adapters({"r": 3, "target_modules": ["second"]}, {"r": 2}, active=["a1", "default"])
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_close(model, stock, features())
    assert fused.ops() == {"lora_linear": 1, "lora_linear_group": 1}
    for module in (model, stock):
        module.base_model.set_adapter(["default", "a1", "a2"])
    assert_close(model, stock, features())
    assert fused.ops() == {"lora_linear_group": 2}


def test_each_active_adapter_has_its_own_scale_and_dropout(fused):
    """At p = 1 an adapter is gone, at p = 0 it is whole; between, the masks of two equal adapters differ."""
    model = with_adapters({"r": 3, "lora_dropout": 0.5}, lora_dropout=0.5, target_modules=["first"])
    stock = models.twin(model)
    accelerate(model, strict=True)
    layer, x = model.base_model.model.first, features(64, 24)
    for module in (model, stock):
        module.base_model.model.first.set_scale("a1", 0.25)
        module.base_model.model.first.lora_dropout["default"].p = 1.0
        module.base_model.model.first.lora_dropout["a1"].p = 0.0
    torch.testing.assert_close(layer(x), stock.base_model.model.first(x))
    for which in ("lora_A", "lora_B"):
        getattr(layer, which)["a1"].weight.data = getattr(layer, which)["default"].weight.data.clone()
    for name in ("default", "a1"):
        layer.lora_dropout[name].p = 0.5
    layer.scaling["a1"] = -layer.scaling["default"]
    difference = layer(x) - layer.base_layer(x)
    assert difference.abs().max() > 0.1, "with one mask for both, two opposite adapters would cancel"
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert fused.ops() == {"lora_linear_group": 3}


def test_mica_is_lora_with_a_frozen_b(fused):
    model = toy(init_lora_weights="mica")
    for layer in layers_of(model):
        nn.init.normal_(layer.lora_A["default"].weight, std=0.2)
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_close(model, stock, features())
    assert fused.ops() == {"lora_linear": 2}
    assert not any("lora_B" in name for name in models.gradients(model, features())[1])


def alora(**config):
    return toy(alora_invocation_tokens=[3, 4], **config)


OFFSETS = [[2, None, 5], [0, 1, 4], [4, 4, 4], [None] * 3, None]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_alora_adds_to_the_last_tokens_only(offsets, fused):
    model = alora()
    stock = models.twin(model)
    accelerate(model, strict=True)
    for layer, other in zip(layers_of(model), layers_of(stock), strict=True):
        x = features(3, 4, layer.in_features)
        results = []
        for module in (layer, other):
            y = module(x, alora_offsets=offsets)
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
            wanted = (x, module.lora_A["default"].weight, module.lora_B["default"].weight)
            results.append((y, *torch.autograd.grad((y * weights).sum(), wanted)))
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected)
        active = sum(min(o or 0, 4) for o in offsets or [])
        changed = (results[0][0] != layer.base_layer(x)).any(-1).sum()
        assert int(changed) == active
    assert fused.ops() == {"lora_linear": 2}


def test_alora_with_a_bias_adds_it_to_the_last_tokens_only(fused):
    model = alora(lora_bias=True)
    for layer in layers_of(model):
        nn.init.normal_(layer.lora_B["default"].bias)
    stock = models.twin(model)
    accelerate(model, strict=True)
    results = []
    for layer in (layers_of(model)[0], layers_of(stock)[0]):
        x = features(3, 4, 24)
        y = layer(x, alora_offsets=[2, None, 5])
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_B["default"].bias))))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)
    assert fused.ops() == {"lora_linear": 1}


def test_alora_of_two_dimensions_and_without_offsets(fused):
    model = alora()
    stock = models.twin(model)
    accelerate(model, strict=True)
    (layer, _), (other, _) = layers_of(model), layers_of(stock)
    x = features(4, 24).detach()
    torch.testing.assert_close(layer(x, alora_offsets=[1, None, 3, 0]), other(x, alora_offsets=[1, None, 3, 0]))
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer(x), other(x))
    assert fused() == 3


def test_alora_calls_that_peft_refuses_get_its_error(fused):
    model = alora()
    report = accelerate(model)
    layer, _ = layers_of(model)
    for x, offsets in ((features(3, 4, 24), [1]), (features(2, 3, 4, 24), [1, 2])):
        with pytest.raises(IndexError):
            layer(x, alora_offsets=offsets)
    assert fused() == 0
    assert sum(report.fallbacks.values()) == 2


def test_alora_in_a_model_finds_its_invocation_tokens(fused):
    model = transformer(llama, alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    batch = tokens(model)
    batch["input_ids"][0, 3:5] = torch.tensor([3, 4])
    assert_close(model, stock, batch)
    assert fused() == 14
    batch["input_ids"][1, 1:3] = torch.tensor([3, 4])
    assert_close(model, stock, batch)
    assert report.fallbacks == {}


def test_a_plain_adapter_ignores_alora_offsets(fused):
    model = toy()
    accelerate(model, strict=True)
    layer, _ = layers_of(model)
    x = features(3, 4, 24)
    assert torch.equal(layer(x, alora_offsets=[1, 2, None]), layer(x))
    assert fused() == 2
