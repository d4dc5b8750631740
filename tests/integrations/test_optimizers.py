"""bitsandbytes' optimizers, states in 8 bits and in paged memory, on the parameters of accelerated and own layers."""

from __future__ import annotations

import io
import sys
import warnings

import pytest
import torch
from torch import nn

from peft_kernels import FusedLoRALinear, accelerate
from peft_kernels.cli.errors import UsageError
from peft_kernels.cli.finetune.optimizers import OPTIMIZERS, make_optimizer
from peft_kernels.nn import FusedQLoRALinear
from tests.integrations import quantised

PAGED = [name for name in OPTIMIZERS if name.startswith("paged")]
EIGHT_BITS = ["adamw8bit", "paged-adamw8bit"]
BITSANDBYTES = [name for name in OPTIMIZERS if name != "adamw"]
NOT_PAGED = "ignore:Paged optimizers are not supported on CPU"
K = 512  # so that A has the 4096 elements from which on states are kept in 8 bits; B has fewer


def peft_over_four_bits() -> nn.Module:
    model = quantised.toy(K, 64, adapter={"r": 8})
    accelerate(model, strict=True)
    return model


def fused_lora() -> nn.Module:
    torch.manual_seed(0)
    layer = FusedLoRALinear.from_linear(nn.Linear(K, 64), r=8)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def fused_qlora() -> nn.Module:
    torch.manual_seed(0)
    layer = FusedQLoRALinear.from_linear(nn.Linear(K, 64), r=8)
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


MODELS = [peft_over_four_bits, fused_lora, fused_qlora]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch(step: int) -> torch.Tensor:
    return torch.randn(32, K, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def run(make, name: str, steps: int = 6, **options) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make()
    optimizer = make_optimizer(name, model.parameters(), **{"lr": 1e-3, "weight_decay": 0.1, **options})
    train(model, optimizer, range(steps))
    return model, optimizer


@pytest.mark.filterwarnings(NOT_PAGED)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", BITSANDBYTES)
def test_steps_as_adamw(name, make):
    """32 bits: to rounding. 8 bits: a step of AdamW is m / √v, each within half a step of its map of 256 numbers."""
    start = {key: value.detach().clone() for key, value in trained(make()).items()}
    model, optimizer = run(make, name)
    truth = trained(run(make, "adamw")[0])
    bound = 5e-2 if name in EIGHT_BITS else 1e-4
    for key, parameter in trained(model).items():
        moved = truth[key] - start[key]
        assert moved.norm() > 0
        assert (parameter - truth[key]).norm() <= bound * moved.norm(), key
    kinds = {p.numel() >= 4096: optimizer.state[p]["state1"].dtype for p in trained(model).values()}
    assert kinds == {True: torch.uint8 if name in EIGHT_BITS else torch.float32, False: torch.float32}


@pytest.mark.filterwarnings(NOT_PAGED)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_to_the_bit(name):
    whole, _ = run(peft_over_four_bits, name)
    model, optimizer = run(peft_over_four_bits, name, steps=3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    resumed = peft_over_four_bits()
    own = {key: value for key, value in saved["model"].items() if "lora_" in key}
    assert not resumed.load_state_dict(own, strict=False).unexpected_keys
    optimizer = make_optimizer(name, resumed.parameters(), lr=1e-3, weight_decay=0.1)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(3, 6))
    for key, parameter in trained(whole).items():
        assert torch.equal(parameter, trained(resumed)[key]), key


@pytest.mark.parametrize("name", PAGED)
def test_on_a_cpu_paged_states_are_plain_ones_and_bitsandbytes_says_so(name):
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
        model, _ = run(fused_lora, name, steps=2)
    plain = {"paged-adamw8bit": "adamw8bit"}.get(name)
    if plain is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other, _ = run(fused_lora, plain, steps=2)
        for key, parameter in trained(model).items():
            assert torch.equal(parameter, trained(other)[key])


@pytest.mark.filterwarnings(NOT_PAGED)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rate_and_weight_decay_arrive(name):
    """Without a gradient AdamW shrinks by lr · decay; the first step with one is lr long."""
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = make_optimizer(name, [parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.95))
    optimizer = make_optimizer(name, [parameter], lr=0.1, weight_decay=0.0)
    parameter.grad = torch.ones(4, 4)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 4), 0.85))


def test_frozen_weights_are_no_business_of_the_optimizer():
    model = peft_over_four_bits()
    base = model.base_model.model.first.base_layer.weight
    before = base.data.clone()
    optimizer = make_optimizer("adamw8bit", model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, optimizer, range(2))
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [*map(id, trained(model).values())]
    assert torch.equal(base.data, before)


def test_what_cannot_work_is_said_before_training(monkeypatch):
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"name is 'adam'; expected one of adamw, adamw8bit, paged-adamw, "):
        make_optimizer("adam", [parameter], 1e-3, 0.0)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        make_optimizer("adamw", [parameter.detach()], 1e-3, 0.0)
    elsewhere = nn.Parameter(torch.ones(3, device="meta"))
    for name in BITSANDBYTES:
        with pytest.raises(UsageError, match=r"needs a bitsandbytes with kernels for meta, .*: --optim adamw"):
            make_optimizer(name, [elsewhere], 1e-3, 0.0)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name in BITSANDBYTES:
        with pytest.raises(UsageError, match=r'pip install "peft-kernels\[bnb\]"'):
            make_optimizer(name, [parameter], 1e-3, 0.0)
    assert type(make_optimizer("adamw", [parameter], 1e-3, 0.0)) is torch.optim.AdamW
