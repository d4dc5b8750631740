"""Whole models in 4 bits: quantising, adapting, merging, counting, adapter files, groups."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels import (
    FusedLoRAGroup,
    FusedLoRALinear,
    FusedLoRASwiGLU,
    FusedQLoRALinear,
    MergeError,
    NF4Linear,
    add_lora,
    load_adapter,
    merge_adapter,
    quantize_linears,
    save_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from peft_kernels.formats import nf4
from tests.helpers import relative_error
from tests.nn.models import bert, disturb, gpt2, output, snapshot
from tests.nn.quantised import same_bits, same_state
from tests.nn.test_nf4_linear import linear4bit


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(2)
    model = nn.Sequential()
    for name, layer in (("first", nn.Linear(36, 24)), ("act", nn.Tanh()), ("second", nn.Linear(24, 36, bias=False))):
        model.add_module(name, layer.to(dtype))
    model.add_module("lm_head", nn.Linear(36, 20, dtype=dtype))
    return model


class TestQuantizeLinears:
    def test_replaces_all_but_the_head(self):
        model = small()
        first, head, x = model.first, model.lm_head, torch.randn(3, 36)
        report = quantize_linears(model, blocksize=32, double_quant=False)
        assert [type(layer) for layer in model] == [NF4Linear, nn.Tanh, NF4Linear, nn.Linear]
        assert same_bits(model.first.weight, nf4.quantize(first.weight, 32, False))
        assert model.first.bias is first.bias
        assert model.lm_head is head
        assert [layer.name for layer in report.layers] == ["first", "second"]
        assert (report.layers[0].bytes_before, report.layers[0].bytes_after) == (36 * 24 * 4, 36 * 12 + 27 * 4)
        assert report.skipped == ("lm_head (named in skip)",)
        assert str(report).splitlines()[-2:] == [
            "2 layers in NF4: 6,912 bytes have become 1,080",
            "passed over: lm_head (named in skip)",
        ]
        model(x).sum().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == {
            "first.bias", "lm_head.weight", "lm_head.bias",
        }  # fmt: skip

    def test_what_is_passed_over(self):
        class Mine(nn.Linear):
            pass

        model = small()
        model.mine, model.tied, model.embedding = Mine(3, 3), nn.Linear(8, 6, bias=False), nn.Embedding(6, 8)
        model.tied.weight = model.embedding.weight
        model.twin = model.second
        model.adapted = FusedLoRALinear(3, 3, 1)
        model.done = done = NF4Linear(3, 3)
        report = quantize_linears(model, skip=["first"])
        assert report.skipped == ("first (named in skip)", "mine (Mine)", "tied (its weight is shared)")
        assert [layer.name for layer in report.layers] == ["second (also twin)", "lm_head"]
        assert model.twin is model.second
        assert type(model.second) is NF4Linear
        assert model.done is done
        assert type(model.adapted) is FusedLoRALinear

    def test_the_output_head_of_transformers_is_passed_over(self):
        model = gpt2()
        report = quantize_linears(model, skip=())
        assert report.skipped == ("lm_head (output embeddings)",)
        assert len(report.layers) == 8  # Conv1D, in two blocks
        assert type(model.transformer.h[0].attn.c_attn) is NF4Linear
        assert output(model).isfinite().all()

    def test_layers_of_bitsandbytes(self):
        model = nn.Sequential(linear4bit(), nn.Tanh())
        theirs, x = model[0], torch.randn(3, 36)
        expected = model(x)
        report = quantize_linears(model)
        assert type(model[0]) is NF4Linear
        assert model[0].weight.packed.data_ptr() == theirs.weight.data_ptr()
        assert report.layers[0].bytes_before == report.layers[0].bytes_after
        assert relative_error(model(x).detach(), expected.detach()) < 1e-6

    def test_encoder_layers_leave_pytorchs_fused_path(self):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0), 2).eval()
        x = torch.randn(2, 5, 16)
        with torch.no_grad():
            dense = model(x)
            quantize_linears(model)
            assert relative_error(model(x), dense) < 0.3

    @pytest.mark.parametrize(
        ("change", "options", "error", "text"),
        [
            (lambda m: m.second.weight.data.fill_(torch.inf), {}, ValueError, "second: .*not finite"),
            (lambda m: m.second.double(), {}, TypeError, "second: .*float64"),
            (lambda m: m.second.register_forward_hook(lambda *_: None), {}, ValueError, "second has hooks"),
            (lambda m: m, {"blocksize": 48}, ValueError, "first: .*blocksize is 48"),
            (lambda m: m, {"skip": "lm_head"}, TypeError, "skip is 'lm_head'"),
            (lambda m: m, {"skip": ["first", "second", "lm_head"]}, ValueError, "no linear layer to quantise"),
        ],
        ids=["infinite", "float64", "hooks", "blocksize", "string", "nothing"],
    )
    def test_refused_and_unchanged(self, change, options, error, text):
        model = small()
        change(model)
        assert_unchanged = snapshot(model)
        with pytest.raises(error, match=f"quantize_linears: .*{text}"):
            quantize_linears(model, **options)
        assert_unchanged()

    def test_a_single_layer_is_refused(self):
        for model in (nn.Linear(3, 3), NF4Linear(3, 3)):
            with pytest.raises(ValueError, match="the model is itself a linear layer"):
                quantize_linears(model)

    def test_checkpoints(self):
        """A model made without memory takes a whole checkpoint over."""
        source = small(torch.bfloat16)
        quantize_linears(source, blocksize=128)
        with torch.device("meta"):
            target = small(torch.bfloat16)
        quantize_linears(target)
        target.load_state_dict(source.state_dict(), strict=True, assign=True)
        x = torch.randn(3, 36).bfloat16()
        assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("double_quant", [True, False])
def test_checkpoints_of_transformers_both_ways(double_quant, tmp_path):
    """A model that transformers quantised and saved loads strictly into ours, and ours into transformers."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "dense", quantization_config=four_bit, device_map="cpu", dtype=torch.float32)
    theirs.train().save_pretrained(tmp_path / "theirs")
    ours, ids = transformers.LlamaForCausalLM(config), torch.arange(14).reshape(2, 7)
    quantize_linears(ours)
    file = tmp_path / "theirs" / "model.safetensors"
    ours.load_state_dict(safetensors.load_file(file), strict=True)
    # The same weights; sums through eight layers run in other orders.
    assert relative_error(ours(ids).logits.detach(), theirs(ids).logits.detach()) < 1e-5
    for module in ours.modules():
        if isinstance(module, NF4Linear):
            module.weight = nf4.quantize(0.05 * torch.randn(module.weight.shape), 64, double_quant)
    state = {name: tensor.contiguous() for name, tensor in ours.state_dict().items()}
    safetensors.save_file(state, file, metadata={"format": "pt"})
    again = load(tmp_path / "theirs", device_map="cpu", dtype=torch.float32).train()
    assert relative_error(again(ids).logits.detach(), ours(ids).logits.detach()) < 1e-5


class TestAddLora:
    def test_quantises_just_the_targets(self):
        model = small(torch.bfloat16)
        first, x = model.first, torch.randn(3, 36).bfloat16()
        report = add_lora(model, 4, ["first", "second"], base_quantization="nf4", blocksize=32, double_quant=False)
        assert [type(layer) for layer in model] == [FusedQLoRALinear, nn.Tanh, FusedQLoRALinear, nn.Linear]
        assert same_bits(model.first.weight, nf4.quantize(first.weight, 32, False))
        assert [(layer.name, layer.out_features, layer.in_features) for layer in report.layers] == [
            ("first", 24, 36), ("second", 36, 24),
        ]  # fmt: skip
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {f"{layer}.lora_{factor}" for layer in ("first", "second") for factor in "AB"}
        hidden = torch.tanh(F.linear(x, model.first.dequantize(), model.first.bias))
        frozen = model.lm_head(F.linear(hidden, model.second.dequantize()))
        assert relative_error(model(x).detach(), frozen.detach()) < 2 * torch.finfo(torch.bfloat16).eps

    def test_over_layers_in_4_bits(self):
        model = small()
        quantize_linears(model)
        model.add_module("theirs", linear4bit(10, 20))
        weights = [model.first.weight, model.second.weight]
        report = add_lora(model, 4, lora_dropout=0.1)
        assert type(model.lm_head) is FusedLoRALinear
        assert [type(model.first), type(model.second), type(model.theirs)] == [FusedQLoRALinear] * 3
        assert [model.first.weight, model.second.weight] == weights
        assert [layer.name for layer in report.layers] == ["first", "second", "lm_head", "theirs"]

    def test_counts_4_bit_weights_as_parameters(self):
        dense, quantised = small(), small()
        expected = trainable_parameters(dense).total
        quantize_linears(quantised)
        assert trainable_parameters(quantised) == (24 + 36 * 20 + 20, expected)
        count = add_lora(quantised, 4, ["first"]).parameters
        assert count == (4 * (36 + 24), expected + 4 * (36 + 24))

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"base_quantization": "fp4"}, ValueError, "add_lora: base_quantization is 'fp4'"),
            ({"base_quantization": "nf4", "blocksize": 48}, ValueError, "blocksize is 48"),
            ({"base_quantization": "nf4", "r": 0}, ValueError, "r is 0"),
        ],
        ids=["format", "blocksize", "rank"],
    )
    def test_refused_and_unchanged(self, options, error, text):
        model = small()
        assert_unchanged = snapshot(model)
        with pytest.raises(error, match=text):
            add_lora(model, **options)
        assert_unchanged()

    def test_bert_trains_over_4_bits(self):
        model = bert().train()
        add_lora(model, 4, ["query", "value", "dense"], base_quantization="nf4")
        linears = [module for module in model.modules() if isinstance(module, FusedQLoRALinear)]
        before = [copy.deepcopy(layer.weight) for layer in linears]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        ids, target, losses = torch.arange(14).reshape(2, 7), torch.randn(2, 7, 16), []
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.mse_loss(model(ids)[0], target)
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < 0.8 * losses[0]
        assert all(same_bits(layer.weight, q) for layer, q in zip(linears, before, strict=True))


class TestMergeAdapter:
    def adapted(self) -> nn.Module:
        model = small()
        add_lora(model, 4, ["second"], base_quantization="nf4")
        model.first = FusedLoRALinear.from_linear(model.first, 2)
        disturb(model)
        return model.eval()

    def test_exact(self):
        model, x = self.adapted(), torch.randn(3, 36)
        expected, state, q = model(x), copy.deepcopy(model.state_dict()), model.second.weight
        assert merge_adapter(model) == {}
        assert type(model.second.weight) is nn.Parameter
        assert relative_error(model(x).detach(), expected.detach()) < 1e-6
        unmerge_adapter(model)
        assert model.second.weight is q
        assert torch.equal(model(x), expected)
        assert same_state(model.state_dict(), state)

    def test_into_4_bits(self):
        model = self.adapted()
        errors = merge_adapter(model, requantize=True)
        assert list(errors) == ["second"]
        assert isinstance(errors["second"], MergeError)
        assert model.first.merged
        assert 0 < errors["second"].relative < 0.3
        assert "% of its norm" in str(errors["second"])

    def test_all_or_none(self):
        model = self.adapted()
        with torch.no_grad():
            model.second.lora_B[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"merge_adapter: second: .*not finite"):
            merge_adapter(model, requantize=True)
        assert not model.first.merged


class TestAdapterFiles:
    @pytest.mark.parametrize("use_dora", [False, True])
    def test_round_trip_between_dense_and_4_bit_models(self, use_dora, tmp_path):
        source, target, dense = small(), small(), small()
        add_lora(source, 4, ["first", "second"], base_quantization="nf4", use_dora=use_dora, lora_alpha=7)
        disturb(source)
        save_adapter(source, tmp_path)
        quantize_linears(target)
        report = load_adapter(target, tmp_path)
        assert len(report.layers) == 2
        x = torch.randn(3, 36)
        assert torch.equal(target(x), source(x))
        load_adapter(dense, tmp_path)
        assert type(dense.first) is FusedLoRALinear
        for name, parameter in source.first.adapter_parameters.items():
            assert torch.equal(getattr(dense.first, name), parameter)
        load_adapter(source, tmp_path)  # over what is adapted already

    def test_peft_over_bitsandbytes(self, tmp_path):
        peft = pytest.importorskip("peft")

        def base() -> nn.Module:
            torch.manual_seed(4)
            model = nn.Sequential()
            model.add_module("first", linear4bit(24, 36))
            model.add_module("second", linear4bit(20, 24))
            model.is_loaded_in_4bit = True
            return model

        ours, x = base(), torch.randn(5, 36)
        add_lora(ours, 4, ["first", "second"], lora_alpha=7)
        disturb(ours)
        save_adapter(ours, tmp_path)
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path).train()
        assert type(theirs.base_model.model.first).__name__ == "Linear4bit"
        assert relative_error(theirs(x).detach(), ours(x).detach()) < 1e-6
        theirs.save_pretrained(tmp_path / "theirs")
        again = base()
        load_adapter(again, tmp_path / "theirs")
        assert torch.equal(again(x), ours(x))

    def test_meta(self, tmp_path):
        source, target = small(), small()
        add_lora(source, 4, ["first"], base_quantization="nf4")
        save_adapter(source, tmp_path)
        target.first = NF4Linear(36, 24, device="meta")
        with pytest.raises(ValueError, match="first of the model is on the meta device"):
            load_adapter(target, tmp_path)


class TestGroups:
    def linears(self) -> list[nn.Module]:
        return [NF4Linear(36, 16), NF4Linear(36, 8, bias=False), nn.Linear(36, 8)]

    def test_q_k_v_over_4_bits_beside_dense(self, monkeypatch):
        group = FusedLoRAGroup.from_linears(self.linears(), (3, None, 2))
        disturb(group)
        assert [type(layer) for layer in group.layers] == [FusedQLoRALinear, NF4Linear, FusedLoRALinear]
        x = torch.randn(5, 36, requires_grad=True)
        singles = tuple(layer(x) for layer in group.layers)
        wanted = [x, *(p for p in group.parameters() if p.requires_grad and p.ndim == 2)]
        expected = torch.autograd.grad(sum(y.square().sum() for y in singles), wanted)
        calls = []
        monkeypatch.setattr(FusedQLoRALinear, "forward", lambda *_: calls.append(1))
        monkeypatch.setattr(NF4Linear, "forward", lambda *_: calls.append(1))
        together = group(x)
        got = torch.autograd.grad(sum(y.square().sum() for y in together), wanted)
        assert not calls  # by one function, not layer by layer
        for one, two in zip((*together, *got), (*singles, *expected), strict=True):
            assert relative_error(one.detach(), two.detach()) < 1e-5

    def test_gated_block(self):
        gate, up, down = NF4Linear(36, 24, dtype=torch.bfloat16), NF4Linear(36, 24), NF4Linear(24, 36)
        block = FusedLoRASwiGLU.from_linears(gate, up, down, 3)
        disturb(block)
        x = torch.randn(5, 36)
        gate, up, down = block.layers
        expected = down(F.silu(gate(x)) * up(x))
        assert relative_error(block(x).detach(), expected.detach()) < 1e-5
        block.merge()  # the gate, which was quantised from bfloat16, into bfloat16
        assert relative_error(block(x).detach(), expected.detach()) < 2 * torch.finfo(torch.bfloat16).eps

    def test_to_linears(self):
        group = FusedLoRAGroup.from_linears(self.linears(), (3, None, None))
        linears = group.to_linears()
        assert [type(layer) for layer in linears] == [nn.Linear] * 3
        assert torch.equal(linears[1].weight, group.layers[1].dequantize())
        assert linears[2] is group.layers[2]

    def test_layers_of_bitsandbytes(self):
        group = FusedLoRAGroup.from_linears([linear4bit(16, 36), linear4bit(8, 36)], (3, None))
        assert [type(layer) for layer in group.layers] == [FusedQLoRALinear, NF4Linear]

    def test_one_graph(self):
        torch._dynamo.reset()
        group = FusedLoRAGroup.from_linears(self.linears(), (3, None, 2))
        disturb(group)
        compiled = torch.compile(group, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for m in (7, 11, 64):  # no other size in the graph: dynamo would take them for the same
                x = torch.randn(m, 36)
                for one, two in zip(compiled(x), group(x), strict=True):
                    assert relative_error(one.detach(), two.detach()) < 1e-5
