"""Movement pruning: gradients of weights and scores against autograd's through a mask that counts as its scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels import MaskedLinear, NF4Linear
from peft_kernels.kernels import _masked
from peft_kernels.pruning import (
    MovementLinear,
    add_movement,
    finalize_movement,
    keep_largest,
    score_parameters,
    set_sparsity,
)
from tests.allocations import peak_bytes


@pytest.fixture(autouse=True)
def _small_strips(monkeypatch):
    """Gradients of several strips and a rest."""
    monkeypatch.setattr(_masked, "CPU_SCRATCH_BYTES", 64 * 41 * 4)


class StraightThrough(torch.autograd.Function):
    """The mask of the largest scores, whose gradient goes to the scores as it is."""

    @staticmethod
    def forward(ctx, scores, k):
        mask = torch.zeros_like(scores).flatten()
        mask[scores.flatten().topk(k).indices] = 1
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def layer_and_twin(dtype, bias=True, sparsity=0.6):
    layer = MovementLinear.from_linear(nn.Linear(41, 150, bias=bias, dtype=dtype), sparsity=sparsity)
    nn.init.normal_(layer.scores)
    return layer, {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False), (torch.float64, True)])
def test_gradients(dtype, bias):
    layer, twin = layer_and_twin(dtype, bias)
    x = torch.randn(3, 7, 41, dtype=dtype, requires_grad=True)
    grad = torch.randn(150, 3, 7, dtype=dtype).permute(1, 2, 0)
    y = layer(x)
    y.backward(grad)
    truth = x.detach().double().requires_grad_()
    mask = StraightThrough.apply(twin["scores"], 6150 - round(0.6 * 6150))
    F.linear(truth, twin["weight"] * mask, twin.get("bias")).backward(grad.double())
    assert layer.scores.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(x.grad.double(), truth.grad, **tolerance)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), twin[name].grad, **tolerance)
    outside = ~layer.mask.unpack()
    assert not layer.weight.grad[outside].any()
    assert layer.scores.grad[outside].count_nonzero() == outside.sum()
    if dtype == torch.bfloat16:  # dS is a product of sums in float32
        product = grad.flatten(0, 1).t().double() @ truth.detach().flatten(0, 1)
        want = product * layer.weight.double()
        assert (layer.scores.grad - want).abs().max() < 1e-4 * want.abs().max()


def test_each_subset_of_gradients():
    layer, _ = layer_and_twin(torch.float32)
    x = torch.randn(5, 41, requires_grad=True)
    layer(x).square().sum().backward()
    whole = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    for wanted in whole:
        for name, p in (("x", x), *layer.named_parameters()):
            p.grad = None
            p.requires_grad_(name == wanted)
        layer(x).square().sum().backward()
        got = {name: p.grad for name, p in (("x", x), *layer.named_parameters()) if p.grad is not None}
        assert list(got) == [wanted]
        assert torch.equal(got[wanted], whole[wanted])


def test_the_mask_follows_scores_and_sparsity():
    layer, _ = layer_and_twin(torch.float32)
    first = layer.mask
    assert layer.mask is first
    layer.sparsity = 0.9
    assert int(layer.mask.kept()) == 615
    with torch.no_grad():
        layer.scores.neg_()
    assert torch.equal(layer.mask.unpack(), keep_largest(layer.scores.detach(), 615).unpack())
    layer.scores.data.neg_()  # leaves no trace
    layer.eval()
    assert torch.equal(layer.mask.unpack(), keep_largest(layer.scores.detach(), 615).unpack())
    x = torch.randn(2, 41)
    want = F.linear(x, layer.weight * layer.mask.unpack(), layer.bias)
    torch.testing.assert_close(layer(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)


def test_soft():
    layer = MovementLinear.from_linear(nn.Linear(41, 150), threshold=-0.5)
    assert int(layer.mask.kept()) == 6150
    nn.init.normal_(layer.scores)
    assert torch.equal(layer.mask.unpack(), layer.scores > -0.5)
    layer.penalty().backward()
    gate = layer.scores.detach().sigmoid()
    torch.testing.assert_close(layer.scores.grad, gate * (1 - gate) / 6150)


def test_nothing_of_the_size_of_the_weight_but_the_gradients():
    layer = MovementLinear.from_linear(nn.Linear(512, 768), sparsity=0.5)
    nn.init.normal_(layer.scores)
    x = torch.randn(4, 512)
    layer(x).sum().backward()
    layer.weight.grad = layer.scores.grad = None
    peak = peak_bytes(lambda: layer(x).sum().backward())
    assert peak < 2.3 * layer.weight.nbytes  # the gradients of weight and scores, and a strip


def test_training_a_model():
    """Weights that grow stay and those that shrink go, though these are the larger ones at first."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Identity())
    nn.init.uniform_(model[0].weight, -0.1, 0.1)
    with torch.no_grad():
        model[0].weight[:, 2:] += 0.5
    assert set(add_movement(model)) == {"0"}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, truth = torch.randn(64, 16), torch.randn(2, 8).sign()
    losses = []
    for step in range(60):
        set_sparsity(model, min(0.8, step / 50))
        loss = F.mse_loss(model(x), x[:, :2] @ truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert losses[-1] < 0.5 * losses[0]
    assert model[0].mask.unpack()[:, :2].float().mean() > 0.9
    before = model(x)
    masks = finalize_movement(model)
    assert type(model[0]) is MaskedLinear
    assert int(masks["0"].kept()) == 128 - round(0.8 * 128)
    assert not model[0].weight[~masks["0"].unpack()].any()
    torch.testing.assert_close(model(x), before)
    assert not score_parameters(model)


def test_refusals():
    with pytest.raises(TypeError, match=r"add_movement: 0: MovementLinear\.from_linear: got .*NF4Linear"):
        add_movement(nn.Sequential(NF4Linear(64, 32)))
    with pytest.raises(ValueError, match="sparsity is 2"):
        set_sparsity(nn.Linear(2, 2), 2)
    hooked = nn.Sequential(nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="add_movement: 0 has hooks"):
        add_movement(hooked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_that_start_at_magnitudes(dtype):
    """The first mask is magnitude pruning's, layers of any scale have scores of one size, gradients are the same."""
    linear = nn.Linear(41, 150, dtype=dtype)
    with torch.no_grad():
        linear.weight *= 1e-5
        linear.weight[0, :4] = torch.tensor([0.0, -0.0, 1e-9, -1e-9])
    layer = MovementLinear.from_linear(linear, sparsity=0.6, scores="magnitude")
    assert layer.mask.equal(keep_largest(linear.weight.detach().abs(), 6150 - round(0.6 * 6150)))
    assert not layer.mask.equal(MovementLinear.from_linear(linear, sparsity=0.6).mask)
    assert layer.scores.dtype == torch.promote_types(dtype, torch.float32)
    assert 0.4 < layer.scores.square().mean().sqrt() <= 1.01
    # No two weights have one score, not even those that lie next to each other.
    assert len(layer.scores.unique()) == len(linear.weight.detach().abs().unique())

    twin = MovementLinear.from_linear(linear, sparsity=0.6)
    twin._new_mask = lambda: layer.mask
    x, grads = torch.randn(3, 41, dtype=dtype), []
    for either in (layer, twin):
        loss = either(x).square().sum()
        grads.append(torch.autograd.grad(loss, (either.weight, either.bias, either.scores)))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert all(grad.any() for grad in grads[0])


def test_scores_of_a_weight_without_a_scale():
    for weight, sizes in ((torch.zeros(3, 4), [0.0]), (torch.tensor([[1.0, -float("inf")]]), [1.0, float("inf")])):
        layer = MovementLinear(nn.Parameter(weight), None, scores="magnitude")
        assert layer.scores.unique().tolist() == sizes
    with pytest.raises(ValueError, match="scores is 'ones'; expected one of zeros, magnitude"):
        add_movement(nn.Sequential(nn.Linear(4, 3)), scores="ones")


def test_compiled(monkeypatch):
    """As one graph: forward, backward, and a mask that follows the scores."""
    monkeypatch.undo()  # Dynamo knows PyTorch's own allocations, not those that poison
    layer = MovementLinear.from_linear(nn.Linear(41, 30), sparsity=0.6, scores="magnitude")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 41, requires_grad=True)
    for change in (lambda: None, lambda: nn.init.normal_(layer.scores)):
        change()
        wanted = [x, *layer.parameters()]
        expected, got = ((y, *torch.autograd.grad(y, wanted, torch.ones_like(y))) for y in (layer(x), compiled(x)))
        assert all(torch.equal(*pair) for pair in zip(expected, got, strict=True))
