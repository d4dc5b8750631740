"""Masks in models: the same parameters, zeros that stay, what is reported; schedules."""

from __future__ import annotations

import logging
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from peft_kernels import MaskedLinear, NF4Linear
from peft_kernels.formats import mask as mask_format
from peft_kernels.pruning import (
    Constant,
    Cubic,
    Linear,
    apply_masks,
    keep_zeros,
    magnitude_masks,
    mask_optimizer_state,
    masks_of,
    sparsity_report,
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 12))


def step(model, optimizer) -> None:
    model(torch.randn(8, 20)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def outside(model):
    return torch.cat([model.get_submodule(name).weight[~mask.unpack()] for name, mask in masks_of(model).items()])


def test_parameters_stay_the_same_objects():
    model = network()
    parameters, before = list(model.parameters()), model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    masks = magnitude_masks(model, 0.6)
    apply_masks(model, masks)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model[0].weight, torch.where(masks["0"].unpack(), before, 0.0))
    assert masks_of(model)["2"].equal(masks["2"])
    for _ in range(3):
        step(model, optimizer)
    assert not outside(model).any()
    assert outside(model).numel() == round(0.6 * 1536)


def test_another_mask_and_what_the_optimiser_had_gathered():
    model = network()
    apply_masks(model, magnitude_masks(model, 0.2))
    layer = model[0]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    step(model, optimizer)
    apply_masks(model, magnitude_masks(model, 0.6, within=masks_of(model)))
    assert model[0] is layer
    assert optimizer.state[layer.weight]["exp_avg"][~layer.mask.unpack()].any()
    mask_optimizer_state(optimizer, model)
    state = optimizer.state[layer.weight]
    assert not state["exp_avg"][~layer.mask.unpack()].any()
    assert state["exp_avg_sq"][layer.mask.unpack()].count_nonzero() > 100
    assert state["step"] == 1
    step(model, optimizer)
    assert not outside(model).any()


def test_keep_zeros_against_an_optimiser_that_moves_them():
    class Noise(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(1)

    model = network()
    apply_masks(model, magnitude_masks(model, 0.6))
    optimizer = Noise(model.parameters(), 0.01)
    step(model, optimizer)
    assert outside(model).all()
    handle = keep_zeros(optimizer, model)
    step(model, optimizer)
    assert not outside(model).any()
    apply_masks(model, magnitude_masks(model, 0.8, within=masks_of(model)))
    step(model, optimizer)
    assert not outside(model).any()
    handle.remove()
    step(model, optimizer)
    assert outside(model).all()
    with pytest.raises(ValueError, match="no masked layer"):
        keep_zeros(optimizer, network())


def test_weights_of_4_bits_and_promises():
    model = nn.Sequential(NF4Linear(64, 32), nn.Linear(32, 8))
    apply_masks(model, magnitude_masks(model, 0.5, "layer"), weight_is_masked=True)
    assert [type(layer) for layer in model] == [MaskedLinear, MaskedLinear]
    assert model[1].weight_is_masked
    x = torch.randn(3, 64)
    dense = model[0].weight.dequantize(torch.float32) * model[0].mask.unpack()
    torch.testing.assert_close(model[0](x), x @ dense.t() + model[0].bias)


def test_refusals_change_nothing():
    model = network()
    masks = magnitude_masks(model, 0.5)
    for wrong, message in (
        ({"5": masks["0"]}, "no layer named 5"),
        ({"1": masks["0"]}, "no linear layer named 1 to prune"),
        ({"2": masks["0"]}, r"2 has a mask of shape \(48, 20\) on cpu; expected \(12, 48\) on cpu"),
        ({"2": torch.ones(12, 48)}, "2 has a Tensor; expected a PackedMask"),
        ({"2": masks["2"].to("meta")}, "on meta; expected"),
    ):
        with pytest.raises((ValueError, TypeError), match=f"apply_masks: .*{message}"):
            apply_masks(model, {"0": masks["0"], **wrong})
        assert type(model[0]) is nn.Linear
        assert model[0].weight.all()
    normed = nn.Sequential(weight_norm(nn.Linear(20, 48)))
    with pytest.raises(ValueError, match="apply_masks"):
        apply_masks(normed, masks)


def test_report_names_layers_that_are_left_empty(caplog):
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    apply_masks(model, magnitude_masks(model, 0.7))
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        report = sparsity_report(model)
        sparsity_report(model)
    assert report.emptied == ("0",)
    assert [r.message for r in caplog.records] == ["pruning has left nothing of 0: the output there is the bias, or 0"]
    assert (report.kept, report.total) == (461, 1536)
    assert report.sparsity == 1 - 461 / 1536
    assert "nothing is left of: 0" in str(report)
    assert torch.equal(model[0](torch.randn(2, 20)), model[0].bias.expand(2, -1))
    assert str(sparsity_report({"w": mask_format.full(3, 5)})).endswith("15 of 15 weights kept, sparsity 0.0000")
    assert sparsity_report(network()).sparsity == 0


def test_schedules():
    cubic, linear = Cubic(0.8, begin=10, end=20, initial=0.1), Linear(0.8, begin=10, end=20)
    assert [cubic(step) for step in (0, 9, 10, 20, 99)] == [0, 0, pytest.approx(0.1), 0.8, 0.8]
    assert cubic(15) == pytest.approx(0.8 - 0.7 * 0.5**3)
    assert [linear(step) for step in (9, 10, 15, 20)] == [0, 0, pytest.approx(0.4), 0.8]
    rises = [cubic(step) for step in range(25)]
    assert rises == sorted(rises)
    assert [Constant(0.5, begin=3)(step) for step in (2, 3)] == [0, 0.5]
    assert Cubic(0.5, 4, 4)(4) == 0.5
    with pytest.raises(ValueError, match="Cubic: end is 3"):
        Cubic(0.5, 4, 3)
    with pytest.raises(ValueError, match=r"Linear: final is 1\.5"):
        Linear(1.5, 0, 1)


def test_example(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "prune_and_finetune.py"))
    text = capsys.readouterr().out
    assert "1,280 of 2,560 weights kept, sparsity 0.5000" in text
    losses = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.9 * losses[0]
    assert text.rstrip().endswith("after merging: 0")
