"""Masks by magnitude, N:M, blocks and Wanda: what they keep, how much, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_kernels import NF4Linear
from peft_kernels.formats import mask as mask_format
from peft_kernels.pruning import (
    InputNorms,
    block_scores,
    keep_n_of_m,
    keep_transposable_2_of_4,
    magnitude_masks,
    wanda_masks,
    whole_blocks,
)

NAN = float("nan")


def network() -> nn.Sequential:
    """Two layers, the second with weights ten times those of the first: global and layerwise differ."""
    net = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 33))
    with torch.no_grad():
        net[2].weight.mul_(10)
    return net


def counts(masks) -> list[int]:
    return [int(mask.kept()) for mask in masks.values()]


def test_scopes():
    net = network()
    first, second = net[0].weight.abs(), net[2].weight.abs()
    everything = torch.cat([first.flatten(), second.flatten()])
    kept = 1752 - round(0.7 * 1752)
    masks = magnitude_masks(net, 0.7)
    assert list(masks) == ["0", "2"]
    assert sum(counts(masks)) == kept
    edge = everything.topk(kept).values[-1]
    assert torch.equal(masks["0"].unpack(), first >= edge)
    assert torch.equal(masks["2"].unpack(), second >= edge)
    layers = magnitude_masks(net, 0.7, "layer")
    assert counts(layers) == [960 - 672, 792 - round(0.7 * 792)]
    assert first[layers["0"].unpack()].min() > first[~layers["0"].unpack()].max()
    rows = magnitude_masks(net, 0.7, "row")["2"].unpack()
    assert (rows.sum(1) == 24 - 17).all()
    assert all(w[m].min() > w[~m].max() for w, m in zip(second, rows, strict=True))
    for sparsity, left in ((0, [960, 792]), (1, [0, 0]), (1.0, [0, 0])):
        assert counts(magnitude_masks(net, sparsity)) == left


def test_what_is_pruned_stays_so():
    """Also where a kept weight is exactly 0, as the pruned ones are."""
    weight = torch.zeros(4, 8)
    weight[3, 5:] = torch.tensor([0.0, 1.0, 2.0])
    before = mask_format.pack(torch.arange(32).view(4, 8) >= 24)
    masks = magnitude_masks({"w": weight}, 1 - 6 / 32, within={"w": before})
    assert counts(masks) == [6]
    assert not (masks["w"] - before).words.any()
    blocks = magnitude_masks({"w": weight}, 0.5, block=(2, 4), within={"w": before})
    assert torch.equal(blocks["w"].unpack(), before.unpack())


def test_which_layers_are_pruned():
    net = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "b": nn.Linear(8, 4), "tied": nn.Linear(8, 50), "e": nn.Embedding(50, 8)}
    )
    net["tied"].weight = net["e"].weight
    net["q"] = NF4Linear(64, 32)
    assert list(magnitude_masks(net, 0.5)) == ["a", "b", "q"]
    assert list(magnitude_masks(net, 0.5, targets=["b"])) == ["b"]
    dense = net["q"].dequantize(torch.float32).abs()
    kept = magnitude_masks(net, 0.5, "layer", targets=["q"])["q"].unpack()
    assert int(kept.sum()) == 1024
    assert dense[kept].min() >= dense[~kept].max()
    net.get_output_embeddings = lambda: net["b"]  # as models of transformers do
    assert list(magnitude_masks(net, 0.5)) == ["a", "q"]
    with pytest.raises(ValueError, match="no linear layer named tied, nothing to prune"):
        magnitude_masks(net, 0.5, targets=["a", "tied", "nothing"])
    with pytest.raises(TypeError, match="expected a list of names"):
        magnitude_masks(net, 0.5, targets="a")


def test_conv1d_of_transformers():
    conv1d = pytest.importorskip("transformers", reason="needs transformers").pytorch_utils.Conv1D(12, 20)
    mask = magnitude_masks(nn.Sequential(conv1d), 0.5, "row")["0"].unpack()
    assert mask.shape == (12, 20)
    assert (mask.sum(1) == 10).all()
    weight = conv1d.weight.t().abs()
    assert all(w[m].min() > w[~m].max() for w, m in zip(weight, mask, strict=True))


def test_scores_that_are_not_finite():
    net = network()
    with torch.no_grad():
        net[0].weight[0, :3] = torch.tensor([NAN, float("inf"), -float("inf")])
    mask = magnitude_masks(net, 0.99)["0"].unpack()
    assert mask[0, :3].tolist() == [False, True, True]
    with pytest.raises(ValueError, match="magnitude_masks: scores of 0 are not finite"):
        magnitude_masks(net, 0.5, check=True)
    with pytest.raises(ValueError, match="wanda_masks: scores of 0 are not finite"):
        wanda_masks(net, [torch.ones(2, 40)], 0.5, check=True, targets=["0"])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (0, 3), (3, 3)])
def test_n_of_m(n, m):
    scores = torch.randn(37, 12 * m)
    scores[:, ::5] = scores[:, 1:2]  # ties
    scores[0, :m] = NAN
    kept = keep_n_of_m(scores, n, m).unpack().view(37, 12, m)
    assert not kept[0, 0].any()
    order = scores.view(37, 12, m).sort(dim=2, descending=True, stable=True).indices
    want = torch.zeros_like(kept).scatter_(2, order[..., :n], True)
    assert torch.equal(kept.flatten(0, 1)[1:], want.flatten(0, 1)[1:])


def test_a_last_group_that_is_short():
    kept = keep_n_of_m(torch.tensor([[4.0, 3, 2, 1, 9, 1, 8], [1, 2, 3, 4, -1, -2, -3]]), 2, 4).unpack()
    assert kept.int().tolist() == [[1, 1, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1, 0]]
    assert counts(magnitude_masks(network(), n_of_m=(2, 4))) == [480, 396]


def test_transposable():
    scores = torch.randn(200, 24).abs()
    kept = keep_transposable_2_of_4(scores).unpack().view(50, 4, 6, 4)
    assert (kept.sum(3) == 2).all()
    assert (kept.sum(1) == 2).all()
    ways = (torch.arange(2**16).unsqueeze(1) >> torch.arange(16) & 1).view(-1, 4, 4)
    ways = ways[((ways.sum(1) == 2) & (ways.sum(2) == 2)).all(1)].flatten(1)
    blocks = scores.view(50, 4, 6, 4).transpose(1, 2).reshape(300, 16).double()
    best = (blocks @ ways.double().t()).amax(1)
    torch.testing.assert_close((blocks * kept.transpose(1, 2).reshape(300, 16)).sum(1), best)
    kept = keep_transposable_2_of_4(torch.full((4, 4), NAN)).unpack()
    assert (kept.sum(0) == 2).all()
    assert (kept.sum(1) == 2).all()
    with pytest.raises(ValueError, match="multiples of 4"):
        keep_transposable_2_of_4(torch.ones(4, 6))


def test_blocks():
    scores = torch.randn(70, 100)
    means = block_scores(scores, (32, 16))
    assert means.shape == (3, 7)
    torch.testing.assert_close(means[1, 2], scores[32:64, 32:48].mean())
    torch.testing.assert_close(means[2, 6], scores[64:, 96:].mean())
    mask = magnitude_masks({"w": scores}, 0.5, block=(32, 16))["w"]
    kept = means.new_zeros(21, dtype=torch.bool)
    kept[block_scores(scores.abs(), (32, 16)).flatten().topk(21 - round(0.5 * 21)).indices] = True
    want = kept.view(3, 7).repeat_interleave(32, 0).repeat_interleave(16, 1)[:70, :100]
    assert torch.equal(mask.unpack(), want)
    assert torch.equal(whole_blocks(mask_format.pack(kept.view(3, 7)), (32, 16), (70, 100)).unpack(), want)
    with pytest.raises(ValueError, match=r"expected \(3, 7\)"):
        whole_blocks(mask_format.full(3, 6), (32, 16), (70, 100))


def test_wanda():
    net = network().train()
    batches = [torch.randn(6, 5, 40) * torch.linspace(0.01, 10, 40), {"input": torch.randn(3, 40)}, (torch.randn(40),)]
    masks = wanda_masks(net, batches, 0.6)
    assert net.training
    assert net[0].training
    x = torch.cat([b.reshape(-1, 40) for b in (batches[0], batches[1]["input"], batches[2][0])]).double()
    inputs = {"0": x, "2": net.double()[:2](x)}
    for name, rows in inputs.items():
        scores = net.get_submodule(name).weight.abs() * rows.norm(dim=0)
        kept = masks[name].unpack()
        assert (kept.sum(1) == kept.shape[1] - round(0.6 * kept.shape[1])).all()
        assert all(s[m].min() > s[~m].max() for s, m in zip(scores, kept, strict=True))
    groups = wanda_masks(net.float(), batches, n_of_m=(2, 4))["0"].unpack()
    scores = (net[0].weight.abs() * x.norm(dim=0)).float()
    assert torch.equal(groups, keep_n_of_m(scores, 2, 4).unpack())


def test_norms_of_inputs():
    net = network()
    with InputNorms(net, ["0"]) as inputs:
        net(torch.full((2, 40), 3.0).bfloat16().float())
        net(torch.full((40,), 4.0))
    net(torch.full((1, 40), 100.0))  # no more
    torch.testing.assert_close(inputs.norms()["0"], torch.full((40,), 34.0).sqrt())
    with pytest.raises(ValueError, match="InputNorms: 2 had no input"):
        wanda_masks(net, [], 0.5, targets=["2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "sparsity is 1.5"),
        ({"sparsity": None}, "sparsity is NoneType"),
        ({"sparsity": 0.5, "scope": "column"}, "scope is 'column'"),
        ({"sparsity": 0.5, "n_of_m": (2, 4)}, "expected neither sparsity nor block"),
        ({"n_of_m": (5, 4)}, "5 of 4"),
        ({"n_of_m": 2}, "n_of_m is 2"),
        ({"sparsity": 0.5, "block": (0, 4)}, r"block is \(0, 4\)"),
        ({"sparsity": 0.5, "block": (4, 4), "scope": "row"}, "a block has several rows"),
    ],
)
def test_refusals(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        magnitude_masks(network(), **options)
