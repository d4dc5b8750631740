"""`check`: finds what is wrong, passes what is right, and leaves the model as it was."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from peft_kernels import FusedLoRALinear, accelerate, check, functional, use_backend
from tests.integrations import models
from tests.integrations.models import Toy, bert, features, gpt2, llama, tokens, toy, transformer


@pytest.mark.parametrize("make", [llama, gpt2, bert], ids=lambda make: make.__name__)
def test_accelerated_models_are_equal(make, fused, capsys):
    model = transformer(make, lora_dropout=0.5).train()
    report = accelerate(model)
    result = check(model, tokens(model))
    assert result.ok
    assert result.fused == report.fused == fused(), "one run fused, one by PEFT's own code"
    trainable = sum(p.requires_grad for p in model.parameters())
    assert sum(d.kind == "gradient" for d in result.differences) == trainable
    assert result.worst.error < 1e-5
    text = capsys.readouterr().out
    assert text.startswith("equal")
    assert result.worst.name in text


def sabotage(monkeypatch, **changes):
    original = functional.lora_linear

    def wrong(*args, scaling, **kwargs):
        return original(*args, scaling=changes["scaling"](scaling), **kwargs)

    monkeypatch.setattr(functional, "lora_linear", wrong)


def test_a_wrong_forward_is_found(monkeypatch, capsys):
    model = toy()
    accelerate(model)
    sabotage(monkeypatch, scaling=lambda s: s * 1.01)
    result = check(model, features())
    assert not result.ok
    assert any(d.kind == "output" and d.error > result.tolerance for d in result.differences)
    assert capsys.readouterr().out.startswith("DIFFERENT")


def test_a_wrong_gradient_is_found_and_named(monkeypatch):
    model = toy()
    accelerate(model)
    victim = model.base_model.model.second.lora_A["default"].weight
    original = functional.lora_linear

    def wrong(x, weight, lora_A, lora_B, **kwargs):
        if lora_A is victim:
            lora_A = lora_A + 0.1 * (lora_A - lora_A.detach())
        return original(x, weight, lora_A, lora_B, **kwargs)

    monkeypatch.setattr(functional, "lora_linear", wrong)
    result = check(model, features(), verbose=False)
    assert not result.ok
    assert result.worst.name == "base_model.model.second.lora_A.default.weight"
    assert result.worst.error == pytest.approx(0.1, rel=1e-3)
    assert sum(d.error > result.tolerance for d in result.differences) == 1


def test_nan_and_a_missing_gradient_are_found(monkeypatch):
    model = toy()
    accelerate(model)
    sabotage(monkeypatch, scaling=lambda s: s)
    monkeypatch.setattr(functional, "lora_linear", lambda x, w, a, b, **_: x @ w.t() * math.nan)
    result = check(model, features(), verbose=False)
    assert not result.ok
    assert math.isnan(result.worst.error) or result.worst.error == math.inf
    monkeypatch.setattr(functional, "lora_linear", lambda x, w, a, b, **_: x @ w.t())
    result = check(model, features(), verbose=False)
    assert result.worst.error == math.inf


class Noisy(nn.Module):
    """State of every kind that a careless check would change."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy()
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.calls += 1
        self.norm.running_mean = self.norm.running_mean.clone()
        return self.drop(self.norm(nn.functional.dropout(self.toy(x), 0.3, self.training)))


def test_nothing_is_changed():
    torch.manual_seed(0)
    model = models.adapted(Noisy(), target_modules=["first", "second"], lora_dropout=0.5).train()
    accelerate(model)
    model(features()).sum().backward()
    model.base_model.model.drop.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    training = [module.training for module in model.modules()]
    keys = [module.__dict__.keys() for module in model.modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    x = features()
    assert check(model, x, verbose=False).ok
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name][0]
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name][1])
    assert [module.training for module in model.modules()] == training
    assert [module.__dict__.keys() for module in model.modules()] == keys
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert x.grad is None


def test_nothing_is_changed_by_a_failing_model():
    model = toy(lora_dropout=0.5)
    accelerate(model)
    types = [type(module) for module in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="x has 3 features"):
        check(model, torch.ones(2, 3))
    assert all(module.training for module in model.modules())
    assert [type(module) for module in model.modules()] == types
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant):
    model = transformer(llama).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    accelerate(model)
    assert check(model, tokens(model), verbose=False).ok
    assert model.is_gradient_checkpointing


def test_batches_of_every_kind_and_inputs_that_require_gradients():
    model = toy()
    accelerate(model)
    x = features()
    for batch in (x, (x,), [x], {"x": x}):
        result = check(model, batch, verbose=False)
        assert result.ok
        assert any(d.name.startswith("batch") for d in result.differences)
    result = check(model, x.detach(), verbose=False)
    assert not any(d.name.startswith("batch") for d in result.differences)


def test_loss_in_a_mapping_and_no_loss():
    class WithLoss(Toy):
        def forward(self, x, labels=None):
            y = super().forward(x)
            return {"logits": y} if labels is None else {"loss": (y - labels).pow(2).mean(), "logits": y}

    model = models.adapted(WithLoss(), target_modules=["first", "second"])
    accelerate(model)
    with_loss = check(model, {"x": features(), "labels": torch.zeros(5, 16)}, verbose=False)
    without = check(model, {"x": features()}, verbose=False)
    assert with_loss.ok
    assert without.ok
    assert {d.name for d in with_loss.differences} - {d.name for d in without.differences} == {"output.loss"}


def test_under_no_grad_and_autocast():
    model = toy()
    accelerate(model)
    with torch.no_grad():
        assert any(d.kind == "gradient" for d in check(model, features(), verbose=False).differences)
    with torch.autocast("cpu", torch.bfloat16):
        result = check(model, features(), verbose=False)
    assert result.ok
    assert result.tolerance == 0.1
    assert result.worst.error > 1e-4


def test_own_modules_without_peft():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = FusedLoRALinear(24, 16, r=4, lora_dropout=0.5)
            self.plain = nn.Linear(16, 3)

        def forward(self, x):
            return self.plain(self.layer(x))

    torch.manual_seed(0)
    model = Net()
    nn.init.normal_(model.layer.lora_B)
    result = check(model, features(), verbose=False)
    assert result.ok
    assert result.fused == 1
    assert {d.name for d in result.differences if d.kind == "gradient"} == {
        "layer.lora_A", "layer.lora_B", "plain.weight", "plain.bias", "batch",
    }  # fmt: skip
    assert model.layer.training


def test_own_modules_against_a_broken_backend(monkeypatch):
    from peft_kernels.kernels.composed import lora_linear

    original = lora_linear.backward

    def wrong(*args):
        grads = list(original(*args))
        return [*grads[:-1], grads[-1] * 1.5]

    monkeypatch.setattr(lora_linear, "backward", wrong)
    torch.manual_seed(0)
    model = nn.Sequential(FusedLoRALinear(24, 16, r=4))
    nn.init.normal_(model[0].lora_B)
    with use_backend("composed"):
        result = check(model, features(), verbose=False)
    assert result.worst.name == "0.lora_B"
    assert result.worst.error == pytest.approx(0.5, rel=1e-3)


def test_layers_that_fell_back_are_named(capsys):
    model = toy()
    accelerate(model)
    model.base_model.model.first.lora_A["default"].register_forward_hook(lambda *_: None)
    result = check(model, features())
    assert result.ok
    assert result.fallen_back == ("base_model.model.first",)
    assert result.fused == 1
    assert "1 layers ran other code, first base_model.model.first" in capsys.readouterr().out
    model.base_model.model.second.lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="no layer ran fused"):
        check(model, features())


def test_refusals():
    with pytest.raises(RuntimeError, match="no fused layers"):
        check(toy(), features())
    with pytest.raises(TypeError, match="model is int"):
        check(3, features())

    class Silent(Toy):
        def forward(self, x):
            super().forward(x)
            return "done"

    model = models.adapted(Silent(), target_modules=["first"])
    accelerate(model)
    with pytest.raises(TypeError, match="returned a str"):
        check(model, features())
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="sharded"):
        check(model, features())


def test_a_stricter_tolerance():
    model = toy(lora_alpha=7)
    accelerate(model)
    assert not check(model, features(), tolerance=0.0, verbose=False).ok
