"""Gated feed-forward blocks: one call where that is the same as calling the layers, the block's own code elsewhere."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP

from peft_kernels import accelerate, check, restore
from peft_kernels.integrations._peft_source import gated_mlp, shared_inputs
from tests.integrations import models
from tests.integrations.models import adapted, assert_close, features, randomise

TARGETS = ["gate_proj", "up_proj", "down_proj"]
WHOLE = {"lora_swiglu_mlp": 1}
LAYERS = {"lora_linear_group": 1, "lora_linear": 1}


def block(activation="silu", bias=False, kind=LlamaMLP, **config):
    torch.manual_seed(4)
    shape = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_attention_heads=4, hidden_act=activation, mlp_bias=bias
    )
    return adapted(nn.Sequential(kind(shape)), target_modules=config.pop("target_modules", TARGETS), **config)


def mlp(model):
    return model.base_model.model[0]


def pair(*args, **config):
    model = block(*args, **config)
    stock = models.twin(model)
    return model, stock, accelerate(model, strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ["silu", "swish", "gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_blocks_equal_peft(activation, bias, dtype, fused):
    model = block(activation, bias).to(dtype)
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    assert_close(model, stock, features(dtype=dtype))
    assert_close(model, stock, features(2, 3, 24, dtype=dtype))
    assert fused.ops() == {"lora_swiglu_mlp": 2}
    assert fused() == 6
    with torch.no_grad():
        torch.testing.assert_close(model(features(dtype=dtype)), stock(features(dtype=dtype)))
    assert "lora_swiglu_mlp" in str(report)


@pytest.mark.parametrize("targets", [["gate_proj"], ["up_proj", "down_proj"], ["down_proj"]], ids=str)
def test_layers_without_adapters(targets, fused):
    model, stock, _ = pair(target_modules=targets)
    assert_close(model, stock, features())
    assert fused.ops() == WHOLE
    assert fused() == len(targets)


def test_trained_base_weights(fused):
    model = block(bias=True)
    model.requires_grad_(True)
    stock = models.twin(model)
    accelerate(model, strict=True)
    assert_close(model, stock, features())
    assert fused.ops() == WHOLE


def test_several_ranks_scales_and_adapters(fused):
    model = block(rank_pattern={"gate_proj": 7}, alpha_pattern={"down_proj": 3})
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["up_proj", "down_proj"]))
    model.base_model.set_adapter(["default", "other"])
    stock = models.twin(randomise(model))
    accelerate(model, strict=True)
    assert_close(model, stock, features())
    assert fused.ops() == WHOLE
    for module in (model, stock):
        module.set_adapter("other")
    assert_close(model, stock, features())
    assert fused.ops() == {"lora_linear": 2}, "gate_proj has no active adapter, and runs PEFT's own code"


def test_dropout_masks_are_those_of_forward_and_one_for_each_layer(fused):
    """Along fixed masks y is linear in the adapter of down: <dy/dA, A> = <dy/dB, B> = y - what its base gives."""
    model = block(lora_dropout=0.5).double()
    accelerate(model, strict=True)
    x = features(64, 24, dtype=torch.float64)
    down = mlp(model).down_proj
    parameters = [down.lora_A["default"].weight, down.lora_B["default"].weight]
    torch.manual_seed(1)
    y = model(x)
    grads = torch.autograd.grad(y.sum(), parameters)
    inner_a, inner_b = ((g * p).sum() for g, p in zip(grads, parameters, strict=True))
    torch.testing.assert_close(inner_a, inner_b)
    down.scaling["default"] = 1e-300
    torch.manual_seed(1)
    torch.testing.assert_close(y.sum() - model(x).sum(), inner_a)
    torch.manual_seed(1)
    assert torch.equal(model(x), model.train()(x)) is False
    assert fused.ops() == {"lora_swiglu_mlp": 4}


def test_dropout_has_pefts_distribution(fused):
    model, stock, _ = pair(lora_dropout=0.4)
    x = features(4, 24).detach()
    moments = []
    for module in (model, stock):
        torch.manual_seed(5)
        draws = torch.stack([module(x) for _ in range(500)]).detach()
        moments.append((draws.mean(0), draws.std(0)))
    (mean, std), (expected, expected_std) = moments
    error = (mean - expected) / (2 / 500 * expected_std.square()).sqrt()
    assert float(error.abs().max()) < 4.5
    assert float(std.norm() / expected_std.norm()) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, fused):
    model = block(lora_dropout=0.5)
    accelerate(model, strict=True)

    def grads(run):
        model.zero_grad()
        x = features()
        torch.manual_seed(2)
        run(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    expected = grads(model)
    assert all(map(torch.equal, grads(lambda x: checkpoint(model, x, use_reentrant=reentrant)), expected))
    assert fused.ops() == {"lora_swiglu_mlp": 3}


def saved_bytes(model, x):
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    return sum(storages.values()), y


def test_only_x_gate_up_and_small_products_are_kept():
    rows = 512
    model, stock, _ = pair(lora_dropout=0.1)
    x = features(rows, 24)
    kept, _ = saved_bytes(model, x)
    kept_by_peft, _ = saved_bytes(stock, x)
    limit = 4 * rows * (24 + 2 * 40 + 3 * 4) + 8 * 3
    assert kept <= limit < kept_by_peft / 2


def gate_hook(model):
    mlp(model).gate_proj.register_forward_hook(lambda module, inputs, output: output * 2)


def down_hook(model):
    mlp(model).down_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def activation_hook(model):
    mlp(model).act_fn.register_forward_hook(lambda module, inputs, output: output * 2)


def other_activation(model):
    mlp(model).act_fn = ACT2FN["relu"]


def plain_function(model):
    mlp(model).__dict__["act_fn"] = mlp(model)._modules.pop("act_fn").forward


def replaced_forward(model):
    layer = mlp(model).up_proj
    original = layer.forward
    layer.forward = lambda x: 2 * original(x)


def frozen_hook(model):
    mlp(model).up_proj.base_layer.register_forward_hook(lambda module, inputs, output: output * 2)


@pytest.mark.parametrize(
    ("change", "ops"),
    [
        (gate_hook, LAYERS),
        (down_hook, LAYERS),
        (activation_hook, LAYERS),
        (other_activation, LAYERS),
        (plain_function, LAYERS),
        (replaced_forward, LAYERS),
        (frozen_hook, {"lora_linear": 2}),
        (lambda model: model.base_model.disable_adapter_layers(), {}),
        (lambda model: model.merge_adapter(), {}),
    ],
    ids=["gate hook", "down hook", "activation hook", "relu", "function", "forward", "base hook", "disabled", "merged"],
)
def test_what_is_more_than_its_layers_runs_the_blocks_own_forward(change, ops, fused):
    model, stock, _ = pair()
    accelerate(model)
    assert_close(model, stock, features())
    assert fused.ops() == WHOLE
    change(model), change(stock)
    x = features()
    torch.testing.assert_close(model(x), stock(x))
    assert fused.ops() == ops
    if ops:
        assert_close(model, stock, x)


def test_global_hooks(fused):
    model, stock, _ = pair()
    accelerate(model)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        torch.testing.assert_close(model(features()), stock(features()))
    finally:
        handle.remove()
    assert nn.Linear in seen
    assert fused.ops() == {}


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_that_the_block_does_not_know(config, fused):
    model, stock, _ = pair(bias=True, **config)
    assert_close(model, stock, features())
    assert "lora_swiglu_mlp" not in fused.ops()
    assert fused() == 3


@pytest.mark.parametrize("activation", ["relu", "quick_gelu"])
def test_other_activations_have_a_group_of_gate_and_up(activation, fused):
    model, stock, report = pair(activation)
    assert_close(model, stock, features())
    assert fused.ops() == LAYERS
    assert type(mlp(model)) is LlamaMLP
    assert [block.layers for block in report.blocks] == [("gate_proj", "up_proj")]


def test_the_block_is_what_it_was_to_everybody_else(fused):
    model, stock, _ = pair()
    block, plain = mlp(model), mlp(stock)
    assert isinstance(block, LlamaMLP)
    assert repr(model) == repr(stock)
    assert type(block).__name__ == "LlamaMLP"
    assert list(model.state_dict()) == list(stock.state_dict())
    assert block.__dict__.keys() == plain.__dict__.keys()
    seen = []
    block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(block(x=features()), plain(features()))
    assert fused.ops() == LAYERS, "called by keyword"
    block(features())
    assert len(seen) == 2


def test_copies_files_and_restoring(fused):
    model, stock, _ = pair()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(mlp(model))):
        assert_close(copied, stock if copied.__class__ is stock.__class__ else mlp(stock), features())
        assert fused.ops() == WHOLE
    assert accelerate(model).blocks == accelerate(model).blocks
    assert accelerate(model, groups=False).blocks == ()
    assert type(mlp(model)) is LlamaMLP
    assert_close(model, stock, features())
    assert fused.ops() == {"lora_linear": 3}
    accelerate(model)
    assert restore(model) == 3
    assert type(mlp(model)) is LlamaMLP
    assert torch.equal(model(features()), stock(features()))


def test_check_and_compile():
    torch._dynamo.reset()
    model, stock, _ = pair(lora_dropout=0.3)
    result = check(model, features(), verbose=False)
    assert result.ok
    assert result.fused == 3
    model.eval(), stock.eval()
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(model, stock, features())
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(model, stock, features())
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_sixteen_bits_as_accurate_as_peft(adapter, autocast, fused):
    """Over all gradients; what PEFT computes in float32 is compared with its 16-bit adapters."""
    base = torch.float32 if autocast else torch.bfloat16
    model = block().to(base)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    stock = models.twin(model)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    accelerate(model, strict=True)
    x = features(200, 24, dtype=base)
    truth_value, truth = models.gradients(models.twin(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, grads = models.gradients(model, x)
        eager_value, eager = models.gradients(stock, x)
    assert fused.ops() == WHOLE
    assert error([value], [truth_value]) <= 1.2 * error([eager_value], [truth_value])
    names = list(truth)
    assert error([grads[n] for n in names], [truth[n] for n in names]) <= 1.2 * error(
        [eager[n] for n in names], [truth[n] for n in names]
    )


def error(values, truths) -> float:
    squares = [((v.double() - t.double()).norm() / t.double().norm()) ** 2 for v, t in zip(values, truths, strict=True)]
    return float(sum(squares)) ** 0.5


class TwoSteps(LlamaMLP):
    def forward(self, hidden):
        """As Llama 4 writes it."""
        product = self.up_proj(hidden) * self.act_fn(self.gate_proj(hidden))
        return self.down_proj(product)


class Normed(LlamaMLP):
    def forward(self, x):
        x = x / x.norm()
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Residual(LlamaMLP):
    def forward(self, x):
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return x + y


class Sparse(LlamaMLP):
    def forward(self, x):
        gate = self.gate_proj(x)
        if gate.shape[0] > 2:
            gate = gate - gate.mean()
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class Twice(LlamaMLP):
    def forward(self, x):
        y = self.up_proj(x)
        return self.down_proj(self.act_fn(y) * y)


@pytest.mark.parametrize(
    ("kind", "ops"),
    [
        (TwoSteps, WHOLE),
        (Normed, LAYERS),
        (Residual, LAYERS),
        (Sparse, LAYERS),
        (Twice, {"lora_linear": 2}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_forms_of_the_source(kind, ops, fused):
    model, stock, _ = pair(kind=kind)
    if kind is Twice:
        for module in (model, stock):
            module.base_model.model[0].gate_proj.requires_grad_(False)
    assert_close(model, stock, features())
    assert fused.ops() == ops


def test_source_that_cannot_be_read():
    namespace: dict = {}
    exec("def forward(self, x):\n    return self.down(self.act(self.gate(x)) * self.up(x))", namespace)
    assert gated_mlp(namespace["forward"]) is None
    assert shared_inputs(namespace["forward"]) == ()
    assert gated_mlp(nn.Module.forward) is None
    assert shared_inputs(len) == ()
