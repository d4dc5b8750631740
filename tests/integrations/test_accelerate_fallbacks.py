"""What `lora_linear` does not compute runs PEFT's own code, to the bit, and says why."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import VeloraConfig
from torch import nn

from peft_kernels import accelerate
from peft_kernels.integrations.peft import FusedPeftLinear
from tests.integrations import models
from tests.integrations.models import Toy, adapted, features, randomise, toy

TARGETS = ["first", "second"]


def add(model, name, **config):
    torch.manual_seed(21)
    model.add_adapter(name, LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **config))
    return randomise(model)


def layer_of(model) -> nn.Module:
    return model.base_model.model.first


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.merge_adapter()


def two_active_with_a_variant(model):
    add(model, "other", use_dora=True)
    model.base_model.set_adapter(["default", "other"])


def two_active_of_two_dtypes(model):
    add(model, "other")
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_A["other"].double(), layer.lora_B["other"].double()
    model.base_model.set_adapter(["default", "other"])


def none_active_here(model):
    model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["conv"]))
    model.set_adapter("elsewhere")


def variant(**config):
    def change(model):
        add(model, "variant", **config)
        model.set_adapter("variant")

    change.__name__ = "variant_" + "_".join(config)
    return change


def magnitudes(model):
    variant(use_dora=True)(model)
    return [layer.lora_magnitude_vector["variant"] for layer in (layer_of(model), model.base_model.model.second)]


def dora_with_a_bias(model):
    """PEFT refuses it in the configuration."""
    variant(use_dora=True)(model)
    for layer in (layer_of(model), model.base_model.model.second):
        layer.lora_B["variant"].bias = nn.Parameter(torch.ones(layer.out_features))


def dora_with_a_hook(model):
    for module in magnitudes(model):
        module.register_forward_hook(lambda module, inputs, output: output * 2)


def dora_of_another_dtype(model):
    for module in magnitudes(model):
        module.double()


def lora_bias_of_another_dtype(model):
    add(model, "biased", lora_bias=True)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        bias = nn.init.normal_(layer.lora_B["biased"].bias)
        bias.data = bias.data.double()
    model.set_adapter("biased")


def child_hook(child, register):
    def change(model):
        for layer in (model.base_model.model.first, model.base_model.model.second):
            module = getattr(layer, child)
            module = module if child == "base_layer" else module["default"]
            getattr(module, register)(lambda module, *inputs: None)

    change.__name__ = f"{register}_on_{child}"
    return change


def changing_hook(model):
    """A hook that changes the result: reading the weight past it would give another number."""
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_B["default"].register_forward_hook(lambda module, inputs, output: output * 2)


def accelerate_hook(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    for layer in (model.base_model.model.first, model.base_model.model.second):
        add_hook_to_module(layer.lora_A["default"], ModelHook())


def parametrised(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    for layer in (model.base_model.model.first, model.base_model.model.second):
        torch.nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", Twice())


def other_adapter_module(model):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_A["default"].__class__ = Twice


def other_dropout(model):
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_dropout["default"] = nn.Tanh()


def in_place_dropout(model):
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_dropout["default"] = nn.Dropout(0.0, inplace=True)


def rank_above_the_limit(model):
    torch.manual_seed(22)
    model.add_adapter("wide", LoraConfig(r=513, target_modules=TARGETS))
    randomise(model).set_adapter("wide")


def tensor_scaling(model):
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.scaling["default"] = torch.tensor(1.5)


def infinite_scaling(model):
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.scaling["default"] = float("inf")


def casting_off(model):
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.cast_input_dtype_enabled = False


class Marked(torch.Tensor):
    pass


def tensor_subclass(model):
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.base_layer.weight = nn.Parameter(
            layer.base_layer.weight.detach().as_subclass(Marked), requires_grad=False
        )


CASES = [
    (disabled, "adapters are disabled"),
    (merged, "merged"),
    (two_active_with_a_variant, "2 adapters are active at once, with LoRA variants among them .DoraLinearVariant"),
    (two_active_of_two_dtypes, "several dtypes .torch.float32, torch.float64"),
    (none_active_here, "no active adapter"),
    (dora_with_a_bias, "DoRA with a bias of the adapter"),
    (dora_with_a_hook, "the magnitude is in a peft.tuners.lora.dora.DoraLinearLayer that does more"),
    (dora_of_another_dtype, "the magnitude is torch.float64"),
    (variant(velora_config=VeloraConfig(num_groups=4)), "VeloraLinearVariant"),
    (child_hook("base_layer", "register_forward_hook"), "base_layer has hooks"),
    (child_hook("lora_A", "register_forward_pre_hook"), "lora_A has hooks"),
    (child_hook("lora_B", "register_full_backward_hook"), "lora_B has hooks"),
    (child_hook("lora_B", "register_full_backward_pre_hook"), "lora_B has hooks"),
    (child_hook("lora_dropout", "register_forward_hook"), "lora_dropout has hooks"),
    (changing_hook, "lora_B has hooks"),
    (accelerate_hook, "forward of lora_A is replaced"),
    (parametrised, "Parametrized"),
    (other_adapter_module, "Twice"),
    (other_dropout, r"activation\.Tanh"),
    (in_place_dropout, "in place"),
    (rank_above_the_limit, "rank is above 512"),
    (tensor_scaling, r"scaling is a torch\.Tensor"),
    (infinite_scaling, "scaling is inf"),
    (casting_off, "cast_input_dtype_enabled"),
    (tensor_subclass, "Marked"),
]


@pytest.mark.parametrize(("change", "reason"), CASES, ids=[change.__name__ for change, _ in CASES])
def test_fallback_is_pefts_own_result_to_the_bit(change, reason, fused, caplog):
    model = toy()
    stock = models.twin(model)
    report = accelerate(model)
    models.gradients(model, features())
    assert fused() == 2
    change(model)
    change(stock)
    assert isinstance(layer_of(model), FusedPeftLinear)
    assert not isinstance(layer_of(stock), FusedPeftLinear)
    value, grads = models.gradients(model, features())
    expected, expected_grads = models.gradients(stock, features())
    assert fused() == 0
    assert grads.keys() == expected_grads.keys()
    pairs = [(value, expected), *((grads[name], expected_grads[name]) for name in grads)]
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)
    assert list(report.fallbacks.values()) == [2]
    assert len(caplog.records) == 1
    assert re.search(reason, caplog.records[0].message)


@pytest.mark.parametrize(("change", "reason"), CASES, ids=[change.__name__ for change, _ in CASES])
def test_the_report_foresees_the_fallback(change, reason):
    model = toy()
    change(model)
    with pytest.raises(RuntimeError, match=f"no layer can be fused(.|\n)*{reason}"):
        accelerate(model)
    assert not isinstance(layer_of(model), FusedPeftLinear)


def test_dora_that_takes_the_norms_of_columns(fused):
    """As PEFT does when one configuration serves layers of both orientations; it fits square weights only."""
    base = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    model = adapted(base, target_modules=["0"], use_dora=True)
    model.base_model.model[0].lora_magnitude_vector["default"].fan_in_fan_out = True
    stock = models.twin(model)
    with pytest.raises(RuntimeError, match=r"DoRA with fan_in_fan_out=True on a torch\.nn\.modules\.linear\.Linear"):
        accelerate(model)
    model.base_model.model[0].__class__ = FusedPeftLinear
    assert torch.equal(model(features(5, 16)), stock(features(5, 16)))
    assert fused() == 0


def test_dora_of_one_dimension_has_the_shape_that_peft_gives_it(fused):
    model = toy(use_dora=True)
    stock = models.twin(model)
    report = accelerate(model)
    assert layer_of(model)(features(24)).shape == layer_of(stock)(features(24)).shape == (1, 16)
    assert fused() == 0
    assert sum(report.fallbacks.values()) == 1


def test_fallback_ends_with_its_cause(fused):
    model = toy()
    accelerate(model)
    handle = layer_of(model).lora_A["default"].register_forward_hook(lambda *_: None)
    model(features())
    assert fused() == 1
    handle.remove()
    model(features())
    assert fused() == 2
    with disable_input_dtype_casting(model):
        model(features())
    assert fused() == 0


def test_two_active_adapters_of_which_one_is_in_the_layer_are_fused(fused):
    model = toy()
    model.add_adapter("elsewhere", LoraConfig(r=2, target_modules=["conv"]))
    model.base_model.set_adapter(["elsewhere", "default"])
    stock = models.twin(model)
    accelerate(model)
    models.assert_close(model, stock, features())
    assert fused() == 2


def test_x_of_another_dtype_gets_pefts_error(fused):
    model = toy().bfloat16()
    report = accelerate(model)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|dtype"):
        model(features())
    assert fused() == 0
    assert report.fallbacks == {"x is torch.float32, the base weight torch.bfloat16": 1}


def test_mixed_adapter_dtypes_under_autocast(fused):
    model = toy()
    report = accelerate(model)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_B["default"].to(torch.bfloat16)
    stock = models.twin(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(features()), stock(features()))
    assert fused() == 0
    assert report.fallbacks == {"lora_A is torch.float32, lora_B torch.bfloat16": 2}


def test_bias_of_another_dtype_under_autocast(fused):
    model = toy(target_modules=["first"])
    report = accelerate(model)
    bias = layer_of(model).base_layer.bias
    bias.data = bias.data.bfloat16()
    stock = models.twin(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(features()), stock(features()))
    assert fused() == 0
    assert report.fallbacks == {"the base weight is torch.float32, its bias torch.bfloat16": 1}


def test_global_module_hook(fused):
    model = toy()
    report = accelerate(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        model(features())
    finally:
        handle.remove()
    assert fused() == 0
    assert report.fallbacks == {"a global module hook is registered": 2}


def test_torch_func_transforms(fused):
    """vmap and forward-over-reverse need the formulas of PyTorch's own ops."""
    model = toy()
    stock = models.twin(model)
    report = accelerate(model)
    x = features().detach()
    torch.testing.assert_close(torch.func.vmap(model)(x), torch.func.vmap(stock)(x))
    torch.testing.assert_close(torch.func.jacrev(model)(x[0]), torch.func.jacrev(stock)(x[0]))
    assert fused() == 0
    assert list(report.fallbacks) == ["a torch.func transform (vmap, grad, ...) is active"]


def test_functional_call_replaces_parameters(fused):
    model = toy()
    stock = models.twin(model)
    accelerate(model)
    name = "base_model.model.first.lora_B.default.weight"
    doubled = {name: 2 * model.get_parameter(name).detach()}
    x = features()
    value, expected = (torch.func.functional_call(module, doubled, x) for module in (model, stock))
    torch.testing.assert_close(value, expected)
    assert not torch.allclose(value, model(x))
    assert fused() == 4


def test_weights_that_are_plain_attributes(fused):
    """As hypernetworks set them, FSDP1 and DataParallel's replicas: a tensor where the parameter was."""
    model = toy(target_modules=["first"])
    stock = models.twin(model)
    accelerate(model, strict=True)
    code, results = torch.ones(4, requires_grad=True), []
    for module in (model, stock):
        layer = layer_of(module)
        for child in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            weight = child.weight.detach()
            del child.weight
            child.weight = weight * code.mean()
        y = layer(features())
        results.append((y, *torch.autograd.grad(y.square().sum(), code)))
    assert fused() == 1
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)


def test_subclassed_base_layer_is_left_alone(fused):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    base = Toy()
    base.first.__class__ = Scaled
    model = adapted(base, target_modules=TARGETS)
    stock = models.twin(model)
    report = accelerate(model)
    assert "Scaled, not exactly torch.nn.Linear" in next(iter(report.reasons))
    assert report.reasons[next(iter(report.reasons))] == ["base_model.model.first"]
    models.assert_close(model, stock, features())
    assert fused() == 1


def test_replaced_forward_of_the_layer_is_reported():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = toy()
    add_hook_to_module(layer_of(model), ModelHook())
    report = accelerate(model)
    assert report.fused == 1
    assert "forward of the layer is replaced" in next(iter(report.reasons))


def test_hook_on_the_layer_itself_is_no_obstacle(fused):
    from accelerate.hooks import ModelHook, add_hook_to_module

    from peft_kernels import restore

    model = toy()
    stock = models.twin(model)
    accelerate(model)
    seen = []
    layer_of(model).register_forward_hook(lambda module, inputs, output: seen.append(output))
    add_hook_to_module(layer_of(model), ModelHook())
    models.assert_close(model, stock, features())
    assert (fused(), len(seen)) == (2, 1)
    restore(model)
    assert torch.equal(model(features()), stock(features()))
    assert fused() == 0


def test_other_lora_layers_keep_their_class():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.first = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, ids):
            x = self.first(self.embedding(ids))
            return self.attention(x, x, x)[0]

    model = adapted(Embedded(), target_modules=["embedding", "first", "attention"])
    stock = models.twin(model)
    report = accelerate(model)
    assert report.fused == 2
    reasons = " ".join(report.reasons)
    assert "lora.layer.MultiheadAttention" in reasons
    assert "NonDynamicallyQuantizableLinear" in reasons
    ids = torch.arange(6).view(3, 2)
    torch.testing.assert_close(model(ids), stock(ids))


def test_lora_on_parameters_runs_pefts_code(fused):
    """The experts' forward reads its weights itself, where PEFT has put W + s B A in their place."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 24))

        def forward(self, x):
            return torch.einsum("bk,enk->bn", x, self.weight)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts, self.first = Experts(), nn.Linear(8, 8)

        def forward(self, x):
            return self.first(self.experts(x))

    model = adapted(Both(), target_modules=["first"], target_parameters=["experts.weight"])
    stock = models.twin(model)
    report = accelerate(model)
    assert list(report.reasons) == [
        "the layer is a lora.layer.ParamWrapper (target_parameters), whose module reads W + s B A itself"
    ]
    models.assert_close(model, stock, features())
    assert fused() == 1


def test_eight_bit_layers_run_pefts_code(fused):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'peft-kernels[bnb]'")
    base = Toy(k=64, n=64)
    quantised = bnb.nn.Linear8bitLt(64, 64, bias=True, has_fp16_weights=False)
    quantised.load_state_dict(base.first.state_dict(), strict=False)
    base.first, base.is_loaded_in_8bit = quantised.to("cpu"), True
    model = adapted(base, target_modules=TARGETS)
    stock = models.twin(model)
    report = accelerate(model)
    assert list(report.reasons.values()) == [["base_model.model.first"]]
    assert next(iter(report.reasons)).startswith("the layer is a lora.bnb.Linear8bitLt, not exactly PEFT's lora.Linear")
    x = features(5, 64)
    torch.testing.assert_close(model(x), stock(x))
    assert fused() == 1
