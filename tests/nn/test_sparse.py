"""`SparseLinear`: made from a layer, moved, copied, saved, loaded, trained."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_kernels.formats import sparse
from peft_kernels.formats.mask import pack
from peft_kernels.nn import NF4Linear, SparseLinear
from tests.problems.sparse import drawn_blocks, drawn_mask, two_of_four

N, K = 70, 52
LAYOUTS = ("bitmap", "csr", "2:4", "block", "nf4")


def pruned(layout: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, SparseLinear]:
    """A layer whose weight holds zeros, and what is made of it."""
    torch.manual_seed(seed)
    linear = nn.Linear(K, N, dtype=dtype)
    kept = {
        "2:4": two_of_four(N, K, seed),
        "block": drawn_blocks(N, K, 32, 0.7, 5),
    }.get(layout, drawn_mask(N, K, 0.4, seed))
    with torch.no_grad():
        linear.weight.mul_(kept)
    source = NF4Linear.from_linear(linear) if layout == "nf4" else linear
    return source, SparseLinear.from_linear(source, "bitmap" if layout == "nf4" else layout, block=32)


def x(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_computes_what_the_layer_did(layout):
    source, layer = pruned(layout)
    torch.testing.assert_close(layer(x()), source(x()), rtol=1e-5, atol=1e-5)
    assert layer.bias is source.bias
    dense = layer.to_linear()
    assert torch.equal(dense.weight, layer.weight.dense())
    torch.testing.assert_close(dense(x()), source(x()), rtol=1e-5, atol=1e-5)
    assert layer.sparsity == pytest.approx(1 - layer.weight.density)
    assert not any(p.requires_grad for name, p in layer.named_parameters() if name != "bias")


def test_repr():
    assert repr(pruned("block")[1]) == (
        "SparseLinear(in_features=52, out_features=70, bias=True, layout='block', block=32, sparsity=66.7%)"
    )
    assert "layout='2:4', sparsity=50.0%" in repr(pruned("2:4")[1])
    _, layer = pruned("nf4")
    assert f"layout='nf4+bitmap', sparsity={1 - layer.weight.density:.1%}" in repr(layer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_replaces_another_weight(layout):
    """Also one with other places kept, hence of other sizes; strictly, and from tensors alone."""
    _, layer = pruned(layout, 1)
    _, other = pruned(layout, 2)
    state = layer.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert not torch.equal(other(x()), layer(x()))
    assert other.load_state_dict(state).missing_keys == []
    expected = layer(x())
    assert torch.equal(other(x()), expected)
    state["structure.0"].zero_()
    assert torch.equal(other(x()), expected)  # nothing is shared with the checkpoint


def test_state_dict_refuses_what_does_not_fit():
    _, layer = pruned("block")
    before = layer(x())
    other = SparseLinear.from_linear(nn.Linear(K, N + 1), "block")
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="is of layout 'bitmap' in the checkpoint, 'block' here"):
        layer.load_state_dict(pruned("bitmap")[1].state_dict())
    broken = layer.state_dict()
    broken["structure.0"] = broken["structure.0"] + 50
    with pytest.raises(RuntimeError, match="expected ones in"):
        layer.load_state_dict(broken)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": layer.bias.detach()})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**layer.state_dict(), "more": torch.zeros(1)})
    assert torch.equal(layer(x()), before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_pickles_and_casts(layout):
    _, layer = pruned(layout)
    expected = layer(x())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x()), expected)
        assert twin.weight.tensors[0].data_ptr() != layer.weight.tensors[0].data_ptr()
    twin = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(twin.weight.dense(torch.bfloat16), layer.weight.dense(torch.bfloat16))
    assert twin(x(torch.bfloat16)).dtype == torch.bfloat16
    assert copy.deepcopy(layer).to("meta").weight.device.type == "meta"
    wide = copy.deepcopy(layer).double()
    assert torch.equal(wide.weight.dense(torch.float32), layer.weight.dense(torch.float32))


def test_kept_blocks_train_and_empty_ones_stay_empty():
    """SGD with momentum and weight decay takes the steps that it takes on the dense weight inside the blocks."""
    linear, _ = pruned("block")
    layer = SparseLinear.from_linear(linear, "block", block=32, trainable=True)
    assert "trainable" in repr(layer)
    kept = linear.weight != 0
    weight = nn.Parameter(linear.weight.detach().double().clone())
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    ours, theirs = torch.optim.SGD([layer.values], **options), torch.optim.SGD([weight], **options)
    for _ in range(3):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        layer(x()).square().sum().backward()
        nn.functional.linear(x().double(), weight * kept, linear.bias.detach().double()).square().sum().backward()
        for optimizer in (ours, theirs):
            optimizer.step()
    torch.testing.assert_close(layer.weight.dense().double(), weight.detach(), rtol=1e-4, atol=1e-5)
    assert (layer.weight.dense()[~kept] == 0).all()


def test_options_belong_to_layouts():
    linear, _ = pruned("bitmap")
    with pytest.raises(ValueError, match="trainable is for layout 'block'"):
        SparseLinear.from_linear(linear, "bitmap", trainable=True)
    with pytest.raises(ValueError, match="semi_structured is for layout '2:4'"):
        SparseLinear.from_linear(linear, "block", semi_structured=True)
    with pytest.raises(TypeError, match=r"expected exactly torch\.nn\.Linear"):
        SparseLinear.from_linear(nn.Conv1d(3, 4, 1))
    with pytest.raises(TypeError, match="weight is Parameter"):
        SparseLinear(linear.weight)


def test_semi_structured_falls_back_without_a_gpu():
    linear, layer = pruned("2:4")
    asked = SparseLinear.from_linear(linear, "2:4", semi_structured=True)
    assert torch.equal(asked(x()), layer(x()))


def test_a_mask_and_a_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D(N, K)
    kept = drawn_mask(N, K, 0.5, 3)
    layer = SparseLinear.from_linear(conv1d, "bitmap", mask=pack(kept))
    expected = nn.functional.linear(x(), conv1d.weight.t() * kept, conv1d.bias)
    torch.testing.assert_close(layer(x()), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(layer.weight, sparse.BitmapWeight)
