"""`add_lora` puts layers in the right places, everything or nothing, and says what it did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels import (
    FusedLoRALinear,
    add_lora,
    load_adapter,
    merge_adapter,
    save_adapter,
    trainable_parameters,
    unmerge_adapter,
)
from tests.adapter_files import base_model
from tests.helpers import relative_error
from tests.nn.models import bert, disturb, gpt2, output, snapshot


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 4)))


def adapted(model: nn.Module) -> dict[str, int]:
    return {name: m.r for name, m in model.named_modules() if isinstance(m, FusedLoRALinear)}


@pytest.mark.parametrize("make", [bert, gpt2])
def test_adapted_model_starts_as_the_model_and_trains_only_adapters(make):
    model = make()
    before = output(model)
    report = add_lora(model, r=3)
    assert relative_error(output(model), before) < 1e-6
    model(torch.arange(6)[None])[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("lora_A", "lora_B"):
            assert parameter.requires_grad
        else:
            assert not parameter.requires_grad
            assert parameter.grad is None
    trained = [layer.lora_B.grad for layer in model.modules() if isinstance(layer, FusedLoRALinear)]
    used = [grad for grad in trained if grad is not None]  # BERT's pooler has no part in the output
    assert len(used) >= len(trained) - 1
    assert all(grad.abs().sum() > 0 for grad in used)
    assert len(report.layers) == len(trained)


class TestTargets:
    """Names mean what they mean to PEFT."""

    @pytest.mark.parametrize(
        "targets",
        [
            ["query"],
            ["query", "output.dense"],
            ["encoder.layer.1.output.dense"],
            r"encoder\.layer\.0\..*(query|key)",
            "all-linear",
            "ALL-LINEAR",
        ],
        ids=str,
    )
    @pytest.mark.parametrize(
        "exclude", [None, ["encoder.layer.1.attention.self.query"], r".*layer\.1.*self.*"], ids=str
    )
    def test_same_layers_as_peft(self, targets, exclude):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=targets, exclude_modules=exclude)
        theirs = peft.get_peft_model(bert(), config).base_model.model
        expected = {n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        model = bert()
        report = add_lora(model, 2, targets, exclude_modules=exclude)
        assert set(adapted(model)) == expected == {layer.name for layer in report.layers}

    def test_all_linear_leaves_out_the_output_embeddings(self):
        model = gpt2()
        add_lora(model, 2)
        assert isinstance(model.lm_head, nn.Linear)
        assert set(adapted(model)) == {
            f"transformer.h.{i}.{name}"
            for i in range(2)
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }

    def test_patterns_and_options(self):
        model = bert()
        add_lora(
            model, 4, ["query", "value"], lora_alpha=8, use_rslora=True, lora_dropout=0.1, adapter_dtype=torch.bfloat16,
            rank_pattern={r"layer\.1\..*\.query": 2, "query": 3}, alpha_pattern={"value": 6},
        )  # fmt: skip
        ranks = {name.replace("attention.self.", ""): (m.r, m.lora_alpha) for name, m in model.named_modules()
                 if isinstance(m, FusedLoRALinear)}  # fmt: skip
        assert ranks == {
            "encoder.layer.0.query": (3, 8), "encoder.layer.0.value": (4, 6),
            "encoder.layer.1.query": (2, 8), "encoder.layer.1.value": (4, 6),
        }  # fmt: skip
        layer = model.encoder.layer[1].attention.self.query
        assert layer.scaling == 8 / 2**0.5
        assert layer.lora_dropout == 0.1
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16

    def test_any_iterable_of_names(self):
        for targets in (("0",), {"0"}, (name for name in ["0"])):
            model = mlp()
            add_lora(model, 2, targets)
            assert set(adapted(model)) == {"0", "2.0"}


class TestShared:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"two": self.one, "other": nn.Linear(4, 4)})

        def forward(self, x):
            return self.block["other"](self.block["two"](self.one(x)))

    def test_module_under_two_names_is_replaced_once_and_stays_shared(self):
        model = self.Twice()
        report = add_lora(model, 2, ["two"])
        assert isinstance(model.one, FusedLoRALinear)
        assert model.one is model.block["two"]
        assert [layer.name for layer in report.layers] == ["one (also block.two)"]
        assert report.parameters.trainable == 2 * 2 * 4
        assert report.parameters.total == 2 * 2 * 4 + 2 * (16 + 4)

    def test_one_excluded_name_excludes_it(self):
        model = self.Twice()
        add_lora(model, 2, "all-linear", exclude_modules=["one"])
        assert set(adapted(model)) == {"block.other"}

    def test_tied_weight_stays_tied(self):
        model = gpt2()
        add_lora(model, 2, ["lm_head", "c_attn"])
        assert model.lm_head.weight is model.transformer.wte.weight
        before = model.transformer.wte.weight.clone()
        disturb(model)
        merge_adapter(model)
        assert torch.equal(model.transformer.wte.weight, before)
        unmerge_adapter(model)
        assert model.lm_head.weight is model.transformer.wte.weight


def with_hook() -> nn.Module:
    model = mlp()
    model[2][1].register_forward_hook(lambda *args: None)
    return model


def with_int_weight() -> nn.Module:
    model = mlp()
    model[2][1].weight = nn.Parameter(torch.ones(4, 5, dtype=torch.int8), requires_grad=False)
    return model


def with_subclass() -> nn.Module:
    class Mine(nn.Linear):
        pass

    model = mlp()
    model[2][1] = Mine(5, 4)
    return model


def with_forward() -> nn.Module:
    model = mlp()
    model[2][1].forward = lambda x: x
    return model


def with_compiled_layer() -> nn.Module:
    model = mlp()
    model[2][1] = torch.compile(model[2][1], backend="eager")
    return model


def partly_adapted() -> nn.Module:
    model = mlp()
    add_lora(model, 2, ["2.1"])
    return model


def wrapped_by_peft() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(mlp(), peft.LoraConfig(r=2, target_modules=["0"]))


REFUSED = {
    "names no layer": (mlp, {"target_modules": ["query", "key"]}, ("['query', 'key']", "0, 1")),
    "string for a list": (mlp, {"target_modules": "linear"}, ("regular expression", "0, 1")),
    "all excluded": (mlp, {"exclude_modules": ".*"}, ("exclude_modules",)),
    "nothing linear": (nn.Tanh, {}, ("nothing",)),
    "a container": (mlp, {"target_modules": ["0", "2"]}, ("2 is torch.nn", "Sequential")),
    "no linear layer": (mlp, {"target_modules": ["0", "1"]}, ("Tanh",)),
    "subclass": (with_subclass, {"target_modules": ["0", "2.1"]}, ("2.1", "Mine")),
    "hook": (with_hook, {}, ("2.1", "hooks")),
    "own forward": (with_forward, {}, ("2.1", "forward")),
    "compiled layer": (with_compiled_layer, {}, ("2.1", "compile")),
    "integers": (with_int_weight, {}, ("2.1", "torch.int8")),
    "twice": (partly_adapted, {}, ("2.1", "already")),
    "PEFT": (wrapped_by_peft, {}, ("Hugging Face PEFT",)),
    "root": (lambda: nn.Linear(2, 2), {}, ("from_linear",)),
    "unused pattern": (mlp, {"rank_pattern": {"query": 2}}, ("'query'",)),
    "unused alpha": (mlp, {"alpha_pattern": {"query": 2}}, ("'query'",)),
    "r = 0": (mlp, {"r": 0}, ("r is 0",)),
    "r = 513": (mlp, {"r": 513}, ("r is 513",)),
    "pattern of 0": (mlp, {"rank_pattern": {"0": 0}}, ("rank_pattern", "0")),
    "infinite alpha": (mlp, {"lora_alpha": float("inf")}, ("lora_alpha",)),
    "absurd alpha": (mlp, {"lora_alpha": 1e9}, ("lora_alpha",)),
    "negative dropout": (mlp, {"lora_dropout": -0.1}, ("lora_dropout",)),
    "bad expression": (mlp, {"target_modules": "("}, ("regular expression",)),
    "no targets": (mlp, {"target_modules": []}, ("target_modules is empty",)),
}


@pytest.mark.parametrize(("make", "arguments", "mentions"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_and_unchanged(make, arguments, mentions):
    model = make()
    assert_unchanged = snapshot(model)
    with pytest.raises(ValueError, match="add_lora") as caught:
        add_lora(model, **arguments)
    for text in mentions:
        assert text in str(caught.value)
    assert_unchanged()


@pytest.mark.parametrize(
    "arguments",
    [{"r": 2.0}, {"r": "2"}, {"r": True}, {"lora_alpha": "3"}, {"target_modules": 3}, {"target_modules": [3]},
     {"use_rslora": "yes"}, {"rank_pattern": [1]}, {"adapter_dtype": "bfloat16"}, {"adapter_dtype": torch.int8}],
    ids=str,
)  # fmt: skip
def test_wrong_types_leave_it_unchanged(arguments):
    model = mlp()
    assert_unchanged = snapshot(model)
    with pytest.raises(TypeError):
        add_lora(model, **arguments)
    assert_unchanged()


@pytest.mark.parametrize("function", [add_lora, merge_adapter, save_adapter, load_adapter])
def test_no_module(function, tmp_path):
    with pytest.raises(TypeError, match="model is str"):
        function("model", *[tmp_path] * (function in (save_adapter, load_adapter)))


def test_failure_half_way_leaves_the_model_unchanged(monkeypatch):
    model = mlp()
    assert_unchanged = snapshot(model)
    built = []

    def fail_at_the_third(linear, *args, **kwargs):
        if len(built) == 2:
            raise MemoryError("no memory")
        linear.weight.requires_grad_(False)
        built.append(linear)
        return linear

    monkeypatch.setattr(FusedLoRALinear, "from_linear", fail_at_the_third)
    with pytest.raises(MemoryError):
        add_lora(model)
    assert_unchanged()


def test_more_layers_can_be_added_later():
    model = mlp()
    add_lora(model, 2, ["2.0"])
    first = model[2][0].lora_A
    report = add_lora(model, 3, ["2.1"])
    assert adapted(model) == {"2.0": 2, "2.1": 3}
    assert model[2][0].lora_A is first
    assert first.requires_grad
    assert len(report.layers) == 2


def test_models_wrapped_by_ddp_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(mlp())
        assert_unchanged = snapshot(wrapped)
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            add_lora(wrapped)
        assert_unchanged()
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_model_runs_the_new_layers():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 6)
    before = compiled(x)
    report = add_lora(compiled, 2)
    assert {layer.name for layer in report.layers} == {"0", "2.0", "2.1"}
    disturb(model)
    assert not torch.allclose(compiled(x), before)
    assert torch.allclose(compiled(x), model(x))


@pytest.mark.parametrize("padding", [False, True])
def test_pytorchs_encoder_does_not_bypass_the_adapter(padding):
    """In inference nn.TransformerEncoderLayer passes linear1.weight to a fused call that would miss the update."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    report = add_lora(model, 2)
    assert "layers.0.self_attn.out_proj (NonDynamicallyQuantizableLinear)" in report.skipped
    assert {layer.name for layer in report.layers} == {f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)}
    disturb(model)
    x = torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([5, 4, 3])[:, None] if padding else None
    expected = model.train()(x, src_key_padding_mask=mask)  # no dropout; training never takes the fused call
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(model.eval()(x, src_key_padding_mask=mask), expected, atol=1e-5)


class TestReport:
    def test_text(self):
        report = add_lora(base_model(), 2, ["first", "second", "query"], lora_alpha=3, rank_pattern={"second": 4})
        assert str(report) == (
            "layer   shape    r  scaling\n"
            "------  -----  ---  -------\n"
            "first   5 x 6    2      1.5\n"
            "second  4 x 5    4     0.75\n"
            "2 layers adapted; trainable parameters: 58 of 117 (49.57 %)\n"
            "matched nothing: query"
        )
        assert report.unmatched == ("query",)
        assert [tuple(layer) for layer in report.layers] == [("first", 5, 6, 2, 1.5), ("second", 4, 5, 4, 0.75)]

    def test_one_layer_is_singular(self):
        assert "\n1 layer adapted; " in str(add_lora(mlp(), 2, ["2.1"]))

    def test_counts(self):
        model = mlp()
        assert trainable_parameters(model) == (89, 89)
        add_lora(model, 2, ["2.1"])
        assert trainable_parameters(model) == (18, 107)
        assert str(trainable_parameters(model)) == "trainable parameters: 18 of 107 (16.82 %)"
        assert str(trainable_parameters(nn.Tanh())) == "trainable parameters: 0 of 0 (0 %)"


class TestMerge:
    def test_merged_computes_the_same_and_unmerge_restores(self):
        model = bert().double()
        add_lora(model, 2)
        disturb(model)
        expected, state = output(model), {k: v.clone() for k, v in model.state_dict().items()}
        merge_adapter(model)
        merge_adapter(model)
        assert relative_error(output(model), expected) < 1e-12
        unmerge_adapter(model)
        assert torch.equal(output(model), expected)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_one_that_cannot_be_merged_leaves_all_unmerged(self):
        model = mlp()
        add_lora(model, 2)
        model[0].merge()
        with torch.no_grad():
            model[2][1].lora_B.fill_(float("inf"))
        assert_unchanged = snapshot(model)
        with pytest.raises(ValueError, match=r"2\.1.*not finite"):
            merge_adapter(model)
        assert [model[0].merged, model[2][0].merged, model[2][1].merged] == [True, False, False]
        assert_unchanged()

    @pytest.mark.parametrize("function", [merge_adapter, unmerge_adapter])
    def test_nothing_to_merge(self, function):
        with pytest.raises(ValueError, match="no FusedLoRALinear"):
            function(mlp())


def test_public_names():
    for name in (
        "add_lora",
        "save_adapter",
        "load_adapter",
        "merge_adapter",
        "unmerge_adapter",
        "trainable_parameters",
    ):
        assert name in peft_kernels.__all__
        assert callable(getattr(peft_kernels, name))
