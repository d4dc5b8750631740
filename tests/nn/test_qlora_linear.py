"""`FusedQLoRALinear` is `FusedLoRALinear` over the weight that it unpacks: outputs, gradients, merging, state."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import FusedLoRALinear, FusedQLoRALinear, NF4Linear
from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight
from tests.helpers import RATIO, relative_error
from tests.nn.quantised import COPIERS, MOVES, same_bits, same_state
from tests.nn.test_nf4_linear import CORRUPT, conv1d, linear4bit

N, K, R = 10, 36, 3
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dropout": {"lora_dropout": 0.5},
    "adapter bias": {"lora_bias": True},
    "trained bias": {"train_bias": True},
    "frozen A": {"freeze_A": True},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.5},
}


def trained(dtype: torch.dtype = torch.float32, *, bias: bool = True, **options) -> FusedQLoRALinear:
    layer = FusedQLoRALinear.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), R, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in layer.adapter_parameters.items():
            if name not in ("lora_A", "bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator).abs() + 0.5)
    return layer


def dense_twin(layer: FusedQLoRALinear, dtype: torch.dtype, **options) -> FusedLoRALinear:
    """The same layer over the weight in full, rounded to the dtype of x."""
    twin = FusedLoRALinear(K, N, R, bias=layer.bias is not None, dtype=dtype, adapter_dtype=torch.float32, **options)
    state = {name: value for name, value in layer.state_dict().items() if not name.startswith("weight")}
    twin.load_state_dict({**state, "weight": layer.dequantize(dtype)})
    return twin


def run(layer: nn.Module, x: Tensor, by: Callable | None = None, **call) -> dict[str, Tensor]:
    """Output and gradients of a layer, called by `by` where that is given."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(9)  # of the dropout masks
    y = (layer if by is None else by)(x, **call)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


class TestAgainstTheDenseLayer:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", OPTIONS)
    def test_outputs_and_gradients(self, name, dtype):
        """As near to the layer in float64, over the same rounded weight, as the dense one is."""
        options = OPTIONS[name]
        layer, x = trained(dtype, **options), torch.randn(33, K, dtype=dtype)
        dense = dense_twin(layer, dtype, **options)
        ours, theirs = run(layer, x), run(dense, x)
        truth = run(copy.deepcopy(dense).double(), x.double())
        assert ours.keys() == theirs.keys() == truth.keys()
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype, key
            allowed = max(RATIO * relative_error(theirs[key], truth[key]), torch.finfo(dtype).eps)
            assert relative_error(value, truth[key]) <= allowed, key

    @pytest.mark.parametrize("name", ["plain", "adapter bias", "dropout"])
    def test_token_mask(self, name):
        options = OPTIONS[name]
        layer, x = trained(**options), torch.randn(7, K)
        mask = torch.tensor([True, False, True, True, False, False, True])
        ours = run(layer, x, token_mask=mask)
        theirs = run(dense_twin(layer, torch.float32, **options), x, token_mask=mask)
        assert all(relative_error(ours[key], theirs[key]) < 1e-6 for key in theirs)
        frozen = F.linear(x, layer.dequantize(), layer.bias)
        assert relative_error(ours["y"][~mask], frozen[~mask].detach()) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    def test_start_is_the_frozen_layer_for_x_of_any_dtype(self, dtype):
        layer, x = FusedQLoRALinear(K, N, R, dtype=torch.bfloat16), torch.randn(7, K, dtype=dtype)
        y = layer(x)
        exact = F.linear(x.double(), layer.dequantize(dtype).double(), layer.bias.double())
        assert y.dtype == dtype
        assert relative_error(y.detach(), exact.detach()) < 4 * torch.finfo(dtype).eps
        assert layer.lora_A.dtype == torch.float32

    def test_dropout_only_in_training(self):
        layer, x = trained(lora_dropout=0.5), torch.randn(7, K)
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))

    def test_what_trains(self):
        layer = trained(use_dora=True)
        trains = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trains == {"lora_A", "lora_B", "lora_magnitude_vector"} == set(layer.adapter_parameters)
        assert [name for name, _ in layer.named_parameters() if "weight" in name] == []
        assert not list(layer.buffers())

    def test_a_step_changes_the_adapter_alone(self):
        layer, x = trained(train_bias=True), torch.randn(16, K)
        before, bias = copy.deepcopy(layer.weight), layer.bias.detach().clone()
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < 0.9 * losses[0]
        assert same_bits(layer.weight, before)
        assert not torch.equal(layer.bias, bias)

    @pytest.mark.parametrize("use_dora", [False, True])
    def test_checkpointing_gives_the_same_gradients(self, use_dora):
        from torch.utils.checkpoint import checkpoint

        layer, x = trained(lora_dropout=0.3, use_dora=use_dora), torch.randn(16, K)
        expected = run(layer, x)
        assert same_state(run(layer, x, by=lambda value: checkpoint(layer, value, use_reentrant=False)), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_autocast(self, dtype):
        layer, x = trained(), torch.randn(33, K)
        twin = dense_twin(layer, torch.float32)
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        assert relative_error(y.detach(), twin(x).detach()) < 4 * torch.finfo(dtype).eps
        y.float().sum().backward()
        assert layer.lora_B.grad.dtype == torch.float32


class TestAgainstPeft:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", ["plain", "rslora", "adapter bias", "DoRA"])
    def test_on_a_layer_of_bitsandbytes(self, name, dtype):
        """In training mode: its evaluation mode packs the weight anew, where it does not fail."""
        peft = pytest.importorskip("peft")
        options = {"lora_alpha": 5, **OPTIONS[name]}
        model = nn.Sequential()
        model.add_module("layer", linear4bit(N, K, dtype))
        model.is_loaded_in_4bit = True  # as transformers says it
        config = peft.LoraConfig(r=R, target_modules=["layer"], **options)
        theirs = peft.get_peft_model(model, config).base_model.model.layer
        assert type(theirs).__name__ == "Linear4bit"
        ours = FusedQLoRALinear.from_linear(theirs.base_layer, R, **options)
        with torch.no_grad():
            for name_, parameter in theirs.named_parameters():
                if "lora" in name_:
                    parameter.copy_(torch.randn(parameter.shape))
            ours.lora_A.copy_(theirs.lora_A["default"].weight)
            ours.lora_B.copy_(theirs.lora_B["default"].weight)
            if ours.lora_bias is not None:
                ours.lora_bias.copy_(theirs.lora_B["default"].bias)
            if ours.use_dora:
                ours.lora_magnitude_vector.copy_(theirs.lora_magnitude_vector["default"].weight)
        x = torch.randn(33, K, dtype=dtype)
        got, expected = run(ours, x), run(theirs, x)
        eps = torch.finfo(dtype).eps
        assert relative_error(got["y"], expected["y"]) < 8 * eps
        assert relative_error(got["x"], expected["x"]) < 8 * eps
        for factor in ("lora_A", "lora_B"):
            assert relative_error(got[factor], expected[f"{factor}.default.weight"]) < 16 * eps, factor

    def test_dora_starts_as_in_peft(self):
        peft = pytest.importorskip("peft")
        model = nn.Sequential(linear4bit(N, K))
        model.is_loaded_in_4bit = True
        config = peft.LoraConfig(r=R, target_modules=["0"], use_dora=True)
        theirs = peft.get_peft_model(model, config).base_model.model[0]
        ours = FusedQLoRALinear.from_linear(theirs.base_layer, R, use_dora=True)
        assert torch.allclose(ours.lora_magnitude_vector, theirs.lora_magnitude_vector["default"].weight, rtol=1e-6)


class TestFromLinear:
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear(self, bias):
        linear = nn.Linear(K, N, bias=bias, dtype=torch.bfloat16).eval()
        layer = FusedQLoRALinear.from_linear(linear, R, lora_alpha=6, blocksize=32, double_quant=False)
        assert same_bits(layer.weight, nf4.quantize(linear.weight, 32, False))
        assert layer.bias is linear.bias
        assert not bias or not linear.bias.requires_grad
        assert (layer.in_features, layer.out_features, layer.r, layer.scaling) == (K, N, R, 2.0)
        assert not layer.training
        assert not layer.fan_in_fan_out

    def test_conv1d(self):
        linear = conv1d(N, K)
        layer = FusedQLoRALinear.from_linear(linear, R)
        assert same_bits(layer.weight, nf4.quantize(linear.weight.t().contiguous()))
        assert layer.fan_in_fan_out

    def test_quantised_layers_are_shared(self):
        linear = NF4Linear(K, N, blocksize=128, double_quant=False)
        layer = FusedQLoRALinear.from_linear(linear, R)
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        theirs = linear4bit(N, K)
        assert FusedQLoRALinear.from_linear(theirs, R).weight.packed.data_ptr() == theirs.weight.data_ptr()

    def test_refuses_what_may_compute_something_else(self):
        class Mine(nn.Linear):
            pass

        for module in (Mine(3, 3), nn.Embedding(3, 3), FusedLoRALinear(3, 3, 1), None):
            with pytest.raises(TypeError, match=rf"FusedQLoRALinear.from_linear: got .*{type(module).__name__}"):
                FusedQLoRALinear.from_linear(module)
        for module in (NF4Linear(3, 3), linear4bit()):
            with pytest.raises(TypeError, match=rf"FusedLoRALinear.from_linear: got .*{type(module).__name__}"):
                FusedLoRALinear.from_linear(module)

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"r": 0}, ValueError, "FusedQLoRALinear: r is 0"),
            ({"lora_dropout": 1.5}, ValueError, "lora_dropout"),
            ({"lora_alpha": math.inf}, ValueError, "lora_alpha"),
            ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype"),
            ({"blocksize": 48}, ValueError, "blocksize is 48"),
            ({"use_dora": True, "lora_bias": True}, ValueError, "lora_bias"),
            ({"dtype": torch.float64}, TypeError, "float64"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_bad_arguments(self, arguments, error, text):
        with pytest.raises(error, match=text):
            FusedQLoRALinear(4, 4, **arguments)
        if "dtype" in arguments:
            return
        linear = nn.Linear(4, 4)
        with pytest.raises(error, match=text):
            FusedQLoRALinear.from_linear(linear, **arguments)
        assert all(p.requires_grad for p in linear.parameters())

    def test_repr(self):
        layer = FusedQLoRALinear(K, N, 4, lora_alpha=6, bias=False, use_dora=True)
        text = "in_features=36, out_features=10, bias=False, r=4, scaling=1.5, lora_dropout=0, use_dora=True"
        assert repr(layer) == f"FusedQLoRALinear({text}, nf4, blocksize=64, double_quant=True)"
        layer.merge()
        assert repr(layer) == f"FusedQLoRALinear({text}, merged)"


def exact_merge(layer: FusedQLoRALinear) -> Tensor:
    """M in float64, from the formula."""
    weight = layer._unmerged("weight").dequantize(torch.float32).double()
    merged = weight + layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    if layer.use_dora:
        merged *= (layer.lora_magnitude_vector.detach().double() / merged.norm(dim=1)).unsqueeze(1)
    return merged


MERGES = {"unmerged": None, "merged": {}, "requantised": {"requantize": True}}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES.keys())
class TestState:
    def merged(self, merge, *args, **options) -> FusedQLoRALinear:
        layer = trained(*args, **options)
        if merge is not None:
            layer.merge(**merge)
        return layer

    @pytest.mark.parametrize("source", MERGES.values(), ids=MERGES.keys())
    @pytest.mark.parametrize("assign", [True, False])
    def test_strict_round_trip(self, merge, source, assign):
        """A checkpoint holds W, A and B, whatever the layer computes with, and what is loaded is merged as before."""
        one, two = self.merged(source, blocksize=32), self.merged(merge)
        two.load_state_dict(one.state_dict(), strict=True, assign=assign)
        assert two.merged == (merge is not None)
        assert isinstance(two.weight, NF4Weight) == (merge != {})
        assert same_state(two.state_dict(), one.state_dict())
        again = two.weight
        two.unmerge()
        one.unmerge()
        assert same_bits(two.weight, one.weight)
        if merge is not None:
            two.merge(**merge)
            assert same_bits(two.weight, again) if merge else torch.equal(two.weight, again)

    @pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS.keys())
    def test_copies_are_their_own(self, merge, copier):
        layer, x = self.merged(merge).eval(), torch.randn(3, K)
        twin = copier(layer)
        assert torch.equal(twin(x), layer(x))
        assert same_state(twin.state_dict(), layer.state_dict())
        assert repr(twin) == repr(layer)
        twin.unmerge()
        before = copy.deepcopy(layer._unmerged("weight"))
        for tensor in twin.weight.tensors:
            tensor.zero_()
        assert same_bits(layer._unmerged("weight"), before)

    @pytest.mark.parametrize("name", ["half", "to bfloat16", "double"])
    def test_casts_leave_the_4_bits_alone(self, merge, name):
        layer = self.merged(merge)
        before, now = copy.deepcopy(layer._unmerged("weight")), copy.deepcopy(layer.weight)
        cast, dtype = MOVES[name]
        cast(layer)
        if merge == {}:
            assert torch.equal(layer.weight, now.to(dtype))
        else:
            assert same_bits(layer.weight, now)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        layer(torch.randn(2, K, dtype=dtype))
        layer.unmerge()
        assert same_bits(layer.weight, before)
        layer(torch.randn(2, K, dtype=dtype))

    def test_meta_and_back(self, merge):
        layer, x = self.merged(merge), torch.randn(3, K)
        expected, state = layer(x), copy.deepcopy(layer.state_dict())
        layer.to("meta")
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
        layer.to_empty(device="cpu")
        layer.unmerge()
        layer.load_state_dict(state)
        if merge is not None:
            layer.merge(**merge)
        assert relative_error(layer(x).detach(), expected.detach()) < 1e-6

    @pytest.mark.parametrize("name", ["dense", "short absmax", "another shape"])
    def test_corrupt(self, merge, name):
        change, _ = CORRUPT[name]
        layer, x = self.merged(merge), torch.randn(3, K)
        expected, before = layer(x), copy.deepcopy(layer.state_dict())
        with pytest.raises(RuntimeError, match="weight"):
            layer.load_state_dict(change(trained().state_dict() | {"lora_B": torch.ones(N, R)}))
        assert same_state(layer.state_dict(), before)
        assert layer.merged == (merge is not None)
        assert torch.equal(layer(x), expected)


class TestDora:
    def test_norms_follow_what_is_loaded_and_moved(self):
        layer, other, x = trained(use_dora=True).eval(), trained(use_dora=True, blocksize=32).eval(), torch.randn(4, K)
        layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        layer.train()(x)
        layer.to("meta").to_empty(device="cpu").load_state_dict(other.state_dict())
        assert torch.equal(layer.eval()(x), other(x))

    @pytest.mark.parametrize("training", [True, False])
    def test_the_norm_of_w_is_computed_once(self, training, monkeypatch):
        from peft_kernels import functional

        calls, compute = [], functional.dora_weight_norm

        def counted(*args, weight_norm_squared=None, **kwargs):
            calls.append(weight_norm_squared)
            return compute(*args, weight_norm_squared=weight_norm_squared, **kwargs)

        monkeypatch.setattr(functional, "dora_weight_norm", counted)
        layer, x = trained(use_dora=True).train(training), torch.randn(4, K)
        expected = exact_merge(layer)
        for _ in range(2):
            y = layer(x)
        assert len(calls) == (2 if training else 1)
        assert all(squared is calls[0] for squared in calls)
        assert relative_error(y.detach(), F.linear(x.double(), expected, layer.bias.double()).detach()) < 1e-6


@pytest.mark.parametrize("name", ["adapter bias", "DoRA"])  # and plain below
def test_one_graph(name):
    torch._dynamo.reset()
    layer = trained(**OPTIONS[name])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 9, 64):
            x = torch.randn(m, K)
            expected, got = run(layer, x), run(layer, x, by=compiled)
            assert all(relative_error(got[key], expected[key]) < 1e-5 for key in expected)


def test_merging_is_seen_by_compiled_code():
    torch._dynamo.reset()
    layer, x = trained(), torch.randn(9, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for change in (lambda: None, layer.merge, lambda: layer.merge(requantize=True), layer.unmerge):
        change()
        assert relative_error(compiled(x).detach(), layer(x).detach()) < 1e-6
