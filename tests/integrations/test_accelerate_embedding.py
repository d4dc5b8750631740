"""PEFT's LoRA on embeddings: the same rows and gradients, from the indices alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import LoraConfig
from torch import nn

from peft_kernels import accelerate, check, restore
from peft_kernels.integrations.peft import FusedPeftEmbedding
from tests.integrations import models
from tests.integrations.models import adapted, llama, randomise, tokens, transformer

IDS = torch.tensor([[3, 1, 3], [0, 8, 3]])


class Embedded(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 16, **options)

    def forward(self, ids):
        return torch.tanh(self.table(ids))


def embedded(options=None, **config):
    torch.manual_seed(2)
    model = adapted(Embedded(**(options or {})), target_modules=["table"], **config)
    nn.init.normal_(table(model).lora_embedding_A["default"], std=0.3)
    return randomise(model)


def table(model):
    return model.base_model.model.table


def results(model, ids=IDS):
    y = model(ids)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return y, dict(zip(leaves, torch.autograd.grad((y * direction).sum(), list(leaves.values())), strict=True))


def assert_equal(model, stock, ids=IDS):
    (y, grads), (expected, expected_grads) = results(model, ids), results(stock, ids)
    torch.testing.assert_close(y, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert float(grad.norm()) > 0, name
        torch.testing.assert_close(grad, expected_grads[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1}], ids=str)
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "r": 1}, {"lora_dropout": 0.5}], ids=str)
def test_rows_and_gradients_equal_peft(config, options, dtype, fused):
    model = embedded(options, **config).to(dtype)
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    assert report.fused == 1
    for ids in (IDS, IDS.int(), IDS[0], torch.tensor(3)):
        if ids.ndim or not options:  # a row at padding_idx alone has no gradient
            assert_equal(model, stock, ids)
    assert fused.ops()["lora_embedding"] >= 3


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_sixteen_bits_as_accurate_as_peft(adapter, fused):
    model = embedded().bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    stock, rounded = models.twin(model), models.twin(model)
    for name, parameter in rounded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    accelerate(model, strict=True)
    ids = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(1))
    truth, truth_grads = results(models.twin(model).double(), ids)
    y, grads = results(model, ids)
    eager, eager_grads = results(rounded, ids)
    assert y.dtype == stock(ids).dtype
    assert error(y, truth) <= 1.2 * error(eager, truth)
    for name, grad in grads.items():
        assert grad.dtype == adapter
        assert error(grad, truth_grads[name]) <= 1.2 * error(eager_grads[name], truth_grads[name]), name
    assert fused() == 1


def error(value, truth) -> float:
    return float((value.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())


def test_a_trained_table_gets_gradients_too(fused):
    model = embedded({"padding_idx": 3})
    table(model).base_layer.weight.requires_grad_(True)
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_equal(model, stock)
    _, grads = results(model)
    assert not grads["base_model.model.table.base_layer.weight"][3].any()
    assert fused() == 2


def test_mica(fused):
    model = embedded(init_lora_weights="mica")
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_equal(model, stock)
    assert fused() == 1
    assert not any("embedding_B" in name for name in results(model)[1])


def test_a_language_model_with_a_tied_head(fused):
    model = transformer(llama, target_modules=["embed_tokens", "lm_head", "q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_embedding_A" in name:
            nn.init.normal_(parameter, std=0.3)
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    models.assert_close(model, stock, tokens(model))
    assert fused.ops() == {"lora_embedding": 1, "lora_linear": 3}
    assert check(model, tokens(model), verbose=False).ok
    assert report.fallbacks == {}


def two_active(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["table"]))
    randomise(model).base_model.set_adapter(["default", "other"])


def dora(model):
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["table"], use_dora=True))
    randomise(model).set_adapter("other")


def hook(model):
    table(model).base_layer.register_forward_hook(lambda module, inputs, output: output * 2)


def subclass(model):
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 3 * super().forward(ids)

    table(model).base_layer.__class__ = Scaled


def option(**options):
    def change(model):
        for name, value in options.items():
            setattr(table(model).base_layer, name, value)

    change.__name__ = "_".join(options)
    return change


CASES = [
    (lambda model: model.base_model.disable_adapter_layers(), "adapters are disabled"),
    (lambda model: model.merge_adapter(), "merged"),
    (two_active, "2 adapters of an embedding are active"),
    (dora, "DoraEmbeddingVariant"),
    (hook, "base_layer has hooks"),
    (subclass, "Scaled, not exactly torch.nn.Embedding"),
    (option(max_norm=1.0), "max_norm=1.0"),
    (option(scale_grad_by_freq=True), "scale_grad_by_freq=True"),
    (lambda model: table(model).scaling.update(default=float("inf")), "scaling is inf"),
    (lambda model: table(model).input_fns.update(default=lambda inputs: inputs[0]), "tensor parallel"),
]


@pytest.mark.parametrize(("change", "reason"), CASES, ids=[reason for _, reason in CASES])
def test_the_rest_is_pefts_own_code(change, reason, fused):
    model = embedded()
    stock = models.twin(model)
    report = accelerate(model)
    model(IDS)
    assert fused() == 1
    change(model), change(stock)
    value, expected = model(IDS), stock(IDS)
    assert torch.equal(value.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert fused() == 0
    assert re.search(reason, next(iter(report.fallbacks)))
    with pytest.raises(RuntimeError, match=reason):
        accelerate(restored(model))


def restored(model):
    restore(model)
    return model


def test_calls_with_other_arguments(fused):
    model = embedded().eval()
    two_active(model)
    stock = models.twin(model)
    model.set_adapter("default"), stock.set_adapter("default")
    report = accelerate(model)
    names = ["other", "__base__"]
    assert torch.equal(model(IDS, adapter_names=names), stock(IDS, adapter_names=names))
    assert list(report.fallbacks) == ["the call has arguments besides x (adapter_names)"]
    with pytest.raises(Exception, match=r"ndices|expected"):
        model(IDS.float())
    assert fused() == 0


def test_copies_merging_and_restoring(fused):
    model = embedded()
    stock = models.twin(model)
    accelerate(model, strict=True)
    copied = copy.deepcopy(model)
    assert type(table(copied)) is FusedPeftEmbedding
    assert repr(model) == repr(stock)
    assert_equal(copied, stock)
    merged = copied.merge_and_unload()
    torch.testing.assert_close(merged(IDS), stock(IDS))
    assert fused() == 1
    assert restore(model) == 1
    assert torch.equal(model(IDS), stock(IDS))
    assert table(model).__dict__.keys() == table(stock).__dict__.keys()


def test_compiles_whole(fused):
    torch._dynamo.reset()
    model = embedded()
    stock = models.twin(model)
    accelerate(model, strict=True)
    model.compile(fullgraph=True, backend="aot_eager")
    assert_equal(model, stock)
    torch._dynamo.reset()
