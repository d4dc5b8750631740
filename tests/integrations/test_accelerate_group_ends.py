"""Groups of layers that end early, that their model changes, and what they leave behind: nothing."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from peft_kernels import accelerate
from peft_kernels.integrations import _peft_groups
from tests.integrations import blocks
from tests.integrations.blocks import attention
from tests.integrations.models import assert_close, features
from tests.integrations.test_accelerate_groups import SINGLY, error, grads_of, inner, pair


def changing_input(model):
    for layer in (inner(model).k, inner(model).v):
        layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))


def changing_weight(model):
    weight = inner(model).k.lora_B["default"].weight
    inner(model).q.register_forward_hook(lambda *_: (torch.no_grad()(weight.mul_)(1.5), None)[1])


def changing_scale(model):
    inner(model).q.register_forward_hook(lambda *_: inner(model).k.scale_layer(1.5))


def changing_gradients(model):
    weight = inner(model).k.lora_A["default"].weight
    inner(model).q.register_forward_hook(lambda *_: (weight.requires_grad_(not weight.requires_grad), None)[1])


def checkpointed(model, reentrant=False):
    layer = inner(model).k
    original = layer.forward
    layer.forward = lambda x: checkpoint(lambda x: torch.tanh(original(x)), x, use_reentrant=reentrant)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (blocks.HalfFrozen, None, "k is called in another state than q"),
        (blocks.Attention, changing_input, "k is called with another tensor than q"),
        (blocks.Attention, changing_scale, "k is called in another state than q"),
        (blocks.Attention, changing_gradients, "k is called in another state than q"),
        (blocks.Attention, checkpointed, "k is called in another state than q"),
    ],
    ids=["HalfFrozen", "input", "scale", "requires_grad", "checkpoint"],
)
def test_a_group_that_is_none_ends_and_says_so(kind, change, reason, fused, caplog):
    model, stock, report = pair(kind)
    for module in (model, stock):
        if change is not None:
            change(module)
    with caplog.at_level(logging.WARNING, logger="peft_kernels"):
        assert_close(model, stock, features())
        assert fused.ops()["lora_linear_group"] == 1
        for _ in range(2):
            assert_close(model, stock, features())
    assert "lora_linear_group" not in fused.ops()
    assert report.calls.ended == {"base_model.model": reason}
    assert len(caplog.records) == 1
    assert f"base_model.model runs its layers one by one: {reason}" in str(report)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_member_with_a_checkpoint_of_its_own(reentrant, fused):
    model, stock, report = pair()
    results = []
    for module in (model, stock):
        checkpointed(module, reentrant)
        for _ in range(2):
            module.zero_grad()
            module(features()).square().sum().backward()
        results.append([p.grad for p in module.parameters() if p.requires_grad])
    for grad, expected in zip(*results, strict=True):
        assert error([grad], [expected]) < 1e-5
    assert report.calls.ended == {"base_model.model": "k is called in another state than q"}


@pytest.mark.parametrize("kind", [blocks.InPlace, blocks.Attention], ids=["x", "weight"])
def test_a_changed_tensor_is_noticed(kind, fused):
    model, stock, report = pair(kind)
    if kind is blocks.Attention:
        changing_weight(model), changing_weight(stock)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(features()), stock(features()))
    unchanged = 0 if kind is blocks.InPlace else 1  # v of the first run
    assert fused.ops() == {"lora_linear_group": 1, "lora_linear": 7 - unchanged}
    assert report.calls.ended == {"base_model.model": "k is called in another state than q"}


def test_a_member_called_alone_ends_the_group(fused):
    model, stock, report = pair()
    x = features()
    for _ in range(2):
        torch.testing.assert_close(inner(model).q(x), inner(stock).q(x))
    assert fused.ops() == {"lora_linear_group": 1, "lora_linear": 1}
    assert report.calls.ended == {"base_model.model": "q is called, but not k, v"}
    assert_close(model, stock, x)
    assert fused.ops() == SINGLY


def test_other_members_may_be_called_alone(fused):
    model, stock, report = pair()
    x = features()
    for _ in range(2):
        torch.testing.assert_close(inner(model).k(x), inner(stock).k(x))
    assert_close(model, stock, x)
    torch.testing.assert_close(inner(model).k(x), inner(stock).k(x))
    assert fused.ops() == {"lora_linear_group": 1, "lora_linear": 4}
    assert report.calls.ended == {}


def test_a_group_that_was_not_finished_does_not_mix_with_another(fused):
    model, stock, _ = pair()
    other, other_stock, _ = pair()
    x = features()
    inner(model).q(x)
    assert_close(other, other_stock, x)
    assert_close(model, stock, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_ending_does_not_change_what_a_checkpoint_computes_again(reentrant, fused):
    """The forward in which a group turns out to be none is computed again as it was, with its masks."""
    model = attention(lora_dropout=0.5)
    changing_input(model)
    accelerate(model)
    x = features(64, 24)
    torch.manual_seed(0)
    expected = grads_of(model, x)
    accelerate(model)
    torch.manual_seed(0)
    y = checkpoint(model, x, use_reentrant=reentrant)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    (y * direction.to(y.dtype)).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_nothing_is_kept_alive_after_backward(fused):
    model, _, _ = pair()
    x = features() * 1
    died = []
    weakref.finalize(x, died.append, True)
    y = inner(model).q(x)
    assert fused.ops() == {"lora_linear_group": 1}
    assert _peft_groups._thread.round.left.keys() == {1, 2}
    del x
    gc.collect()
    assert not died, "the graph of q needs x"
    y.sum().backward()
    del y
    assert died, "k and v have not been asked for, and must not keep what they could have been asked with"
    assert not _peft_groups._thread.round.left


def test_nothing_is_left_after_a_forward(fused):
    model, _, _ = pair()
    x = features() * 1
    y = model(x)
    assert _peft_groups._thread.round is None
    dead = weakref.ref(y.grad_fn)
    del x, y
    assert dead() is None, "without the help of the garbage collector"
