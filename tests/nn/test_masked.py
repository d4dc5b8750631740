"""`MaskedLinear`: what it computes, its zeros through training, saving and loading, both layouts of what trains."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from peft_kernels import MaskedLinear, NF4Linear, replace_pruned
from peft_kernels.formats.mask import PackedMask, full, pack
from tests.helpers import relative_error
from tests.nn.quantised import COPIERS, MOVES, same_state
from tests.nn.test_nf4_linear import conv1d
from tests.problems.masked import drawn_mask

N, K = 10, 37
KEPT = drawn_mask(N, K, 0.5)
OTHER = drawn_mask(N, K, 0.4, seed=8)
LAYOUTS = ["dense", "compact"]
OPTIMIZERS: dict[str, Callable] = {
    "momentum, decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


def made(layout: str = "dense", kept: Tensor = KEPT, dtype: torch.dtype = torch.float32, **options) -> MaskedLinear:
    torch.manual_seed(3)
    return MaskedLinear(K, N, mask=kept, grad_layout=layout, dtype=dtype, **options)


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    x = torch.randn(16, layer.in_features, generator=torch.Generator().manual_seed(1)).to(
        next(layer.parameters()).dtype
    )
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()


def zeros_outside(weight: Tensor, kept: Tensor = KEPT) -> bool:
    """Whether every bit of what is not kept is 0, and what is kept is not."""
    outside = weight.detach()[~kept].contiguous().view(torch.uint8)
    return not outside.any() and bool((weight[kept] != 0).all())


def dense_twin(layer: MaskedLinear) -> nn.Linear:
    twin = nn.Linear(K, N, dtype=layer.weight.dtype)
    with torch.no_grad():
        twin.weight.copy_(layer.to_linear().weight)
        twin.bias.copy_(layer.bias)
    return twin


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("promised", [False, True])
def test_output_and_gradients(layout, promised):
    layer, x = made(layout, weight_is_masked=promised), torch.randn(3, 5, K, requires_grad=True)
    grad_y = torch.randn(3, 5, N)
    wanted = layer.values if layout == "compact" else layer.weight
    y = layer(x)
    got = torch.autograd.grad(y, [x, layer.bias, wanted], grad_y)
    twin = dense_twin(layer)
    expected_y = twin(x)
    dx, dbias, dweight = torch.autograd.grad(expected_y, [x, twin.bias, twin.weight], grad_y)
    dweight = dweight[KEPT] if layout == "compact" else dweight * KEPT
    for value, expected in zip((y, *got), (expected_y, dx, dbias, dweight), strict=True):
        assert relative_error(value.detach(), expected.detach()) < 1e-6
    assert layout == "compact" or not got[2][~KEPT].any()


class TestZerosStay:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("name", "dtype"), zip(OPTIMIZERS, (torch.float32, torch.bfloat16), strict=True), ids=str)
    def test_through_training_saving_and_loading(self, layout, name, dtype):
        layer = made(layout, dtype=dtype)
        before = layer.to_linear().weight
        train(layer, OPTIMIZERS[name](layer.parameters()))
        assert zeros_outside(layer.to_linear().weight)
        assert layout == "compact" or zeros_outside(layer.weight)
        assert relative_error(layer.to_linear().weight, before) > 0.05
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        loaded = made(layout, OTHER, dtype)
        loaded.load_state_dict(torch.load(file))
        x = torch.randn(4, K, dtype=dtype)
        assert torch.equal(loaded.to_linear().weight, layer.to_linear().weight)
        assert torch.equal(loaded(x), layer(x))
        assert zeros_outside(loaded.weight)

    def test_both_layouts_train_to_the_same_weights(self):
        results = []
        for layout in LAYOUTS:
            layer = made(layout)
            optimizer = OPTIMIZERS["AdamW"](layer.parameters())
            train(layer, optimizer)
            results.append(layer.to_linear().weight)
            state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.ndim)
            assert state == 2 * (N + (int(KEPT.sum()) if layout == "compact" else N * K))
        assert relative_error(*results) < 1e-6

    def test_loading_what_is_not_zero_outside(self):
        """A checkpoint of a dense model with a mask added to it."""
        layer, linear = made(), nn.Linear(K, N)
        layer.load_state_dict({**linear.state_dict(), "mask_words": pack(OTHER).words})
        assert torch.equal(layer.weight, linear.weight * OTHER)
        assert layer.mask.equal(pack(OTHER))
        assert layer.sparsity == pytest.approx(1 - float(OTHER.double().mean()))

    def test_momentum_of_an_earlier_mask_has_no_effect_and_can_be_removed(self):
        layer = made()
        optimizer = OPTIMIZERS["momentum, decay"](layer.parameters())
        train(layer, optimizer)
        both = KEPT & OTHER
        layer.set_mask(pack(OTHER))
        assert zeros_outside(layer.weight, both)
        train(layer, optimizer)
        assert layer.weight[~OTHER].any()
        x = torch.randn(4, K)
        expected = F.linear(x, torch.where(OTHER, layer.weight, 0.0), layer.bias)
        assert relative_error(layer(x).detach(), expected.detach()) < 1e-6
        assert zeros_outside(layer.to_linear().weight, OTHER)
        layer.enforce_()
        assert zeros_outside(layer.weight, OTHER)
        assert relative_error(layer(x).detach(), expected.detach()) < 1e-6


class TestCompact:
    def test_writes_that_leave_no_trace_are_seen_in_training(self):
        layer, x = made("compact"), torch.randn(4, K)
        layer(x)
        layer.values.data.mul_(2)
        assert relative_error(layer(x).detach(), F.linear(x, layer.weight, layer.bias).detach()) < 1e-6
        assert torch.equal(layer.weight[KEPT], layer.values)

    def test_evaluation_fills_the_weight_once_for_each_change(self):
        layer, x = made("compact").eval(), torch.randn(4, K)
        layer(x)
        version = layer.weight._version
        layer(x)
        assert layer.weight._version == version
        with torch.no_grad():
            layer.values.add_(1)
        layer(x)
        assert torch.equal(layer.weight[KEPT], layer.values)
        layer.values.data.mul_(2)
        layer.eval()(x)
        assert torch.equal(layer.weight[KEPT], layer.values)

    def test_two_forwards_before_backward(self):
        layer = made("compact")
        x = torch.randn(2, 4, K, requires_grad=True)
        once = torch.autograd.grad(layer(x).sum(), [x, layer.values])
        twice = torch.autograd.grad(layer(x[0]).sum() + layer(x[1]).sum(), [x, layer.values])
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(twice, once, strict=True))

    def test_a_step_between_forward_and_backward_is_an_error(self):
        layer = made("compact")
        y = layer(torch.randn(4, K, requires_grad=True))
        with torch.no_grad():
            layer.values.add_(1)
        layer(torch.randn(4, K))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_another_mask(self):
        layer = made("compact")
        values, weight = layer.values, layer.to_linear().weight
        layer.set_mask(KEPT)
        assert layer.values is values
        layer.set_mask(OTHER)
        assert layer.values.shape == (int(OTHER.sum()),)
        assert layer.values.requires_grad
        assert torch.equal(layer.to_linear().weight, weight * OTHER)
        train(layer, OPTIMIZERS["AdamW"](layer.parameters()))
        assert zeros_outside(layer.to_linear().weight, OTHER)

    def test_no_places_on_the_meta_device(self):
        with pytest.raises(ValueError, match="meta device"):
            MaskedLinear(K, N, grad_layout="compact", device="meta")

    def test_as_many_values_as_the_mask_keeps(self):
        layer = made("compact")
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError, match=r"values has shape \(3,\); expected \(\d+,\)"):
            layer.load_state_dict({**before, "values": torch.ones(3)})
        assert same_state(layer.state_dict(), before)


class TestFromLinear:
    def test_the_weight_is_shared_where_it_is_pruned_and_else_copied(self):
        linear = nn.Linear(K, N).eval()
        before = linear.weight.detach().clone()
        layer = MaskedLinear.from_linear(linear, pack(KEPT))
        assert torch.equal(linear.weight, before)
        assert torch.equal(layer.weight, before * KEPT)
        assert layer.bias is linear.bias
        assert not layer.training
        again = MaskedLinear.from_linear(layer.to_linear())
        assert again.mask.equal(layer.mask)
        pruned = layer.to_linear()
        assert MaskedLinear.from_linear(pruned, full(N, K)).weight is pruned.weight

    def test_conv1d(self):
        linear = conv1d(N, K)
        layer = MaskedLinear.from_linear(linear, KEPT)
        assert torch.equal(layer.weight, linear.weight.t() * KEPT)
        assert layer.weight.requires_grad

    def test_4_bits_are_frozen_and_not_promised_to_be_pruned(self):
        linear, x = NF4Linear(K, N), torch.randn(5, K)
        layer = MaskedLinear.from_linear(linear, KEPT)
        assert layer.weight is linear.weight
        assert not layer.weight_is_masked
        expected = F.linear(x, linear.dequantize() * KEPT, linear.bias)
        assert relative_error(layer(x).detach(), expected.detach()) < 1e-6
        assert torch.equal(layer.to_linear().weight, linear.dequantize() * KEPT)
        pruned = MaskedLinear.from_linear(NF4Linear.from_linear(layer.to_linear()), KEPT)
        assert pruned.weight_is_masked
        pruned.set_mask(OTHER)
        assert not pruned.weight_is_masked
        loaded = MaskedLinear.from_linear(NF4Linear(K, N), KEPT)
        loaded.load_state_dict(layer.state_dict())
        assert torch.equal(loaded(x), layer(x))

    @pytest.mark.parametrize(
        ("mask", "options", "error", "text"),
        [
            (full(N, K + 1), {}, ValueError, r"MaskedLinear: mask has shape \(10, 38\)"),
            (torch.ones(N), {}, ValueError, r"MaskedLinear: mask has shape \(10,\)"),
            (full(N, K)._replace(words=full(N, K).words.to("meta")), {}, ValueError, "mask is on meta"),
            ([[True]], {}, TypeError, "mask is list"),
            (KEPT, {"grad_layout": "sparse"}, ValueError, "grad_layout is 'sparse'"),
            (KEPT, {"weight_is_masked": 1}, TypeError, "weight_is_masked is 1"),
        ],
        ids=["shape", "vector", "device", "list", "layout", "flag"],
    )
    def test_bad_arguments(self, mask, options, error, text):
        with pytest.raises(error, match=text):
            MaskedLinear.from_linear(nn.Linear(K, N), mask, **options)

    def test_refuses_what_may_compute_something_else(self):
        class Mine(nn.Linear):
            pass

        for module in (Mine(3, 3), nn.Embedding(3, 3), None):
            with pytest.raises(TypeError, match=rf"MaskedLinear.from_linear: got .*{type(module).__name__}"):
                MaskedLinear.from_linear(module)
        with pytest.raises(ValueError, match="4 bits does not train"):
            MaskedLinear.from_linear(NF4Linear(3, 3), grad_layout="compact")


class TestFromPruned:
    def pruned(self) -> nn.Linear:
        linear = nn.Linear(K, N)
        prune.l1_unstructured(linear, "weight", 0.4)
        return prune.ln_structured(linear, "weight", 0.3, n=2, dim=0)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_computes_and_trains_as_before(self, layout):
        module = self.pruned().eval()
        layer = MaskedLinear.from_pruned(module, grad_layout=layout)
        assert not layer.training
        assert layer.mask.equal(pack(module.weight_mask))
        assert relative_error(layer(torch.eye(K)).detach(), module(torch.eye(K)).detach()) < 1e-6
        with torch.no_grad():
            layer.bias = nn.Parameter(module.bias.detach().clone())
        options = {"lr": 0.05, "momentum": 0.9}
        for one in (module, layer):
            train(one, torch.optim.SGD(one.parameters(), **options))
        assert relative_error(layer.to_linear().weight, module.weight_orig.detach() * module.weight_mask) < 1e-6

    def test_refusals(self):
        with pytest.raises(TypeError, match=r"got torch.nn.modules.conv.Conv1d"):
            MaskedLinear.from_pruned(nn.Conv1d(2, 2, 1))
        cases = {"torch.nn.utils.prune has not pruned": nn.Linear(K, N)}
        cases["pruned bias"] = prune.l1_unstructured(self.pruned(), "bias", 0.5)
        cases["hooks"] = self.pruned()
        cases["hooks"].register_forward_pre_hook(lambda module, x: None)
        cases["other values than 0 and 1"] = self.pruned()
        cases["other values than 0 and 1"].weight_mask[0] = 0.5
        cases["parametrisations"] = nn.utils.parametrizations.weight_norm(nn.Linear(K, N))
        for text, module in cases.items():
            with pytest.raises(ValueError, match=f"MaskedLinear.from_pruned: .*{text}"):
                MaskedLinear.from_pruned(module)

    def test_a_whole_model(self):
        shared = self.pruned()
        model = nn.ModuleDict({"a": shared, "b": nn.Linear(N, K), "c": shared})
        report = replace_pruned(model, grad_layout="compact")
        assert type(model["a"]) is MaskedLinear
        assert model["a"] is model["c"]
        assert type(model["b"]) is nn.Linear
        (row,) = report.layers
        assert (row.name, row.out_features, row.in_features) == ("a (also c)", N, K)
        assert row.sparsity == model["a"].sparsity > 0.4
        assert row.bytes_before == 2 * 4 * N * K
        assert row.bytes_after == 4 * N * K + 4 * N * 2 + model["a"].values.nbytes
        assert "1 layer masked" in str(report)
        with pytest.raises(ValueError, match=r"has pruned no nn.Linear"):
            replace_pruned(model)

    def test_a_whole_model_or_nothing(self):
        model = nn.Sequential(self.pruned(), prune.l1_unstructured(self.pruned(), "bias", 0.5))
        before = list(model)
        with pytest.raises(ValueError, match=r"replace_pruned: 1: .*pruned bias"):
            replace_pruned(model)
        assert list(model) == before


class TestState:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", MOVES)
    def test_casts_leave_the_mask_alone(self, layout, name):
        layer, (cast, dtype) = made(layout), MOVES[name]
        assert cast(layer) is layer
        assert layer.mask_words.dtype == torch.int32
        assert layer.mask.equal(pack(KEPT))
        y = layer(torch.randn(2, K, dtype=dtype))
        assert y.dtype == layer.weight.dtype == dtype
        y.sum().backward()
        assert zeros_outside(layer.weight)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS.keys())
    def test_copies_are_their_own(self, layout, copier):
        layer, x = made(layout), torch.randn(3, K)
        expected = layer(x)
        twin = copier(layer)
        assert torch.equal(twin(x), expected)
        assert repr(twin) == repr(layer)
        twin.set_mask(OTHER)
        assert layer.mask.equal(pack(KEPT))
        assert torch.equal(layer(x), expected)

    def test_through_the_meta_device(self):
        source, layer, x = made(), MaskedLinear(K, N, device="meta"), torch.randn(3, K)
        assert layer(x.to("meta")).shape == (3, N)
        assert "sparsity=nan" in repr(layer)
        layer.to_empty(device="cpu").load_state_dict(source.state_dict())
        assert torch.equal(layer(x), source(x))
        assert repr(layer) == repr(source)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_masks_given_before_stay_as_they_were(self, layout):
        layer = made(layout)
        before = layer.mask
        layer.load_state_dict(made(layout, OTHER).state_dict())
        assert before.equal(pack(KEPT))
        assert layer.mask.equal(pack(OTHER))
        layer.set_mask(KEPT)
        assert layer.mask.equal(pack(KEPT))

    def test_words_of_another_weight_are_not_loaded(self):
        layer = made()
        before = copy.deepcopy(layer.state_dict())
        words = before["mask_words"]
        for bad, text in {
            "floats": (words.float(), "float32; expected int32"),
            "shape": (words[:, :1], r"has shape \(10, 1\); expected \(10, 2\)"),
            "bits": (torch.full_like(words, -1), "bits beyond column 37"),
        }.values():
            state = {"weight": torch.ones(N, K), "bias": torch.ones(N), "mask_words": bad}
            with pytest.raises(RuntimeError, match=f"mask_words.*{text}"):
                layer.load_state_dict(state)
            assert same_state(layer.state_dict(), before)
        with pytest.raises(RuntimeError, match=r"Missing key.*mask_words"):
            layer.load_state_dict({"weight": torch.ones(N, K), "bias": torch.ones(N)})

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("assign", [False, True])
    def test_a_layer_of_one_layout_loads_what_one_of_the_other_saved(self, layout, assign):
        """Strictly, also within a model, with another mask than it had; what stood outside the mask is not taken."""
        other, x = LAYOUTS[layout == "dense"], torch.randn(3, K)
        source, target = made(other, OTHER), nn.Sequential(made(layout))
        train(source, OPTIMIZERS["AdamW"](source.parameters()))
        saved = {f"0.{key}": value.clone() for key, value in source.state_dict().items()}
        if other == "dense":
            saved["0.weight"][~OTHER] = float("nan")
        names = [name for name, _ in target.named_parameters()]
        target.load_state_dict(saved, assign=assign)
        assert [name for name, _ in target.named_parameters()] == names
        assert target[0].mask.equal(source.mask)
        assert torch.equal(target[0].to_linear().weight, source.to_linear().weight)
        torch.testing.assert_close(target(x), source(x))
        assert zeros_outside(target[0].weight, OTHER)
        train(target[0], OPTIMIZERS["AdamW"](target.parameters()))
        assert not torch.equal(target[0].to_linear().weight, source.to_linear().weight)
        source.load_state_dict(target[0].state_dict(), assign=assign)
        assert torch.equal(target[0].to_linear().weight, source.to_linear().weight)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_what_does_not_fit_is_not_loaded_from_the_other_layout(self, layout):
        layer, words = made(layout), pack(KEPT).words
        given = {"values": torch.ones(5)} if layout == "dense" else {"weight": torch.ones(N, K)}
        before = copy.deepcopy(layer.state_dict())
        bad = {**given, "bias": torch.ones(N), "mask_words": words if layout == "dense" else words[:, :1]}
        text = (
            r"values has shape \(5,\); expected" if layout == "dense" else r"mask_words has shape \(10, 1\); expected"
        )
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict(bad)
        assert same_state(layer.state_dict(), before)

    def test_sparsity_is_counted_once_for_each_mask(self, monkeypatch):
        counted = []
        density = PackedMask.density
        monkeypatch.setattr(PackedMask, "density", lambda mask: counted.append(mask) or density(mask))
        layer = made()
        assert repr(layer) == repr(layer)
        assert layer.sparsity == pytest.approx(1 - float(KEPT.double().mean()))
        assert len(counted) == 1
        layer.set_mask(full(N, K))
        assert layer.sparsity == 0
        assert len(counted) == 2

    def test_repr(self):
        kept = torch.zeros(N, K, dtype=torch.bool)
        kept[0] = True
        text = "in_features=37, out_features=10, bias=True, sparsity=0.9"
        assert repr(made(kept=kept)) == f"MaskedLinear({text})"
        assert repr(made("compact", kept)) == f"MaskedLinear({text}, grad_layout=compact)"
        assert repr(made(kept=kept, weight_is_masked=True)) == f"MaskedLinear({text}, weight_is_masked=True)"

    def test_compiled_code_sees_another_mask(self):
        """With the layout whose forward writes the weight; the op over a dense one is compiled in its own tests."""
        torch._dynamo.reset()
        layer, x = made("compact"), torch.randn(3, K)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for kept in (KEPT, OTHER):
            layer.set_mask(kept)
            results = []
            for call in (compiled, layer):
                y = call(x)
                results += [y.detach(), *torch.autograd.grad(y.square().sum(), [layer.values, layer.bias])]
            assert all(relative_error(a, b) < 1e-6 for a, b in zip(results[:3], results[3:], strict=True))

    def test_a_mask_that_keeps_nothing(self):
        layer, x = made(kept=torch.zeros(N, K)), torch.randn(3, K)
        assert layer.sparsity == 1
        assert torch.equal(layer(x), layer.bias.expand(3, N))
        train(layer, OPTIMIZERS["AdamW"](layer.parameters()))
        assert not layer.weight.any()
