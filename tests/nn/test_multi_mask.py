"""`MultiMaskLinear`: each row is its own subnetwork's layer; whole models; what is saved, shared and refused."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import MaskedLinear, MultiMaskLinear, attach_masks, detach_masks
from peft_kernels.formats.mask import pack, stack
from peft_kernels.nn import Subnetworks
from peft_kernels.pruning import magnitude_masks
from tests.helpers import relative_error
from tests.problems.masked import drawn_mask

N, K = 10, 37
KEPT = [drawn_mask(N, K, density, seed=seed) for seed, density in enumerate((0.5, 0.2, 0.8))]
MASKS = [pack(kept) for kept in KEPT]
IDS = torch.tensor([2, 0, -1, 1, 0])


def made(bias: bool = True) -> MultiMaskLinear:
    torch.manual_seed(3)
    return MultiMaskLinear.from_linear(nn.Linear(K, N, bias=bias), MASKS)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(2))


def model() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(K, 24), nn.Tanh(), nn.Linear(24, N))


@pytest.mark.parametrize("bias", [True, False])
def test_each_row_is_its_subnetwork_alone_and_trains_inside_of_it(bias):
    layer, x = made(bias), x_of(5, 3).requires_grad_()
    grad_y = torch.randn(5, 3, N)
    y = layer(x, IDS)
    grads = torch.autograd.grad(y, [x, *layer.parameters()], grad_y)
    weight, shared = layer.weight.detach().requires_grad_(), layer.bias
    rows = [F.linear(x[i], weight if m < 0 else weight * KEPT[m], shared) for i, m in enumerate(IDS.tolist())]
    expected = torch.autograd.grad(torch.stack(rows), [x, weight, *([shared] if bias else [])], grad_y)
    assert relative_error(y.detach(), torch.stack(rows).detach()) < 1e-6
    for got, wanted in zip(grads, expected, strict=True):
        assert relative_error(got, wanted) < 1e-6
    for number, kept in enumerate(KEPT):
        alone = layer.subnetwork(number)
        assert type(alone) is MaskedLinear
        assert not alone.weight[~kept].any()
        torch.testing.assert_close(alone(x), layer(x, torch.full((5,), number)), rtol=1e-5, atol=1e-6)


def test_what_is_shared_and_what_comes_back():
    linear = nn.Linear(K, N).eval()
    layer = MultiMaskLinear.from_linear(linear, stack(MASKS))
    assert layer.weight is linear.weight
    assert not layer.training
    assert layer.masks.mask(1).equal(MASKS[1])
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert (back.weight is linear.weight, back.bias is linear.bias) == (True, True)
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(N, K)
    over = MultiMaskLinear.from_linear(conv1d, MASKS)
    masked = F.linear(x_of(5), conv1d.weight.t() * KEPT[0], conv1d.bias)
    torch.testing.assert_close(over(x_of(5), torch.zeros(5, dtype=torch.int64)), masked, rtol=1e-5, atol=1e-5)
    assert over.to_linear().weight.data_ptr() == conv1d.weight.data_ptr()


def test_masks_are_saved_loaded_and_left_alone_by_casts():
    layer, other = made(), MultiMaskLinear.from_linear(nn.Linear(K, N), [MASKS[0]] * 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert other(x_of(5), IDS).equal(layer(x_of(5), IDS))
    assert f"masks=3, sparsity={1 - 0.8:.1f}" in repr(layer).replace("0.18", "0.2").replace("0.19", "0.2")
    for cast in (copy.deepcopy(layer).half(), copy.deepcopy(layer).type(torch.float64)):
        assert (cast.mask_words.dtype, cast.mask_words.equal(layer.mask_words)) == (torch.int32, True)
    for words, message in (
        (layer.mask_words[:2], r"mask_words has shape \(2, 10, 2\); expected \(3, 10, 2\)"),
        (layer.mask_words.float(), "mask_words is torch.float32; expected int32"),
        (layer.mask_words | -1, "mask_words has bits beyond column 37"),
    ):
        before = layer.mask_words.clone()
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**layer.state_dict(), "mask_words": words})
        assert layer.mask_words.equal(before)


def test_a_model_runs_a_subnetwork_for_each_sample():
    net = model()
    dense = copy.deepcopy(net)
    tickets = {"a": magnitude_masks(net, 0.6), "b": {"0": pack(drawn_mask(24, K, 0.3))}}
    subnetworks = attach_masks(net, tickets)
    assert [type(net[i]) for i in (0, 2)] == [MultiMaskLinear] * 2
    names, x = ["b", "a", "__base__", "a"], x_of(4)
    with subnetworks.use(names) as ids:
        assert ids.tolist() == [1, 0, -1, 0]
        y = net(x)
        with subnetworks.use(["a"] * 4):
            inner = net(x)
            assert not inner[0].equal(y[0])
        assert net(x).equal(y)
    for row, name in enumerate(names):
        alone = copy.deepcopy(dense)
        for layer, mask in tickets.get(name, {}).items():
            alone[int(layer)].weight.data *= mask.unpack()
        torch.testing.assert_close(y[row], alone(x[row]), rtol=1e-5, atol=1e-6)
        if name == "a":
            torch.testing.assert_close(inner[row], y[row], rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match=r"outside of subnetworks.use\(names\)"):
        net(x)
    with copy.deepcopy(net)[0].subnetworks.use(names):
        assert net(x).equal(y), "copies share it"
    again = pickle.loads(pickle.dumps(net))
    assert again[0].subnetworks is again[2].subnetworks
    with again[0].subnetworks.use(names):
        assert again(x).equal(y)
    assert detach_masks(net) == ("0", "2")
    assert net(x).equal(dense(x))


def test_another_thread_has_no_block():
    subnetworks, seen = Subnetworks(["a"]), []
    with subnetworks.use(["a"]):
        thread = threading.Thread(target=lambda: seen.append(subnetworks.active_ids))
        thread.start()
        thread.join()
        assert subnetworks.active_ids.tolist() == [0]
    assert seen == [None]


def test_compiled_in_one_graph():
    net = model()
    subnetworks = attach_masks(net, {"a": magnitude_masks(net, 0.5)})
    compiled, x = torch.compile(net, backend="aot_eager", fullgraph=True), x_of(4)
    for names in (["a", "a", "__base__", "a"], ["__base__", "a", "a", "a"]):
        with subnetworks.use(names):
            torch.testing.assert_close(compiled(x), net(x))


def test_refusals_leave_the_model_unchanged():
    net = model()
    fits = {"0": pack(drawn_mask(24, K, 0.3))}
    for subnetworks, message in (
        ({}, "no masks"),
        ({"a": {}}, "no masks"),
        ({"a": {"7": MASKS[0]}}, "no layer 7"),
        ({"__base__": fits}, "named '__base__'"),
        ({"a": {**fits, "2": MASKS[0]}}, r"attach_masks: 2: .*masks\[0\] has shape \(10, 37\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_masks(net, subnetworks)
    with pytest.raises(TypeError, match=r"attach_masks: 1: MultiMaskLinear.*Tanh"):
        attach_masks(net, {"a": {**fits, "1": MASKS[0]}})
    net[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="2 has hooks"):
        attach_masks(net, {"a": {**fits, "2": pack(drawn_mask(N, 24, 0.5))}})
    assert [type(layer) for layer in net] == [nn.Linear, nn.Tanh, nn.Linear]
    layer = made()
    with pytest.raises(ValueError, match="itself a MultiMaskLinear"):
        detach_masks(layer)
    with pytest.raises(ValueError, match="no masks"):
        MultiMaskLinear.from_linear(nn.Linear(K, N), [])
    with pytest.raises(TypeError, match="use from_linear or attach_masks"):
        MultiMaskLinear(K, N)
    with pytest.raises(ValueError, match="no subnetwork 'c'; there are a"):
        Subnetworks(["a"]).ids(["c"])
    with pytest.raises(TypeError, match="expected a sequence of names"):
        Subnetworks(["a"]).ids("a")
