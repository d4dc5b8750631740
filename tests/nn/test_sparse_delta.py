"""`SparseDeltaLinear`: training, merging bit for bit, state, other places while training, the gate of diff pruning."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_kernels import NF4Linear, SparseDeltaLinear
from peft_kernels.formats.sparse_delta import sparse_delta
from peft_kernels.optim import SparseAdamW


def linear(k: int = 40, n: int = 30, dtype=torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def trained(layer: SparseDeltaLinear, steps: int = 3) -> SparseDeltaLinear:
    x, target = torch.randn(16, layer.in_features), torch.randn(16, layer.out_features)
    optimizer = SparseAdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


X = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))


def test_training_changes_the_chosen_weights_only():
    base = linear()
    layer = SparseDeltaLinear.from_linear(base, density=0.05)
    assert torch.equal(layer(X), base(X))
    assert layer.weight is base.weight
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["values"]
    trained(layer)
    dense = layer.to_linear()
    changed = (dense.weight != base.weight).flatten().nonzero().squeeze(1)
    assert torch.equal(changed, layer.indices.long())
    torch.testing.assert_close(layer(X), dense(X), rtol=1e-5, atol=1e-5)
    assert "places=60, density=0.05, sparsity=0.95" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_exact_and_unmerge_restores(dtype):
    layer = SparseDeltaLinear.from_linear(linear(dtype=dtype), density=0.1)
    assert layer.values.dtype == torch.float32
    layer.values.data.normal_()
    before, x = layer.weight.detach().clone(), X.to(dtype)
    y, merged = layer(x), layer.to_linear()
    layer.merge()
    layer.merge()
    assert layer.merged
    assert torch.equal(layer.weight, merged.weight)
    torch.testing.assert_close(layer(x), y, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    assert torch.equal(layer.state_dict()["weight"], before)
    other = SparseDeltaLinear(40, 30, density=0.1, dtype=dtype)
    other.merge()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, merged.weight)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    layer.values.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert torch.equal(layer.weight, before)


def test_over_4_bits():
    base = NF4Linear.from_linear(linear(64, 32))
    layer = trained(SparseDeltaLinear.from_linear(base, density=0.1))
    x = torch.randn(5, 64)
    assert not torch.equal(layer(x), base(x))
    torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-4, atol=1e-4)
    again = SparseDeltaLinear.from_linear(NF4Linear(64, 32), density=0.1)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    with pytest.raises(ValueError, match="4 bits"):
        layer.merge()


def test_copies_casts_and_pickles():
    layer = trained(SparseDeltaLinear.from_linear(linear(), density=0.05))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(X), layer(X))
        assert twin.positions.flat is twin.indices
        twin.values.data.zero_()
        assert not torch.equal(twin(X), layer(X))
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.indices.dtype == torch.int32
    assert half.values.dtype == half(X.bfloat16()).dtype == torch.bfloat16


def test_places_that_do_not_fit_are_not_loaded():
    layer, other = (SparseDeltaLinear(8, 4, indices=torch.tensor(flat)) for flat in ([1, 9, 20], [0, 2, 3]))
    state = other.state_dict()
    layer.load_state_dict(state)
    assert layer.positions.flat.tolist() == [0, 2, 3]
    assert layer.positions.order.tolist() == other.positions.order.tolist()
    before = layer.values.detach().clone()
    for bad in ([0, 0, 1], [0, 1, 32], [2, 1, 0]):
        state["indices"] = torch.tensor(bad, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="indices: positions"):
            layer.load_state_dict({**state, "values": torch.ones(3)})
        assert torch.equal(layer.values, before)


@pytest.mark.parametrize("made", ["in a context", "by argument", "by indices", "from a linear", "moved"])
@pytest.mark.parametrize("assign", [False, True])
def test_through_the_meta_device(made, assign):
    """How many places there are is known there, which ones when a state is loaded."""
    source, x = trained(SparseDeltaLinear.from_linear(linear(), density=0.3)), torch.randn(3, 40)
    if made == "in a context":
        # Said twice: a context does not reach the torch.empty that tests poison, but it does the random numbers.
        with torch.device("meta"):
            layer = SparseDeltaLinear(40, 30, density=0.3, device="meta")
    elif made == "moved":
        layer = copy.deepcopy(source).to("meta")
    elif made == "from a linear":
        layer = SparseDeltaLinear.from_linear(nn.Linear(40, 30, device="meta"), density=0.3)
    else:
        choice = {"indices": source.indices} if made == "by indices" else {"density": 0.3}
        layer = SparseDeltaLinear(40, 30, device="meta", **choice)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert "places=360" in repr(layer)
    assert layer(x.to("meta")).shape == (3, 30)
    if not assign:
        with pytest.raises(RuntimeError, match="indices is on the meta device; expected assign=True, or to_empty"):
            layer.load_state_dict(source.state_dict())
        layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(layer(x), source(x))
    assert [p.requires_grad for p in layer.parameters()] == [p.requires_grad for p in source.parameters()]
    before = layer(x)
    trained(layer)
    assert not torch.equal(layer(x), before)


def test_places_that_the_meta_device_cannot_choose():
    on_meta = nn.Linear(40, 30, device="meta")
    with pytest.raises(ValueError, match="weight is on the meta device, where no weights are the largest"):
        SparseDeltaLinear.from_linear(on_meta, density=0.3, selection="magnitude")
    with pytest.raises(ValueError, match="indices is on the meta device; expected places on the CPU"):
        SparseDeltaLinear.from_linear(on_meta, indices=torch.arange(4, device="meta"))


def test_dropping_and_growing_places():
    """What stays keeps value and optimiser state, so that the layer computes the same without the dropped ones."""
    layer = SparseDeltaLinear.from_linear(linear(), density=0.05)
    optimizer = SparseAdamW([layer.values], lr=0.1)
    layer(X).square().sum().backward()
    optimizer.step()
    old, state = layer.values, optimizer.state[layer.values]["exp_avg"].clone()
    dense = layer.delta.dense()
    kept = layer.indices[10:].long()
    fresh = torch.tensor([i for i in range(1200) if i not in set(layer.indices.tolist())][:5])
    optimizer.remap(old, layer.values, layer.positions, layer.positions)
    pair = layer.set_positions(torch.cat((fresh, kept)))
    optimizer.remap(old, layer.values, *pair)
    assert layer.values.numel() == 55
    expected = torch.zeros_like(dense).flatten().index_copy(0, kept, dense.flatten()[kept]).view_as(dense)
    assert torch.equal(layer.delta.dense(), expected)
    where = torch.isin(layer.indices.long(), kept)
    assert torch.equal(optimizer.state[layer.values]["exp_avg"][where], state[10:])
    layer(X).square().sum().backward()
    optimizer.step()
    assert (layer.values != 0).all()


def test_a_delta_taken_over():
    layer = SparseDeltaLinear.from_linear(linear(), density=0.05)
    delta = sparse_delta(torch.tensor([900, 3]), torch.tensor([1.0, 2.0]), (30, 40))
    layer.set_delta(delta)
    assert torch.equal(layer.to_linear().weight, linear().weight + delta.dense())
    with pytest.raises(ValueError, match="indices has shape"):
        layer.set_delta(sparse_delta(torch.tensor([3]), torch.ones(1), (40, 30)))


def test_choices():
    base = linear()
    seeded = [
        SparseDeltaLinear.from_linear(base, density=d, generator=torch.Generator().manual_seed(3))
        for d in (0.1, 0.1, 0.7)
    ]
    assert torch.equal(seeded[0].indices, seeded[1].indices)
    assert [layer.values.numel() for layer in seeded] == [120, 120, 840]
    largest = base.weight.abs().flatten().topk(12).indices.sort().values
    assert torch.equal(SparseDeltaLinear.from_linear(base, density=0.01, selection="magnitude").indices.long(), largest)
    scores = torch.zeros(30, 40)
    scores[4, 5] = scores[20, 1] = 1.0
    assert SparseDeltaLinear.from_linear(base, density=2 / 1200, scores=scores).indices.tolist() == [165, 801]
    for options, message in (
        ({}, "either indices or density"),
        ({"density": 0.1, "selection": "best"}, "selection is 'best'"),
        ({"density": 0.1, "scores": scores.t()}, "scores has shape"),
        ({"density": 0.1, "scores": scores.clone().fill_(float("nan"))}, "NaN"),
        ({"density": 0.1, "gate": "soft"}, "gate is 'soft'"),
        ({"indices": torch.tensor([5, 5])}, "more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseDeltaLinear.from_linear(base, **options)
    with pytest.raises(TypeError, match="expected exactly torch"):
        SparseDeltaLinear.from_linear(nn.Conv1d(1, 1, 1), density=0.1)


def test_the_gate_is_that_of_louizos_et_al():
    """Drawn from torch's generator in training, fixed in evaluation; gradients against autograd of the formula."""
    layer = SparseDeltaLinear.from_linear(linear(), density=0.1, gate="hard_concrete", gate_init=0.3)
    layer.values.data.normal_()
    torch.manual_seed(5)
    y = layer(X)
    grads = torch.autograd.grad(y.square().sum(), (layer.values, layer.log_alpha))
    torch.manual_seed(5)
    u = torch.rand(120)
    values, log_alpha = layer.values.detach().requires_grad_(), layer.log_alpha.detach().requires_grad_()
    z = (torch.sigmoid((torch.logit(u) + log_alpha) / (2 / 3)) * 1.2 - 0.1).clamp(0, 1)
    assert 0 < (z == 0).sum() + (z == 1).sum() < 120
    dense = torch.zeros(1200).index_copy(0, layer.indices.long(), values * z).view(30, 40)
    expected = nn.functional.linear(X, layer.weight + dense, layer.bias)
    torch.testing.assert_close(y, expected)
    wanted = torch.autograd.grad(expected.square().sum(), (values, log_alpha))
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer(X), y)
    layer.eval()
    assert torch.equal(layer(X), layer(X))
    # How often a gate is not 0, of many draws: the penalty's estimate.
    u = torch.rand(200_000)
    open_ = (torch.sigmoid((torch.logit(u) + 0.3) / (2 / 3)) * 1.2 - 0.1) > 0
    assert abs(float(layer.l0_penalty().detach()) / 120 - float(open_.float().mean())) < 5e-3


def test_pruning_the_gate():
    layer = SparseDeltaLinear.from_linear(linear(), density=0.1, gate="hard_concrete")
    layer.values.data.normal_()
    layer.log_alpha.data.copy_(torch.linspace(-6, 6, 120))
    layer.eval()
    y = layer(X)
    with pytest.raises(ValueError, match="has a gate"):
        layer.set_positions(torch.tensor([1]))
    assert "gate='hard_concrete'" in repr(layer)
    layer.prune_gate()
    assert 40 < layer.values.numel() < 100
    assert layer.log_alpha is None
    assert torch.equal(layer.train()(X), y)
    with pytest.raises(ValueError, match="no gate"):
        layer.l0_penalty()


def test_penalty_closes_gates_that_do_not_help():
    """Diff pruning in small: only the chosen weights of one row of W have anything to learn."""
    torch.manual_seed(0)
    base = linear(20, 2, bias=False)
    layer = SparseDeltaLinear.from_linear(base, density=1.0, gate="hard_concrete", gate_init=2.0)
    x, target = torch.randn(64, 20), torch.zeros(2, 20)
    target[0, :5] = 2.0
    goal = x @ (base.weight.detach() + target).t()
    optimizer = SparseAdamW([{"params": [layer.values], "lr": 0.05}, {"params": [layer.log_alpha], "lr": 0.1}])
    for _ in range(300):
        ((layer(x) - goal).square().mean() + 0.02 * layer.l0_penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.prune_gate()
    assert set(range(5)) <= set(layer.indices.tolist())
    assert layer.values.numel() < 15
