"""`accelerate`: the same numbers as PEFT, the report, and what it refuses."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import nn

import peft_kernels
from peft_kernels import accelerate, restore
from peft_kernels.integrations.peft import FusedPeftLinear
from tests.integrations import models
from tests.integrations.models import Toy, adapted, assert_close, bert, features, gpt2, llama, tokens, toy, transformer

LAYERS = {llama: 14, gpt2: 8, bert: 13}


@pytest.mark.parametrize(
    ("make", "dtype"),
    [(llama, torch.float64), (gpt2, torch.float32), (gpt2, torch.float64), (bert, torch.float32)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_model_equals_peft_in_loss_and_every_gradient(make, dtype, fused):
    model = transformer(make).to(dtype)
    stock = models.twin(model)
    report = accelerate(model)
    layers = sum(isinstance(module, FusedPeftLinear) for module in model.modules())
    assert report.fused == layers >= LAYERS[make] - 1
    assert report.skipped == 0
    assert_close(model, stock, tokens(model))
    assert fused() == layers


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"first": 7}, "alpha_pattern": {"second": 3}},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"r": 1},
    ],
    ids=str,
)
def test_configurations(config, fused):
    model = toy(**config)
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_close(model, stock, features())
    assert fused() == 2
    assert_close(model, stock, features(2, 3, 4, 24))
    assert_close(model, stock, features(24))


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda make: make.__name__)
def test_unfrozen_base_weights_get_gradients_too(make, fused):
    model = transformer(make).double()
    model.requires_grad_(True)
    stock = models.twin(model)
    accelerate(model)
    assert_close(model, stock, tokens(model))
    assert fused()


def test_only_wanted_gradients(fused):
    """LoRA-FA (frozen A), frozen B, and x that needs no gradient."""
    model = toy()
    accelerate(model)
    for frozen in ("lora_A", "lora_B"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name and frozen not in name)
        x = features()
        expected = models.gradients(models.twin(model), x)[1]
        grads = models.gradients(model, x)[1]
        assert grads.keys() == expected.keys()
        assert all(frozen not in name for name in grads)
        for name in grads:
            torch.testing.assert_close(grads[name], expected[name])
        assert models.gradients(model, x.detach())[1].keys() == expected.keys() - {"x"}
    assert fused() == 8


def test_scale_changes_are_seen(fused):
    model = toy()
    stock = models.twin(model)
    accelerate(model)
    for module in (model, stock):
        for layer in (module.base_model.model.first, module.base_model.model.second):
            layer.set_scale("default", 3)
            layer.scale_layer(0.5)
    assert_close(model, stock, features())
    for module in (model, stock):
        module.base_model.model.first.unscale_layer()
    assert_close(model, stock, features())
    assert fused() == 4


def test_tied_head(fused):
    """LoRA on a head whose weight is the embedding's: forward and gradients of the shared weight are right."""
    model = transformer(gpt2, target_modules=["c_attn", "lm_head"])
    embedding = model.get_input_embeddings().weight
    assert model.base_model.model.lm_head.base_layer.weight is embedding
    embedding.requires_grad_(True)
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_close(model, stock, tokens(model))
    assert fused() == 3
    assert model.base_model.model.lm_head.base_layer.weight is embedding


def test_square_conv1d_and_linear_in_one_model(fused):
    """Which way a weight lies follows from the layer's type, not from the configuration, which is shared."""
    from transformers.pytorch_utils import Conv1D

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = Conv1D(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(self.conv(x))

    model = adapted(Both(), target_modules=["conv", "linear"])
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_close(model, stock, features(5, 16))
    assert fused() == 2


def test_result_may_be_changed_in_place_and_inputs_stay(fused):
    model = toy()
    accelerate(model)
    layer = model.base_model.model.first
    x = features()
    before = x.detach().clone()
    y = layer(x)
    (y * 2).sum().backward(retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    (y * 2).sum().backward()
    assert torch.equal(x.grad, first)
    z = layer(x)
    z += 1
    z.sum().backward()
    assert torch.equal(x.detach(), before)
    assert fused() == 2


def test_dropout_has_a_mask_per_projection_and_follows_the_seed(fused):
    model = toy(lora_dropout=0.5)
    accelerate(model)
    layer = model.base_model.model.first
    x = features(64, 24)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    base = layer.base_layer(x)
    kept = ((first - base).norm() / (layer.eval()(x) - base).norm()).item()
    assert 1.1 < kept < 1.7  # E||drop(v)||² = ||v||² / (1 - p)
    layer.lora_dropout.train()
    assert not torch.equal(layer(x), layer(x)), "the flag of the dropout module counts, as in PEFT"
    layer.lora_dropout["default"].p = 1.0
    assert torch.equal(layer(x), base)
    assert fused() == 7


def test_dropout_gradients_use_the_forward_mask(fused):
    """Along a fixed mask the layer is linear in x, so that y(x) = <dy/dx, x> when there is no bias."""
    model = toy(lora_dropout=0.5, target_modules=["second"]).double()
    accelerate(model)
    layer, x = model.base_model.model.second, features(6, 16, dtype=torch.float64)
    y = layer(x)
    grad_x, grad_a = torch.autograd.grad(y.sum(), (x, layer.lora_A["default"].weight))
    torch.testing.assert_close((grad_x * x).sum(), y.sum())
    low_rank = y.sum() - layer.base_layer(x).sum()
    torch.testing.assert_close((grad_a * layer.lora_A["default"].weight).sum(), low_rank)
    assert fused() == 1


GRID = [
    (base, adapter, autocast)
    for base in (torch.float32, torch.bfloat16, torch.float16)
    for adapter in (torch.float32, torch.bfloat16)
    for autocast in (None, torch.bfloat16)
]


@pytest.mark.parametrize(("base", "adapter", "autocast"), GRID, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_and_values_as_peft(x_dtype, base, adapter, autocast, fused):
    """F29: result and gradient dtypes are PEFT's; values are as close to float64 as PEFT's are with the same dtypes.

    Where PEFT computes the adapters in float32 and this library in 16 bits, "the same dtypes" means 16-bit adapters."""
    model = toy().to(base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    stock = models.twin(model)
    rounded = models.twin(model)
    compute = autocast or x_dtype
    for name, parameter in rounded.named_parameters():
        if "lora_" in name and compute != torch.float32:
            parameter.data = parameter.data.to(compute)
    accelerate(model)

    def run(module):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return models.gradients(module, features(40, 24, dtype=x_dtype))

    if x_dtype != base and autocast is None:
        with pytest.raises(RuntimeError) as expected:
            run(stock)
        with pytest.raises(RuntimeError, match=str(expected.value)[:30]):
            run(model)  # PEFT's own code, and so its own error
        assert not fused()
        return
    value, grads = run(model)
    assert fused() == 2
    peft_value, peft_grads = run(stock)
    truth_value, truth_grads = models.gradients(models.twin(model).double(), features(40, 24, dtype=x_dtype).double())
    eager_value, eager_grads = run(rounded)
    assert value.dtype == peft_value.dtype
    assert _error(value, truth_value) <= 1.2 * _error(eager_value, truth_value) + 1e-7
    for name, grad in grads.items():
        assert grad.dtype == peft_grads[name].dtype, name
        eager = eager_grads[name].to(grad.dtype)
        assert _error(grad, truth_grads[name]) <= 1.2 * _error(eager, truth_grads[name]) + 1e-7, name


def _error(value, truth) -> float:
    return float((value.double() - truth.detach().double()).norm() / truth.detach().double().norm())


def test_report_prints_a_table():
    model = adapted(Toy(), target_modules=["first", "second", "conv"])
    report = accelerate(model)
    assert (report.fused, report.skipped) == (2, 1)
    text = str(report)
    assert "2 of 3 layers fused" in text
    line = next(line for line in text.splitlines() if "conv" in line)
    assert line.split()[:3] == ["base_model.model.conv", "1", "no"]
    assert "lora.layer.Conv1d" in line
    assert list(report.reasons.values()) == [["base_model.model.conv"]]


def test_report_joins_layers_that_differ_in_their_index():
    model = transformer(llama)
    report = accelerate(model)
    assert report.rows[0].layer.endswith("layers.0.self_attn.q_proj")
    line = next(line for line in str(report).splitlines() if "q_proj" in line)
    assert "layers.{0-1}.self_attn.q_proj" in line
    assert line.split()[1:] == ["2", "yes"]


def test_one_log_line_per_reason(caplog):
    model = adapted(Toy(), target_modules=["first", "second", "conv"])
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        report = accelerate(model)
        assert ["lora.layer.Conv1d" in record.message for record in caplog.records] == [True]
        with model.disable_adapter():
            for _ in range(3):
                model(features())
    assert len(caplog.records) == 2
    assert "base_model.model.first" in caplog.records[1].message
    assert report.fallbacks == {"the adapters are disabled": 6}
    assert "6 calls ran PEFT's own code: the adapters are disabled" in str(report)


def test_nothing_to_fuse_is_an_error_and_changes_nothing():
    plain = Toy()
    with pytest.raises(RuntimeError, match="no PEFT layers"):
        accelerate(plain)
    model = adapted(Toy(), target_modules=["conv"])
    types = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"no layer can be fused(.|\n)*Conv1d(.|\n)*0 of 1 layers fused"):
        accelerate(model)
    assert types == [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="model is list"):
        accelerate([model])


def test_strict_refuses_a_partial_replacement_and_changes_nothing():
    model = adapted(Toy(), target_modules=["first", "conv"])
    with pytest.raises(RuntimeError, match=r"strict=True(.|\n)*conv(.|\n)*1 of 2"):
        accelerate(model, strict=True)
    assert not any(isinstance(module, FusedPeftLinear) for module in model.modules())


def test_strict_raises_at_a_later_fallback_but_not_where_nothing_is_to_fuse(fused):
    model = toy()
    accelerate(model, strict=True)
    model(features())
    with model.disable_adapter():
        model(features())
    assert fused() == 2
    model.base_model.model.second.lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"second: lora_A has hooks.*strict"):
        model(features())
    accelerate(restored(model))
    model(features())


def restored(model):
    assert restore(model) > 0
    return model


def test_twice_is_harmless_and_restore_undoes(fused):
    model = toy()
    stock = models.twin(model)
    keys, text = list(model.state_dict()), repr(model)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    first, second = accelerate(model), accelerate(model)
    assert first.rows == second.rows
    assert (list(model.state_dict()), repr(model)) == (keys, text)
    assert "lora.Linear(" in text
    assert parameters == {name: id(parameter) for name, parameter in model.named_parameters()}
    assert all(isinstance(layer, Linear) for layer in (model.base_model.model.first, model.base_model.model.second))
    assert_close(model, stock, features())
    assert fused() == 2
    assert restore(model) == 2
    assert restore(model) == 0
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert model.base_model.model.first.__dict__.keys() == stock.base_model.model.first.__dict__.keys()
    assert torch.equal(model(features()), stock(features()))
    assert fused() == 0


def test_adapters_injected_into_a_transformers_model(fused):
    from peft import LoraConfig

    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    models.randomise(model)
    stock = models.twin(model)
    assert accelerate(model).fused == 2
    ids = torch.arange(6).unsqueeze(0)
    assert_close(model, stock, {"input_ids": ids, "labels": ids})
    assert fused() == 2


def test_importing_does_not_import_peft():
    code = "import sys, peft_kernels; assert not {'peft', 'transformers', 'bitsandbytes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft_kernels.integrations.peft")
    monkeypatch.delattr(peft_kernels.integrations, "peft")
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'peft-kernels\[peft\]'"):
        accelerate(Toy())
