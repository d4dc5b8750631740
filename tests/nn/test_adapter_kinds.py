"""DoRA, biases and embeddings for whole models: the same layers as in PEFT, files in both directions, by name or not at
all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_kernels import (
    FusedLoRAEmbedding,
    FusedLoRAExperts,
    FusedLoRALinear,
    add_lora,
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)
from tests.adapter_files import CONFIG, MAGNITUDES, WEIGHTS, base_model, good_config, good_tensors, write_folder
from tests.helpers import relative_error
from tests.nn.models import bert, gpt2, output, snapshot

# our options, PEFT's; targets and the rest are the same
KINDS: dict[str, tuple[dict, dict]] = {
    "DoRA": ({"use_dora": True}, {"use_dora": True}),
    "DoRA, rsLoRA": ({"use_dora": True, "use_rslora": True}, {"use_dora": True, "use_rslora": True}),
    "DoRA, trained bias": ({"use_dora": True, "train_bias": True}, {"use_dora": True, "bias": "lora_only"}),
    "lora_bias": ({"lora_bias": True}, {"lora_bias": True}),
    "trained bias": ({"train_bias": True}, {"bias": "lora_only"}),
    "both biases": ({"lora_bias": True, "train_bias": True}, {"lora_bias": True, "bias": "lora_only"}),
    "frozen A": ({"freeze_A": True}, {}),
}
# Conv1D's weights lie the other way round, which DoRA's norm and merging see; the rest is on one of the two models.
BOTH_MODELS = ("DoRA", "both biases")
ON_GPT2 = ("DoRA, rsLoRA", "trained bias", "frozen A")
BERT = ["query", "value", "output.dense"]
GPT2 = ["c_attn", "c_proj"]
PATTERNS = {"rank_pattern": {"value": 2, r"h\.1\.attn\.c_proj": 3}, "alpha_pattern": {"query": 4, "c_attn": 1.5}}
EMBEDDINGS: dict[str, tuple[Any, dict]] = {
    "BERT's words": (bert, {"target_modules": ["word_embeddings"]}),
    "BERT's words and positions, with linear layers": (
        bert,
        {"target_modules": ["word_embeddings", "position_embeddings", "query"], "rank_pattern": {"word_embeddings": 2}},
    ),
    "GPT-2's tied table": (gpt2, {"target_modules": ["wte"], "use_rslora": True, "alpha_pattern": {"wte": 3}}),
    "GPT-2's tables and Conv1D": (gpt2, {"target_modules": ["wte", "wpe", "c_attn"], "lora_dropout": 0.1}),
}


def cases() -> list:
    made = []
    for name, (ours, theirs) in KINDS.items():
        for make, targets in ((bert, BERT), (gpt2, GPT2)):
            if name not in BOTH_MODELS and (name in ON_GPT2) != (make is gpt2):
                continue
            patterns = {
                key: {p: v for p, v in pattern.items() if (p in ("value", "query")) == (make is bert)}
                for key, pattern in PATTERNS.items()
            }
            shared = {"target_modules": targets, **patterns}
            made.append(pytest.param(make, shared | ours, shared | theirs, id=f"{make.__name__} {name}"))
    for name, (make, shared) in EMBEDDINGS.items():
        made.append(pytest.param(make, shared, shared, id=name))
    return made


def disturb(model: nn.Module) -> None:
    """Moves every trained parameter, and every A and B, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def ours_of(make, options: dict) -> nn.Module:
    model = make()
    add_lora(model, 4, **options)
    disturb(model)
    return model


def theirs_of(make, config: dict) -> nn.Module:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "fan_in_fan_out": make is gpt2, **config})
    model = peft.get_peft_model(make(), settings).eval()
    disturb(model)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "ours", "theirs"), cases())
class TestWithPeft:
    def test_ours_to_peft_and_back(self, tmp_path, make, ours, theirs):
        peft = pytest.importorskip("peft")
        model = ours_of(make, ours)
        expected = output(model)
        assert relative_error(expected, output(make())) > 0.01
        save_adapter(model, tmp_path / "ours")
        loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
        assert relative_error(output(loaded), expected) < 1e-5
        loaded.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
        again = make()
        load_adapter(again, tmp_path / "theirs")
        assert torch.equal(output(again), expected)

    def test_peft_to_ours(self, tmp_path, make, ours, theirs):
        model = theirs_of(make, theirs)
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        expected = output(model)
        plain = make()
        report = load_adapter(plain, tmp_path)
        assert relative_error(output(plain), expected) < 1e-5
        trains = {name for name, p in model.base_model.model.named_parameters() if p.requires_grad}
        assert report.parameters.trainable == sum(
            p.numel() for name, p in model.base_model.model.named_parameters() if name in trains
        )
        adapted = make()
        add_lora(adapted, 4, **{**ours, "lora_alpha": 99, "alpha_pattern": None, "use_rslora": False})
        kept = [p for p in adapted.parameters() if p.requires_grad]
        load_adapter(adapted, tmp_path)
        assert torch.equal(output(adapted), output(plain))
        assert all(p is q for p, q in zip(kept, (p for p in adapted.parameters() if p.requires_grad), strict=True))

    def test_merged(self, make, ours, theirs):
        model = ours_of(make, ours)
        expected, state = output(model), {key: value.clone() for key, value in model.state_dict().items()}
        merge_adapter(model)
        assert relative_error(output(model), expected) < 1e-5
        unmerge_adapter(model)
        assert torch.equal(output(model), expected)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class TestAdd:
    def test_what_trains(self):
        model = bert()
        add_lora(model, 2, ["query", "word_embeddings"], train_bias=True, freeze_A=True)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trains == {
            f"encoder.layer.{i}.attention.self.query.{part}" for i in range(2) for part in ("bias", "lora_B")
        } | {f"embeddings.word_embeddings.lora_embedding_{part}" for part in "AB"}

    def test_biases_of_the_layers_that_have_one(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
        add_lora(model, 2, train_bias=True)
        assert [layer.train_bias for layer in model] == [True, False]
        assert model[0].bias.requires_grad

    def test_report_of_an_embedding(self):
        report = add_lora(bert(), 2, ["word_embeddings"])
        assert [tuple(layer) for layer in report.layers] == [("embeddings.word_embeddings", 16, 20, 2, 8.0)]

    def test_all_linear_leaves_embeddings_alone(self):
        model = bert()
        add_lora(model, 2)
        assert type(model.embeddings.word_embeddings) is nn.Embedding

    def test_expert_stacks_keep_training_and_merge(self):
        model = nn.ModuleDict({"experts": FusedLoRAExperts(2, 4, 4, 2), "head": nn.Linear(4, 4)})
        add_lora(model, 2, ["head"])
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            f"{name}.lora_{part}" for name in ("experts", "head") for part in "AB"
        }
        merge_adapter(model)
        assert model["experts"].merged
        unmerge_adapter(model)
        assert not model["experts"].merged


class Table(nn.Embedding):
    pass


def with_table(**options) -> nn.Module:
    return nn.ModuleDict({"table": nn.Embedding(8, 4, **options), "head": nn.Linear(4, 4)})


def with_subclass() -> nn.Module:
    return nn.ModuleDict({"table": Table(8, 4), "head": nn.Linear(4, 4)})


def with_hook() -> nn.Module:
    model = with_table()
    model["table"].register_forward_hook(lambda *args: None)
    return model


def without_bias() -> nn.Module:
    return nn.ModuleDict({"head": nn.Linear(4, 4, bias=False)})


BOTH = {"target_modules": ["head", "table"]}
REFUSED: dict[str, tuple[Any, dict, tuple[str, ...]]] = {
    "DoRA of a table": (with_table, {**BOTH, "use_dora": True}, ("table", "does not support use_dora")),
    "lora_bias of a table": (with_table, {**BOTH, "lora_bias": True}, ("table", "does not support lora_bias")),
    "max_norm": (lambda: with_table(max_norm=1.0), BOTH, ("table", "max_norm=1.0")),
    "sparse": (lambda: with_table(sparse=True), BOTH, ("table", "sparse=True")),
    "scaled gradient": (lambda: with_table(scale_grad_by_freq=True), BOTH, ("table", "scale_grad_by_freq=True")),
    "a table's subclass": (with_subclass, BOTH, ("table", "Table", "nn.Embedding")),
    "a table with a hook": (with_hook, BOTH, ("table", "hooks")),
    "no bias to train": (without_bias, {"train_bias": True}, ("train_bias", "none of the 1 layers")),
    "DoRA with lora_bias": (with_table, {"use_dora": True, "lora_bias": True}, ("lora_bias", "use_dora")),
}


@pytest.mark.parametrize(("make", "arguments", "mentions"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_and_unchanged(make, arguments, mentions):
    model = make()
    assert_unchanged = snapshot(model)
    with pytest.raises(ValueError, match="add_lora") as caught:
        add_lora(model, 2, **arguments)
    for text in mentions:
        assert text in str(caught.value)
    assert_unchanged()


@pytest.mark.parametrize("option", ["use_dora", "lora_bias", "train_bias", "freeze_A"])
def test_wrong_types_leave_it_unchanged(option):
    model = with_table()
    assert_unchanged = snapshot(model)
    with pytest.raises(TypeError, match=option):
        add_lora(model, 2, **{option: 1})
    assert_unchanged()


def plain() -> nn.Module:
    return base_model()


def adapted(**options) -> nn.Module:
    model = base_model()
    add_lora(model, 2, **options)
    disturb(model)
    return model


class Swapped(nn.Module):
    """The good adapter's layers, but the first one is a table."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(6, 5), nn.Linear(5, 4)


def biases(*layers: str) -> dict[str, Tensor]:
    sizes = {"first": 5, "second": 4}
    return {f"base_model.model.{name}.base_layer.bias": torch.ones(sizes[name]) for name in layers}


UNFIT: dict[str, tuple[Any, dict, dict, tuple[str, ...]]] = {
    "DoRA into plain LoRA": (
        adapted, {"use_dora": True}, MAGNITUDES, ("first", "lora_magnitude_vector", "the file has"),
    ),
    "plain LoRA into DoRA": (
        lambda: adapted(use_dora=True), {}, {}, ("first", "lora_magnitude_vector", "the layer in the model has"),
    ),
    "plain LoRA into lora_bias": (lambda: adapted(lora_bias=True), {}, {}, ("first", "lora_bias")),
    "biases into frozen ones": (
        adapted, {"bias": "lora_only"}, biases("first", "second"), ("first", "the file has bias"),
    ),
    "no biases into trained ones": (
        lambda: adapted(train_bias=True), {}, {}, ("first", "the layer in the model has bias"),
    ),
    "a bias too few": (plain, {"bias": "lora_only"}, biases("first"), ("second", "bias", "the file has not")),
    "none at all": (plain, {"bias": "lora_only"}, {}, ("first", "bias", "the file has not")),
    "a bias too many": (
        lambda: nn.ModuleDict({"first": nn.Linear(6, 5, bias=False), "second": nn.Linear(5, 4)}),
        {"bias": "lora_only"}, biases("first", "second"), ("first", "the file has bias"),
    ),
    "bias of another size": (
        plain, {"bias": "lora_only"}, {**biases("first"), "base_model.model.second.base_layer.bias": torch.ones(7)},
        ("bias of second", "(7,)", "(4,)"),
    ),
    "magnitude of another size": (
        plain, {"use_dora": True}, {**MAGNITUDES, "base_model.model.first.lora_magnitude_vector": torch.ones(7)},
        ("lora_magnitude_vector of first", "(7,)", "(5,)"),
    ),
    "linear adapter for a table": (Swapped, {}, {}, ("first", "lora_A")),
}  # fmt: skip


@pytest.mark.parametrize(("make", "config", "tensors", "mentions"), UNFIT.values(), ids=UNFIT.keys())
def test_model_that_the_file_does_not_fit(tmp_path, make, config, tensors, mentions):
    model = make()
    assert_unchanged = snapshot(model)
    folder = write_folder(tmp_path, good_config(**config), good_tensors(**tensors))
    with pytest.raises(ValueError, match=WEIGHTS) as caught:
        load_adapter(model, folder)
    for text in mentions:
        assert text in str(caught.value)
    assert_unchanged()


def test_what_the_refusals_start_from_loads(tmp_path):
    model = plain()
    tensors = good_tensors(**MAGNITUDES, **biases("first", "second"))
    load_adapter(model, write_folder(tmp_path, good_config(use_dora=True, bias="lora_only"), tensors))
    assert model.first.use_dora
    assert torch.equal(model.first.bias, torch.ones(5))
    assert model.first.bias.requires_grad


def test_trained_biases_of_a_model_without_any(tmp_path):
    """PEFT writes bias = "lora_only" whether or not the layers have biases."""
    model = nn.Sequential()
    model.add_module("first", nn.Linear(6, 5, bias=False))
    model.add_module("second", nn.Linear(5, 4, bias=False))
    load_adapter(model, write_folder(tmp_path, good_config(bias="lora_only")))
    assert not model.first.train_bias


class TestSaveRefuses:
    def refused(self, model: nn.Module, folder, *mentions: str) -> None:
        with pytest.raises(ValueError, match="save_adapter") as caught:
            save_adapter(model, folder / "new")
        for text in mentions:
            assert text in str(caught.value)
        assert not (folder / "new").exists()

    def test_options_of_some_layers_only(self, tmp_path):
        for option in ("use_dora", "lora_bias", "train_bias"):
            model = adapted()
            model.second = FusedLoRALinear.from_linear(nn.Linear(5, 4), 2, **{option: True})
            self.refused(model, tmp_path, f"second has {option}", "first has not")

    def test_dora_beside_a_table(self, tmp_path):
        model = with_table()
        add_lora(model, 2, ["table"])
        model["head"] = FusedLoRALinear.from_linear(model["head"], 2, use_dora=True)
        self.refused(model, tmp_path, "head has use_dora", "table has not")

    def test_experts(self, tmp_path):
        model = nn.ModuleDict({"experts": FusedLoRAExperts(2, 4, 4, 2), "head": nn.Linear(4, 4)})
        add_lora(model, 2, ["head"])
        self.refused(model, tmp_path, "experts is a stack")

    def test_a_magnitude_that_is_not_finite(self, tmp_path):
        model = adapted(use_dora=True)
        with torch.no_grad():
            model.first.lora_magnitude_vector[0] = float("nan")
        with pytest.raises(ValueError, match="lora_magnitude_vector of first"):
            save_adapter(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_what_is_written(tmp_path):
    model = adapted(use_dora=True, train_bias=True)
    merge_adapter(model)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["use_dora"], config["lora_bias"], config["bias"]) == (True, False, "lora_only")
    assert set(load_file(tmp_path / WEIGHTS)) == {
        f"base_model.model.{name}.{part}"
        for name in ("first", "second")
        for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.bias")
    }
    saved = load_file(tmp_path / WEIGHTS)["base_model.model.first.lora_magnitude_vector"]
    assert torch.equal(saved, model.first.lora_magnitude_vector)


def test_shared_table(tmp_path):
    """T5's encoder and decoder: one table under several names."""

    def make() -> nn.Module:
        torch.manual_seed(3)
        table = nn.Embedding(8, 4)
        return nn.ModuleDict({"shared": table, "encoder": nn.ModuleDict({"embed": table})})

    model = make()
    add_lora(model, 2, ["shared"])
    assert isinstance(model["shared"], FusedLoRAEmbedding)
    assert model["encoder"]["embed"] is model["shared"]
    disturb(model)
    save_adapter(model, tmp_path)
    again, ids = make(), torch.arange(8)
    load_adapter(again, tmp_path)
    assert torch.equal(again["encoder"]["embed"](ids), model["shared"](ids))
