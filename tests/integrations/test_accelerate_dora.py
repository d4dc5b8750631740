"""DoRA in PEFT's layers: the same numbers from one base matmul, and norms that are kept only while they are right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft.tuners.lora import dora
from torch import nn

from peft_kernels import accelerate, check
from tests.integrations import models
from tests.integrations.models import adapted, assert_close, features, gpt2, llama, tokens, toy, transformer


def with_dora(**config):
    return varied(toy(use_dora=True, **config))


def varied(model):
    """Magnitudes other than the norms, so that they count."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
    return model


def first(model):
    return model.base_model.model.first


def pair(**config):
    model = with_dora(**config)
    stock = models.twin(model)
    accelerate(model, strict=True)
    return model, stock


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.float64),
        ({"use_rslora": True}, torch.float64),
        ({"r": 1}, torch.float64),
        ({"bias": "all"}, torch.float32),
    ],
    ids=str,
)
def test_dora_equals_peft(config, dtype, fused):
    model = with_dora(**config).to(dtype)
    stock = models.twin(model)
    accelerate(model, strict=True)
    for shape in ((5, 24), (2, 3, 24), (1, 24)):
        assert_close(model, stock, features(*shape, dtype=dtype))
    assert fused.ops() == {"dora_linear": 6}
    assert any("magnitude" in name for name in models.gradients(model, features(dtype=dtype))[1])


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda make: make.__name__)
def test_whole_models(make, fused):
    """Also Conv1D, whose weight lies the other way round; groups are for plain LoRA."""
    model = varied(transformer(make, use_dora=True)).double()
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    assert_close(model, stock, tokens(model))
    assert fused.ops() == {"dora_linear": report.fused}


def test_square_conv1d(fused):
    from transformers.pytorch_utils import Conv1D

    base = nn.Sequential(Conv1D(16, 16), nn.Tanh())
    model = varied(adapted(base, target_modules=["0"], use_dora=True, fan_in_fan_out=True))
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_close(model, stock, features(5, 16))
    assert fused() == 1


def test_dropout_keeps_the_base_whole_and_the_mask_in_backward(fused):
    """y - b = g x Wᵀ + g s drop(x) Aᵀ Bᵀ: linear in m, and with one mask <dy/dA, A> = <dy/dB, B> is the second term."""
    model = with_dora(lora_dropout=0.5).double()
    accelerate(model, strict=True)
    layer, x = first(model), features(64, 24, dtype=torch.float64)
    y = layer(x)
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    magnitude = layer.lora_magnitude_vector["default"].weight
    grad_m, *grads, grad_x = torch.autograd.grad(y.sum(), (magnitude, *parameters, x))
    low_rank_a, low_rank_b = ((g * p).sum() for g, p in zip(grads, parameters, strict=True))
    torch.testing.assert_close(low_rank_a, low_rank_b)
    shifted = y.sum() - layer.base_layer.bias.sum() * 64
    torch.testing.assert_close((grad_m * magnitude).sum(), shifted)
    torch.testing.assert_close((grad_x * x).sum(), shifted)
    layer.lora_dropout["default"].p = 1.0
    base_part = (layer(x) - layer.base_layer.bias).sum()
    torch.testing.assert_close(base_part + low_rank_a, shifted)
    assert fused() == 2


def test_with_dropout_the_mean_is_pefts(fused):
    model, stock = pair(lora_dropout=0.4)
    x = features(4, 24).detach()
    expected = first(stock.eval())(x)
    torch.testing.assert_close(first(model.eval())(x), expected)
    deviations = []
    for module in (model.train(), stock.train()):
        torch.manual_seed(5)
        draws = torch.stack([first(module)(x) for _ in range(600)])
        error = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
        assert float(error.detach().abs().max()) < 4.5
        deviations.append(float(draws.detach().std(0).norm()))
    assert deviations[0] < deviations[1], "PEFT drops x for (g - 1) x Wᵀ as well"


def test_evaluated_layer_does_not_drop_whatever_its_dropout_module_says(fused):
    model, stock = pair(lora_dropout=0.5)
    for module in (model, stock):
        module.eval()
        first(module).lora_dropout.train()
    torch.testing.assert_close(first(model)(features()), first(stock)(features()))


@pytest.fixture
def norms(monkeypatch):
    """How often row norms were computed since the last call."""
    from peft_kernels import functional

    counts, original = [], functional.dora_weight_norm

    def counted(*args, **kwargs):
        counts.append(kwargs.get("weight_norm_squared") is None)
        return original(*args, **kwargs)

    def since():
        whole, counts[:] = sum(counts), []
        return whole

    monkeypatch.setattr(functional, "dora_weight_norm", counted)
    return since


def in_place(model):
    with torch.no_grad():
        first(model).base_layer.weight.mul_(1.5)


def merged_and_unmerged(model):
    first(model).base_layer.weight.data = first(model).base_layer.weight.data.clone()
    model.merge_adapter()
    first(model).base_layer.weight.data.mul_(3)  # as merging changes it: nothing counts that
    model.unmerge_adapter()


def loaded(model):
    state = {k: v * 2 if k.endswith("first.base_layer.weight") else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def moved(model):
    model.double().float()
    first(model).base_layer.weight.data.mul_(2)
    model.double().float()


def replaced(model):
    first(model).base_layer.weight = nn.Parameter(torch.randn_like(first(model).base_layer.weight), False)


@pytest.mark.parametrize("change", [in_place, merged_and_unmerged, loaded, moved, replaced], ids=lambda c: c.__name__)
def test_norms_of_the_base_weight_are_kept_until_it_changes(change, norms):
    model, _ = pair()
    stock_of = models.twin
    for expected in (2, 0):
        assert_close(model, stock_of(model), features())
        assert norms() == expected
    torch.manual_seed(8)
    change(model)
    assert_close(model, stock_of(model), features())
    assert norms() >= 1
    assert_close(model, stock_of(model), features())
    assert norms() == 0


def test_norms_follow_trained_adapters_and_base_weights(norms):
    model, stock = pair()
    for module in (model, stock):
        first(module).base_layer.weight.requires_grad_(True)
    for module in (model, stock):
        optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), lr=0.05)
        for _ in range(3):
            module(features()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert norms() == 3 + 1, "each time for a base weight that is trained, once for the frozen one"
    assert_close(model, stock, features())


def test_norms_of_a_trained_base_weight_are_not_kept(fused):
    """FSDP2 gathers a trained weight into the same memory without counting the change."""
    model, _ = pair()
    weight = first(model).base_layer.weight.requires_grad_(True)
    model(features())
    weight.data.mul_(2)
    assert_close(model, models.twin(model), features())


def test_copies_keep_norms_of_their_own(norms, fused):
    model, _ = pair()
    model(features())
    assert norms() == 2
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(copied, models.twin(copied), features())
        assert norms() == 2
    assert list(model.state_dict()) == list(models.twin(model).state_dict())


def test_inference_and_training_share_a_layer(fused):
    model, stock = pair()
    with torch.inference_mode():
        torch.testing.assert_close(model(features()), stock(features()))
    assert_close(model, stock, features())


def test_pefts_own_cache_switch(monkeypatch):
    from peft_kernels import functional

    model, _ = pair()
    monkeypatch.setattr(dora, "ENABLE_DORA_CACHING", True)
    calls, original = [], functional.dora_weight_norm
    monkeypatch.setattr(functional, "dora_weight_norm", lambda *a, **k: calls.append(1) or original(*a, **k))
    model.eval()
    x = features()
    y = model(x)
    before = len(calls)
    torch.testing.assert_close(model(x), y)
    assert len(calls) == before, "kept in evaluation"
    model.train()
    model(x)
    assert len(calls) == before + 2, "computed in training"


def test_check_and_compile(fused):
    torch._dynamo.reset()
    model, stock = pair(lora_dropout=0.3)
    assert check(model, features(), verbose=False).ok
    model.eval(), stock.eval()
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(model, stock, features())
    torch._dynamo.reset()


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_sixteen_bits_as_accurate_as_peft(adapter, fused):
    """Where PEFT computes the adapters in float32, "the same dtypes" means 16-bit adapters."""
    model = with_dora().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    stock = models.twin(model)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    accelerate(model, strict=True)
    x = features(200, 24, dtype=torch.bfloat16)
    truth_value, truth = models.gradients(models.twin(model).double(), x.double())
    value, grads = models.gradients(model, x)
    eager_value, eager = models.gradients(stock, x)
    assert error(value, truth_value) <= 1.2 * error(eager_value, truth_value)
    for name, grad in grads.items():
        assert grad.dtype == (x if name == "x" else model.get_parameter(name)).dtype
        assert error(grad, truth[name]) <= 1.2 * error(eager[name], truth[name]), name
    assert fused() == 2


def error(value, truth) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())
