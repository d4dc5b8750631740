"""Lottery tickets: rounds prune what is smallest of what is left, and rewind everything else bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_kernels import NF4Linear
from peft_kernels.functional import multi_mask_linear
from peft_kernels.pruning import LotteryTicket


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 12))


def train(model, _=0, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(steps):
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_rounds(scope):
    model = network()
    start = copy.deepcopy(model.state_dict())
    ticket = LotteryTicket(model, scope=scope)
    held = [ticket.nbytes]
    trained = []

    def once(net, i):
        # Each round begins where the first did, but for what is pruned.
        for name, mask in ticket.masks.items():
            kept = mask.unpack()
            assert torch.equal(net.get_submodule(name).weight, torch.where(kept, start[f"{name}.weight"], 0.0))
        for name in ("0.bias", "1.running_mean", "1.num_batches_tracked", "3.bias"):
            assert torch.equal(net.state_dict()[name], start[name])
        train(net)
        assert not torch.equal(net[0].bias, start["0.bias"])
        trained.append({name: net.get_submodule(name).weight.detach().clone() for name in ticket.masks})
        held.append(ticket.nbytes)
        return i / 10

    report = ticket.iterate(once, 3, 0.25)
    expected, left = [], {"global": [1536], "layer": [960, 576]}[scope]
    for _ in range(4):
        expected.append(sum(left))
        left = [n - round(0.25 * n) for n in left]
    assert [sparsity.kept for sparsity, _ in report.rounds] == expected
    assert [result for _, result in report.rounds] == [0.0, 0.1, 0.2, 0.3]
    assert str(expected[-1]) in str(report)
    for before, after, weights in zip(ticket.history, ticket.history[1:], trained, strict=False):
        for name in before:
            assert not (after[name] - before[name]).words.any()  # what is pruned stays so
            assert not weights[name][~before[name].unpack()].any()  # and was not trained
        gone = torch.cat([w[(before[n] - after[n]).unpack()].abs() for n, w in weights.items()])
        kept = torch.cat([w[after[n].unpack()].abs() for n, w in weights.items()])
        assert scope == "layer" or gone.max() <= kept.min()
    # The state that is rewound to shrinks with the network; a mask takes 1 bit a weight.
    masks = sum(mask.nbytes for mask in ticket.masks.values())
    assert held[-1] - held[1] == 3 * masks - 4 * (1536 - expected[-1])


def test_rewinding_to_an_early_step():
    model = network()
    train(model)
    early = copy.deepcopy(model.state_dict())
    train(model)
    ticket = LotteryTicket(model, rewind_state=early, device="cpu")
    train(model)
    masks = ticket.prune(0.5)
    with torch.no_grad():
        model[0].weight.fill_(7.0)  # by an optimiser that keeps no zeros
    ticket.rewind()
    for name, mask in masks.items():
        want = torch.where(mask.unpack(), early[f"{name}.weight"], 0.0)
        assert torch.equal(model.get_submodule(name).weight, want)
    assert torch.equal(model[1].running_var, early["1.running_var"])


def test_weights_that_train_to_zero_do_not_bring_back_pruned_ones():
    ticket = LotteryTicket(nn.Sequential(nn.Linear(8, 8, bias=False)))
    before = ticket.prune(0.5)["0"]
    with torch.no_grad():
        ticket.model[0].weight.zero_()
    after = ticket.prune(0.5)["0"]
    assert int(after.kept()) == 16
    assert not (after - before).words.any()


def test_winning_tickets_side_by_side():
    model = nn.Sequential(nn.Linear(20, 12))
    start = model[0].weight.detach().clone()
    ticket = LotteryTicket(model)
    ticket.iterate(lambda net, _: train(net), 2, 0.3)
    x = torch.randn(6, 20)
    masks = [masks["0"] for masks in ticket.history]
    y = multi_mask_linear(x, start, masks, torch.tensor([0, 1, 2, 0, 1, 2]))
    want = torch.stack([x[i] @ (start * masks[i % 3].unpack()).t() for i in range(6)])
    torch.testing.assert_close(y, want)


def test_refusals():
    with pytest.raises(ValueError, match="scope is 'row'"):
        LotteryTicket(network(), scope="row")
    with pytest.raises(ValueError, match=r"rewind_state has no 0.weight of shape \(48, 20\)"):
        LotteryTicket(network(), rewind_state={"0.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="0 is in 4 bits"):
        LotteryTicket(nn.Sequential(NF4Linear(64, 32)))
    ticket = LotteryTicket(network())
    with pytest.raises(ValueError, match="rate is 2"):
        ticket.prune(2)
    with pytest.raises(ValueError, match="rounds is -1"):
        ticket.iterate(train, -1, 0.1)
