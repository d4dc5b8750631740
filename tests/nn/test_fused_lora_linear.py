"""`FusedLoRALinear` starts as the frozen layer, shares its weight, and merges, moves, copies and saves without loss."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels import FusedLoRALinear
from tests.helpers import relative_error
from tests.nn.models import assert_frozen

HALF = [torch.float16, torch.bfloat16]


def conv1d(n: int, k: int) -> nn.Module:
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(n, k)


def trained(dtype: torch.dtype = torch.float32, **options) -> FusedLoRALinear:
    layer = FusedLoRALinear(12, 10, 3, dtype=dtype, **options)
    with torch.no_grad():
        layer.lora_B.normal_()
    return layer


def state_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in layer.state_dict().items()}


def same_state(layer: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    now = layer.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)


class TestStart:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_equals_the_frozen_layer(self, dtype, bias):
        layer = FusedLoRALinear(12, 10, 3, dtype=dtype, bias=bias)
        x = torch.randn(7, 12, dtype=dtype)
        assert_frozen(layer, x, layer(x))
        assert (layer.bias is not None) == bias

    def test_a_is_kaiming_uniform_as_in_peft(self):
        layer = FusedLoRALinear(400, 10, 100)
        bound = 1 / math.sqrt(400)  # Kaiming with a = sqrt(5): gain sqrt(1/3), times sqrt(3 / fan_in)
        a = layer.lora_A.detach()
        assert a.abs().max() <= bound
        assert a.abs().max() > 0.999 * bound
        assert abs(a.mean()) < 4 * bound / math.sqrt(3 * a.numel())
        assert math.isclose(a.std(), bound / math.sqrt(3), rel_tol=0.01)
        # Uniform, not just of the right spread: ten equal bins within five standard deviations of their expectation.
        counts = torch.histc(a, 10, -bound, bound)
        assert (counts - a.numel() / 10).abs().max() < 5 * math.sqrt(a.numel() * 0.09)
        assert not layer.lora_B.any()

    def test_same_distribution_as_peft(self):
        peft = pytest.importorskip("peft")
        model = nn.Sequential(nn.Linear(300, 50))
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=["0"])).base_model.model[0]
        a, b = FusedLoRALinear(300, 50, 64).lora_A.detach(), theirs.lora_A["default"].weight.detach()
        assert a.shape == b.shape
        assert math.isclose(a.std(), b.std(), rel_tol=0.02)
        assert math.isclose(a.abs().max(), b.abs().max(), rel_tol=0.002)

    def test_what_trains(self):
        layer = trained()
        layer(torch.randn(4, 12)).sum().backward()
        assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        assert layer.weight.grad is None
        assert layer.bias.grad is None
        assert layer.lora_A.grad.any()
        assert layer.lora_B.grad.any()

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_adapters_of_a_16_bit_layer_are_float32_unless_asked(self, dtype):
        assert FusedLoRALinear(4, 4, 2, dtype=dtype).lora_A.dtype == torch.float32
        assert FusedLoRALinear(4, 4, 2, dtype=dtype, adapter_dtype=dtype).lora_B.dtype == dtype

    @pytest.mark.parametrize(("rslora", "scaling"), [(False, 20 / 4), (True, 20 / 2)])
    def test_scaling(self, rslora, scaling):
        layer = FusedLoRALinear(6, 5, 4, lora_alpha=20, use_rslora=rslora, dtype=torch.float64)
        with torch.no_grad():
            layer.lora_B.normal_()
        x = torch.randn(3, 6, dtype=torch.float64)
        expected = F.linear(x, layer.weight, layer.bias) + scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
        assert layer.scaling == scaling
        assert torch.allclose(layer(x), expected, rtol=1e-12)

    def test_reset_starts_again_also_when_merged(self):
        layer = trained()
        weight = layer.weight
        layer.merge()
        layer.reset_lora_parameters()
        assert not layer.merged
        assert layer.weight is weight
        assert not layer.lora_B.any()
        x = torch.randn(4, 12)
        assert_frozen(layer, x, layer(x))

    def test_meta(self):
        layer = FusedLoRALinear(2**20, 2**20, 8, device="meta")
        assert layer(torch.empty(3, 2**20, device="meta")).shape == (3, 2**20)

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"r": 0}, ValueError, "r is 0"),
            ({"r": -1}, ValueError, "r is -1"),
            ({"r": 513}, ValueError, "r is 513"),
            ({"lora_dropout": -0.1}, ValueError, "lora_dropout"),
            ({"lora_dropout": 1.5}, ValueError, "lora_dropout"),
            ({"lora_dropout": math.nan}, ValueError, "lora_dropout"),
            ({"lora_dropout": "0.1"}, TypeError, "lora_dropout"),
            ({"lora_alpha": math.inf}, ValueError, "lora_alpha"),
            ({"lora_alpha": "16"}, TypeError, "lora_alpha"),
            ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_bad_arguments(self, arguments, error, text):
        with pytest.raises(error, match=text):
            FusedLoRALinear(4, 4, **arguments)
        for linear in (nn.Linear(4, 4), conv1d(4, 4)):
            with pytest.raises(error, match=text):
                FusedLoRALinear.from_linear(linear, **arguments)
            assert all(p.requires_grad for p in linear.parameters())


class TestFromLinear:
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear(self, bias):
        linear = nn.Linear(12, 10, bias=bias).eval()
        layer = FusedLoRALinear.from_linear(linear, 3, lora_alpha=6)
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert (layer.in_features, layer.out_features, layer.r, layer.scaling) == (12, 10, 3, 2.0)
        assert not layer.training
        assert not layer.fan_in_fan_out
        assert not linear.weight.requires_grad
        x = torch.randn(5, 12)
        assert_frozen(layer, x, layer(x))

    @pytest.mark.parametrize(("n", "k"), [(10, 12), (8, 8)], ids=["rectangular", "square"])
    def test_conv1d(self, n, k):
        linear = conv1d(n, k)
        with torch.no_grad():
            linear.bias.normal_()
        layer = FusedLoRALinear.from_linear(linear, 3)
        assert layer.weight.shape == (n, k)
        assert layer.weight.data_ptr() == linear.weight.data_ptr()
        assert layer.bias is linear.bias
        assert layer.fan_in_fan_out
        assert not linear.weight.requires_grad
        with torch.no_grad():
            layer.lora_B.normal_()
            x = torch.randn(5, k)
            expected = linear(x) + layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
        assert relative_error(layer(x), expected) < 1e-6
        layer.merge()
        assert relative_error(layer(x), expected) < 1e-6

    def test_refuses_what_may_compute_something_else(self):
        class Mine(nn.Linear):
            pass

        for module in (Mine(3, 3), nn.Bilinear(3, 3, 3), nn.Embedding(3, 3), nn.Sequential(), None):
            with pytest.raises(TypeError, match=type(module).__name__):
                FusedLoRALinear.from_linear(module)

    def test_refuses_integer_weights(self):
        linear = nn.Linear(4, 4)
        linear.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
        with pytest.raises(TypeError, match=r"weight has dtype torch\.int8"):
            FusedLoRALinear.from_linear(linear)


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_a_hundred_cycles_restore_every_bit(self, dtype):
        layer = trained(dtype)
        state, weight, x = state_of(layer), layer.weight, torch.randn(4, 12, dtype=dtype)
        unmerged = layer(x)
        layer.merge()
        merged = layer.weight.clone()
        for _ in range(100):
            layer.merge()
            layer.unmerge()
            layer.unmerge()
            layer.merge()
            assert torch.equal(layer.weight, merged)
        layer.unmerge()
        assert layer.weight is weight
        assert same_state(layer, state)
        assert torch.equal(layer(x), unmerged)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
    def test_merged_weight_is_the_exact_sum_rounded_once(self, dtype):
        layer = trained(dtype)
        wide = torch.float64
        exact = layer.weight.to(wide) + layer.scaling * layer.lora_B.to(wide) @ layer.lora_A.to(wide)
        expected = exact.to(dtype)
        off = (layer.merged_weight() - expected).abs() / expected.abs().clamp_min(0.1)
        assert (off > 0).double().mean() < (0.7 if dtype.itemsize > 2 else 0.01)
        assert off.max() <= 8 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
    def test_merged_computes_the_same_within_rounding(self, dtype):
        layer, x = trained(dtype), torch.randn(64, 12, dtype=dtype)
        wide = copy.deepcopy(layer).double()
        unmerged, truth = layer(x), wide(x.double())
        layer.merge()
        assert layer.merged
        assert relative_error(layer(x), truth) < 2 * torch.finfo(dtype).eps
        assert relative_error(unmerged, truth) < 2 * torch.finfo(dtype).eps

    def test_other_owners_of_the_weight_do_not_notice(self):
        embedding, linear = nn.Embedding(10, 12), nn.Linear(12, 10, bias=False)
        linear.weight = embedding.weight
        layer = FusedLoRALinear.from_linear(linear, 3)
        with torch.no_grad():
            layer.lora_B.normal_()
        before = embedding.weight.clone()
        layer.merge()
        assert torch.equal(embedding.weight, before)
        assert not torch.equal(layer.weight, before)
        layer.unmerge()
        assert layer.weight is embedding.weight

    @pytest.mark.parametrize("value", [math.inf, math.nan, 1e30])
    def test_not_finite(self, value):
        layer = trained(torch.float16)
        with torch.no_grad():
            layer.lora_B[0, 0] = value
        state, weight = state_of(layer), layer.weight
        for method in (layer.merge, layer.merged_weight, layer.to_linear):
            with pytest.raises(ValueError, match="not finite"):
                method()
        assert not layer.merged
        assert layer.weight is weight
        assert all(
            torch.equal(
                a,
                b,
            )
            or a.isnan().any()
            for a, b in zip(layer.state_dict().values(), state.values(), strict=True)
        )

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("merged", [True, False])
    def test_to_linear(self, bias, merged):
        layer, x = trained(bias=bias).eval(), torch.randn(4, 12)
        if merged:
            layer.merge()
        linear = layer.to_linear()
        assert type(linear) is nn.Linear
        assert not linear.training
        assert (linear.in_features, linear.out_features) == (12, 10)
        assert not any(p.requires_grad for p in linear.parameters())
        assert relative_error(linear(x), layer(x)) < 1e-6
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.zero_()
        assert layer.merged_weight().any()
        assert layer.bias is None or layer.bias.any()

    def test_merged_layer_has_no_dropout(self):
        layer, x = trained(lora_dropout=0.5), torch.randn(4, 12)
        layer.merge()
        assert torch.equal(layer(x), layer(x))


class TestStateDict:
    @pytest.mark.parametrize("merged_source", [True, False])
    @pytest.mark.parametrize("merged_target", [True, False])
    @pytest.mark.parametrize("assign", [True, False])
    def test_round_trip(self, merged_source, merged_target, assign):
        source, target, x = trained(), trained(), torch.randn(4, 12)
        state = state_of(source)
        if merged_source:
            source.merge()
        assert same_state(source, state)  # a checkpoint holds W, A and B, whatever the layer computes with
        if merged_target:
            target.merge()
        before = target.weight.clone()
        target.load_state_dict(source.state_dict(), strict=True, assign=assign)
        assert target.merged == merged_target
        assert same_state(target, state)
        assert not torch.equal(target.weight, before)
        assert relative_error(target(x), source(x)) < 1e-6
        target.unmerge()
        assert torch.equal(target.weight, state["weight"])

    def test_keys(self):
        assert list(trained().state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
        assert list(trained(bias=False).state_dict()) == ["weight", "lora_A", "lora_B"]
        merged = trained()
        merged.merge()
        assert list(merged.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
        assert list(dict(merged.named_parameters())) == ["weight", "bias", "lora_A", "lora_B"]

    def test_inside_a_model_and_with_kept_variables(self):
        model = nn.Sequential(trained(), nn.Linear(10, 2))
        original = model[0].weight
        model[0].merge()
        assert model.state_dict(keep_vars=True)["0.weight"] is original
        assert model.state_dict()["0.weight"].data_ptr() == original.data_ptr()
        assert not model.state_dict()["0.weight"].requires_grad

    def test_strict_errors_leave_a_merged_layer_merged(self):
        layer = trained()
        layer.merge()
        weight = layer.weight.clone()
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict({})
        assert layer.merged
        assert torch.equal(layer.weight, weight)


class TestCopies:
    @pytest.mark.parametrize("merged", [True, False])
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    def test_same_and_independent(self, merged, how):
        layer, x = trained(torch.bfloat16, lora_dropout=0.25), torch.randn(4, 12).bfloat16()
        layer.eval()
        if merged:
            layer.merge()
        if how == "deepcopy":
            twin = copy.deepcopy(layer)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(layer))
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert torch.equal(twin(x), layer(x))
        assert same_state(twin, layer.state_dict())
        assert repr(twin) == repr(layer)
        assert twin.merged == merged
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        twin.unmerge()
        layer.unmerge()
        assert layer.weight.any()
        assert layer.lora_B.any()
        assert (
            twin.weight.any() == merged
        )  # the weight set aside is a copy of its own, untouched by zeroing the merged one

    def test_deepcopy_keeps_ties(self):
        model = nn.ModuleDict({"embedding": nn.Embedding(10, 12), "head": nn.Linear(12, 10, bias=False)})
        model["head"].weight = model["embedding"].weight
        model["head"] = FusedLoRALinear.from_linear(model["head"], 3)
        for merged in (False, True):
            if merged:
                model["head"].merge()
            twin = copy.deepcopy(model)
            twin["head"].unmerge()
            assert twin["head"].weight is twin["embedding"].weight
            assert twin["head"].weight is not model["embedding"].weight


class TestMoves:
    @pytest.mark.parametrize("merged", [True, False])
    @pytest.mark.parametrize(
        ("move", "dtype"),
        [
            (lambda layer: layer.half(), torch.float16),
            (lambda layer: layer.to(torch.bfloat16), torch.bfloat16),
            (lambda layer: layer.double(), torch.float64),
        ],
        ids=["half", "to bfloat16", "double"],
    )
    def test_dtype(self, merged, move, dtype):
        layer = trained()
        weight = layer.weight.clone()
        if merged:
            layer.merge()
        merged_weight = layer.weight.clone()
        assert move(layer) is layer
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert torch.equal(layer.weight, merged_weight.to(dtype))
        assert layer.merged == merged
        assert layer.state_dict()["weight"].dtype == dtype
        layer.unmerge()
        assert torch.equal(layer.weight, weight.to(dtype))
        assert set(dict(layer.named_parameters())) == {"weight", "bias", "lora_A", "lora_B"}
        layer(torch.randn(2, 12, dtype=dtype))

    @pytest.mark.parametrize("merged", [True, False])
    def test_meta_and_back(self, merged):
        layer, x = trained(), torch.randn(3, 12)
        expected, state = layer(x), state_of(layer)
        if merged:
            layer.merge()
        layer.to("meta")
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        assert layer.state_dict()["weight"].device.type == "meta"
        layer.to_empty(device="cpu")
        layer.unmerge()
        assert layer.weight.device.type == "cpu"
        layer.load_state_dict(state)
        assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("swap", [True, False])
    def test_ties_survive_moves_while_merged(self, swap):
        model = nn.ModuleDict({"embedding": nn.Embedding(10, 12), "head": nn.Linear(12, 10, bias=False)})
        model["head"].weight = model["embedding"].weight
        model["head"] = FusedLoRALinear.from_linear(model["head"], 3)
        model["head"].merge()
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            model.to(torch.bfloat16)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
        model["head"].unmerge()
        assert model["head"].weight is model["embedding"].weight
        assert model["head"].weight.dtype == torch.bfloat16

    def test_a_move_that_fails_keeps_the_weight_set_aside(self):
        layer = trained()
        weight = layer.weight
        layer.merge()
        with pytest.raises(RuntimeError, match="no"):
            layer._apply(lambda tensor: (_ for _ in ()).throw(RuntimeError("no")))
        assert layer.merged
        layer.unmerge()
        assert layer.weight is weight

    def test_share_memory(self):
        layer = trained()
        layer.merge()
        layer.share_memory()
        layer.unmerge()
        assert layer.weight.is_shared()


class TestModes:
    def test_dropout_in_training_only(self):
        layer, x = trained(lora_dropout=0.5), torch.randn(64, 12)
        assert not torch.equal(layer(x), layer(x))
        torch.manual_seed(3)
        first = layer(x)
        torch.manual_seed(3)
        assert torch.equal(layer(x), first)
        layer.eval()
        plain = F.linear(x, layer.weight, layer.bias) + layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T
        assert torch.equal(layer(x), layer(x))
        assert relative_error(layer(x), plain) < 1e-6

    def test_dropout_is_unbiased_and_spares_the_frozen_branch(self):
        layer, x = trained(lora_dropout=0.5), torch.randn(1, 12)
        frozen = F.linear(x, layer.weight, layer.bias)
        exact = layer.eval()(x)
        mean = layer.train()(x.expand(20_000, 12)).mean(0, keepdim=True)
        assert relative_error(mean - frozen, exact - frozen) < 0.1
        layer.lora_dropout = 1.0
        assert_frozen(layer, x, layer(x))

    def test_repr(self):
        layer = FusedLoRALinear(12, 10, 4, lora_alpha=6, lora_dropout=0.1, bias=False)
        text = "in_features=12, out_features=10, bias=False, r=4, scaling=1.5, lora_dropout=0.1"
        assert repr(layer) == f"FusedLoRALinear({text})"
        layer.merge()
        assert repr(layer) == f"FusedLoRALinear({text}, merged)"
