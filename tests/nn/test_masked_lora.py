"""`MaskedLoRALinear`: both meanings of the update, and zeros that survive training, merging, saving and loading."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import (
    FusedLoRALinear,
    FusedQLoRALinear,
    MaskedLinear,
    MaskedLoRALinear,
    MergeError,
    NF4Linear,
    add_lora,
    load_adapter,
    merge_adapter,
    save_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from peft_kernels.formats.mask import full, pack
from peft_kernels.formats.nf4 import NF4Weight
from tests.helpers import relative_error
from tests.nn.quantised import COPIERS, MOVES, same_bits, same_state
from tests.nn.test_masked import KEPT, OPTIMIZERS, OTHER, K, N, train, zeros_outside
from tests.nn.test_nf4_linear import conv1d

R = 3
BASES = [None, "nf4"]


def made(base: str | None = None, *, update_masked: bool = True, trained: bool = True, **options) -> MaskedLoRALinear:
    torch.manual_seed(3)
    linear = nn.Linear(K, N, dtype=options.pop("dtype", None))
    layer = MaskedLoRALinear.from_linear(
        linear, R, mask=KEPT, update_masked=update_masked, base_quantization=base, **options
    )
    if trained:
        nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def dense(weight: Tensor | NF4Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, NF4Weight) else weight.detach()


def composed(layer: MaskedLoRALinear, x: Tensor) -> Tensor:
    update = layer.scaling * layer.lora_B @ layer.lora_A
    weight = dense(layer.weight) * KEPT
    return F.linear(x, weight + (update * KEPT if layer.update_masked else update), layer.bias)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("update_masked", [True, False])
def test_output_and_gradients(base, update_masked):
    layer, x = made(base, update_masked=update_masked, train_bias=True), torch.randn(2, 5, K, requires_grad=True)
    wanted, grad_y = [x, layer.lora_A, layer.lora_B, layer.bias], torch.randn(2, 5, N)
    expected = composed(layer, x)
    y = layer(x)
    pairs = zip(
        (y, *torch.autograd.grad(y, wanted, grad_y)),
        (expected, *torch.autograd.grad(expected, wanted, grad_y)),
        strict=True,
    )
    assert all(relative_error(a.detach(), b.detach()) < 2e-6 for a, b in pairs)


@pytest.mark.parametrize("update_masked", [True, False])
def test_starts_as_the_pruned_layer(update_masked):
    layer, x = made(trained=False, update_masked=update_masked), torch.randn(4, K)
    assert relative_error(layer(x).detach(), F.linear(x, layer.weight * KEPT, layer.bias).detach()) < 1e-6
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_dropout_is_of_the_update_in_training():
    layer, x = made(lora_dropout=1.0), torch.randn(4, K)
    assert relative_error(layer(x).detach(), F.linear(x, layer.weight, layer.bias).detach()) < 1e-6
    assert relative_error(layer.eval()(x).detach(), composed(layer, x).detach()) < 1e-6


class TestMerge:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("base", BASES)
    def test_zeros_stay_bit_for_bit(self, base, name):
        """Trained, merged, saved, loaded and merged again."""
        layer, x = made(base), torch.randn(4, K)
        weight, before = layer.weight, copy.deepcopy(layer.weight)
        train(layer, OPTIMIZERS[name](layer.adapter_parameters.values()))
        state, y = copy.deepcopy(layer.state_dict()), layer(x).detach()
        assert layer.merge() is None
        assert layer.merge() is None
        assert type(layer.weight) is nn.Parameter
        assert zeros_outside(layer.weight)
        assert relative_error(layer.weight.detach(), dense(weight)) > 0.01
        assert relative_error(layer(x).detach(), y) < 1e-6
        assert same_state(layer.state_dict(), state)
        linear = layer.to_linear()
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, layer.weight)
        loaded = made(base)
        loaded.merge()
        loaded.load_state_dict(state)
        assert loaded.merged
        assert torch.equal(loaded.weight, layer.weight)
        layer.unmerge()
        assert layer.weight is weight
        assert same_bits(weight, before) if base else torch.equal(weight, before)
        assert torch.equal(layer(x).detach(), y)

    def test_zeros_stay_in_4_bits(self):
        """As code 7, exactly 0."""
        layer, x = made("nf4"), torch.randn(4, K)
        base, error = layer.weight, layer.merge(requantize=True)
        for q in (base, layer.weight):
            assert isinstance(q, NF4Weight)
            codes = torch.stack([q.packed >> 4, q.packed & 15], 1).flatten()[: N * K].view(N, K)
            assert (codes[~KEPT] == 7).all()
            assert not q.dequantize()[~KEPT].contiguous().view(torch.uint8).any()
        assert layer.merge(requantize=True) is error
        assert isinstance(error, MergeError)
        assert 0 < error.relative < 0.2
        assert relative_error(layer(x), F.linear(x, dense(layer.weight), layer.bias)) < 1e-6
        assert layer.merge() is None
        assert type(layer.weight) is nn.Parameter

    @pytest.mark.parametrize("base", BASES)
    def test_an_update_beside_the_mask_is_not_merged_unasked(self, base):
        layer, x = made(base, update_masked=False), torch.randn(4, K)
        y, weight = layer(x).detach(), layer.weight
        for function in (layer.merge, layer.to_linear):
            with pytest.raises(ValueError, match="would fill its zeros; masked=True"):
                function()
        assert not layer.merged
        assert layer.weight is weight
        layer.merge(masked=True)
        assert zeros_outside(layer.weight)
        assert relative_error(layer(x).detach(), y) > 0.05
        layer.load_state_dict(layer.state_dict())
        assert layer.merged
        layer.unmerge()
        assert relative_error(layer(x).detach(), y) < 1e-6

    def test_bad_calls(self):
        with pytest.raises(ValueError, match="requantize is set, but the weight is dense"):
            made().merge(requantize=True)
        with pytest.raises(TypeError, match="masked is 1"):
            made().merge(masked=1)
        layer = made()
        with torch.no_grad():
            layer.lora_B[0] = torch.inf
        with pytest.raises(ValueError, match="merged weight is not finite"):
            layer.merge()
        assert not layer.merged


class TestFromLinear:
    def test_the_weight_is_shared_where_it_is_pruned_and_else_copied(self):
        linear = nn.Linear(K, N).eval()
        before = linear.weight.detach().clone()
        layer = MaskedLoRALinear.from_linear(linear, R, mask=pack(KEPT), lora_alpha=6)
        assert torch.equal(linear.weight, before)
        assert torch.equal(layer.weight, before * KEPT)
        assert (layer.scaling, layer.training, layer.bias is linear.bias) == (2.0, False, True)
        assert not any(p.requires_grad for p in linear.parameters())
        pruned = layer.to_linear()
        again = MaskedLoRALinear.from_linear(pruned, R)
        assert again.weight is pruned.weight
        assert again.mask.equal(pack(KEPT))

    @pytest.mark.parametrize("layout", ["dense", "compact"])
    def test_masked_linear(self, layout):
        linear, x = MaskedLinear(K, N, mask=KEPT, grad_layout=layout), torch.randn(4, K)
        layer = MaskedLoRALinear.from_linear(linear, R)
        assert layer.mask.equal(pack(KEPT))
        assert relative_error(layer(x).detach(), linear(x).detach()) < 1e-6
        assert layer.weight.data_ptr() == linear.weight.data_ptr()
        assert not any(p.requires_grad for p in linear.parameters())

    def test_conv1d(self):
        linear, x = conv1d(N, K), torch.randn(4, K)
        layer = MaskedLoRALinear.from_linear(linear, R, mask=KEPT)
        assert layer.fan_in_fan_out
        expected = F.linear(x, linear.weight.t() * KEPT, linear.bias)
        assert relative_error(layer(x).detach(), expected.detach()) < 1e-6

    def test_4_bits_that_are_not_0_outside(self):
        """They are shared, stay as they are, and have no effect."""
        linear, x = NF4Linear(K, N), torch.randn(4, K)
        layer = MaskedLoRALinear.from_linear(linear, R, mask=KEPT)
        nn.init.normal_(layer.lora_B)
        assert layer.weight is linear.weight
        y = layer(x).detach()
        assert relative_error(y, composed(layer, x).detach()) < 1e-6
        layer.merge()
        assert zeros_outside(layer.weight)
        assert relative_error(layer(x).detach(), y) < 1e-6

    def test_refusals(self):
        class Mine(nn.Linear):
            pass

        for module in (Mine(3, 3), FusedLoRALinear(3, 3, 1), None):
            with pytest.raises(TypeError, match=rf"MaskedLoRALinear.from_linear: got .*{type(module).__name__}"):
                MaskedLoRALinear.from_linear(module)
        linear = nn.Linear(K, N)
        for text, options in {
            "r is 0": {"r": 0},
            "mask has shape": {"mask": full(N, 3)},
            "base_quantization is 'int8'": {"base_quantization": "int8"},
            "train_bias is 2": {"train_bias": 2},
        }.items():
            with pytest.raises((ValueError, TypeError), match=text):
                MaskedLoRALinear.from_linear(linear, **options)
            assert all(p.requires_grad for p in linear.parameters())
        with pytest.raises(ValueError, match="token_mask is given"):
            made()(torch.randn(2, K), torch.ones(2, dtype=torch.bool))


class TestState:
    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("name", ["half", "type"])
    def test_casts_leave_the_mask_and_the_4_bits_alone(self, base, name, merged):
        layer, (cast, dtype) = made(base), MOVES[name]
        if merged:
            layer.merge()
        cast(layer)
        assert layer.mask.equal(pack(KEPT))
        assert layer(torch.randn(2, K, dtype=dtype)).dtype == dtype
        layer.unmerge()
        assert layer(torch.randn(2, K, dtype=dtype)).dtype == dtype
        assert not dense(layer.weight)[~KEPT].any()

    @pytest.mark.parametrize("base", BASES)
    @pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS.keys())
    def test_copies(self, base, copier):
        layer, x = made(base), torch.randn(3, K)
        twin = copier(layer)
        assert torch.equal(twin(x), layer(x))
        assert repr(twin) == repr(layer)

    def test_loading_what_is_not_zero_outside(self):
        """The checkpoint's tensors stay as they are, whichever way they are loaded."""
        for assign in (False, True):
            layer = made()
            state = {**layer.state_dict(), "weight": torch.ones(N, K)}
            layer.load_state_dict(state, assign=assign)
            assert torch.equal(layer.weight, KEPT.float())
            assert not layer.weight.requires_grad
            assert (state["weight"] == 1).all()

    def test_another_mask(self):
        layer, x = made(), torch.randn(4, K)
        weight = layer.weight
        layer.set_mask(OTHER)
        assert zeros_outside(layer.weight, KEPT & OTHER)
        assert zeros_outside(weight)
        update = (layer.scaling * layer.lora_B @ layer.lora_A) * OTHER
        assert relative_error(layer(x).detach(), F.linear(x, layer.weight + update, layer.bias).detach()) < 1e-6
        layer.merge()
        with pytest.raises(ValueError, match="is merged; unmerge it first"):
            layer.set_mask(KEPT)

    def test_repr(self):
        kept = torch.zeros(N, K)
        kept[0] = 1
        layer = MaskedLoRALinear(K, N, R, mask=kept, lora_alpha=6)
        text = "in_features=37, out_features=10, bias=True, r=3, scaling=2, lora_dropout=0"
        assert repr(layer) == f"MaskedLoRALinear({text}, update_masked=True, sparsity=0.9)"
        layer = MaskedLoRALinear.from_linear(nn.Linear(K, N), R, mask=kept, lora_alpha=6, base_quantization="nf4",
                                             update_masked=False)  # fmt: skip
        assert repr(layer) == f"MaskedLoRALinear({text}, sparsity=0.9, nf4, blocksize=64, double_quant=True)"


class TestInAModel:
    def model(self) -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K), MaskedLinear(K, N, mask=KEPT))

    @pytest.mark.parametrize("base", BASES)
    def test_add_lora(self, base):
        model = self.model()
        report = add_lora(model, R, masks={"0": pack(KEPT)}, base_quantization=base)
        kinds = [type(layer) for layer in model]
        plain = FusedLoRALinear if base is None else FusedQLoRALinear
        assert kinds == [MaskedLoRALinear, nn.ReLU, plain, MaskedLoRALinear]
        assert [layer.r for layer in report.layers] == [R] * 3
        assert all(model[i].update_masked and model[i].mask.equal(pack(KEPT)) for i in (0, 3))
        assert isinstance(model[0].weight, NF4Weight) == isinstance(model[3].weight, NF4Weight) == (base == "nf4")
        assert trainable_parameters(model).trainable == 3 * R * (N + K)
        nn.init.normal_(model[0].lora_B)
        x = torch.randn(4, K)
        y = model(x).detach()
        errors = merge_adapter(model)
        assert errors == {}
        assert zeros_outside(model[0].weight)
        assert relative_error(model(x).detach(), y) < 1e-5
        unmerge_adapter(model)
        assert merge_adapter(model, requantize=base is not None).keys() == ({"0", "2", "3"} if base else set())
        assert not dense(model[0].weight)[~KEPT].any()

    def test_what_is_not_zero_is_kept(self):
        model = self.model()
        with torch.no_grad():
            model[0].weight.mul_(KEPT)
        add_lora(model, R, ["0"], masks="nonzero", update_masked=False)
        assert model[0].mask.equal(pack(KEPT))
        with pytest.raises(ValueError, match=r"merge_adapter: 0: .*would fill its zeros"):
            merge_adapter(model)

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"masks": {"0": full(N, 3)}}, ValueError, r"0: MaskedLoRALinear: mask has shape \(10, 3\)"),
            ({"masks": "all"}, ValueError, "masks is 'all'"),
            (
                {"masks": {"0": full(N, K)}, "use_dora": True},
                ValueError,
                "0 is pruned, which .* use_dora",
            ),
            ({"masks": {"0": full(N, K)}, "update_masked": 1}, TypeError, "update_masked is 1"),
        ],
        ids=["shape", "text", "DoRA", "flag"],
    )
    def test_refusals_leave_the_model_unchanged(self, options, error, text):
        model = self.model()
        before, flags = list(model), [p.requires_grad for p in model.parameters()]
        with pytest.raises(error, match=text):
            add_lora(model, R, **options)
        assert list(model) == before
        assert [p.requires_grad for p in model.parameters()] == flags

    def test_adapter_files(self, tmp_path):
        """A and B as of any LoRA layer; the mask is the model's."""
        models = [self.model(), self.model()]
        for model in models:
            add_lora(model, R, masks={"0": pack(KEPT)})
        for i in (0, 2, 3):
            nn.init.normal_(models[0][i].lora_B)
        save_adapter(models[0], tmp_path)
        load_adapter(models[1], tmp_path)
        x = torch.randn(4, K)
        assert torch.equal(models[1](x), models[0](x))
        plain = self.model()
        load_adapter(plain, tmp_path)
        assert [type(plain[i]) for i in (0, 3)] == [FusedLoRALinear, MaskedLoRALinear]
