"""What users do with a PEFT model around training works on an accelerated one."""

from __future__ import annotations

import copy
import io
import pathlib
import pickle
import runpy

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.utils.checkpoint import checkpoint

from peft_kernels import accelerate, restore
from peft_kernels.integrations.peft import FusedPeftLinear
from tests.integrations import models
from tests.integrations.models import Toy, assert_close, features, llama, randomise, tokens, toy, transformer

TARGETS = ["first", "second"]


def test_deepcopy_and_pickle_keep_the_fused_layers(fused):
    model = toy(lora_dropout=0.1).eval()
    report = accelerate(model)
    stock = models.twin(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.base_model.model.first, FusedPeftLinear)
        assert_close(copied, stock, features())
        assert fused() == 2
        with copied.disable_adapter():
            copied(features())
    assert report.fallbacks == {}, "a copy counts for itself"


def test_torch_save_of_the_whole_model(fused):
    model = toy()
    accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(features()), model(features()))
    assert fused() == 4


def test_state_dict_and_checkpoints_are_pefts(tmp_path, fused):
    model = toy()
    stock = models.twin(model)
    accelerate(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    model.save_pretrained(tmp_path / "fused")
    stock.save_pretrained(tmp_path / "stock")
    files = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "fused").iterdir())
    name = "adapter_model.safetensors"
    assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Toy(), tmp_path / "fused", is_trainable=True)
    accelerate(loaded)
    assert_close(loaded, stock, features())
    assert fused() == 2
    stock.load_state_dict(model.state_dict())
    model.load_state_dict(stock.state_dict())


def test_adapters_added_and_switched_later(fused):
    model = toy()
    accelerate(model)
    model.add_adapter("other", LoraConfig(r=7, lora_alpha=3, lora_dropout=0.0, target_modules=TARGETS))
    randomise(model)
    stock = models.twin(model)
    outputs = []
    for name in ("other", "default", "other"):
        model.set_adapter(name), stock.set_adapter(name)
        assert_close(model, stock, features())
        assert fused() == 2
        outputs.append(model(features()))
        fused()
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])
    model.delete_adapter("default"), stock.delete_adapter("default")
    assert_close(model, stock, features())
    assert fused() == 2


def test_new_targets_are_taken_over_by_a_second_call(fused):
    model = toy(target_modules=["first"])
    accelerate(model)
    model.add_adapter("wider", LoraConfig(r=2, target_modules=TARGETS))
    randomise(model).set_adapter("wider")
    model(features())
    assert fused() == 1
    assert accelerate(model).fused == 2
    assert_close(model, models.twin(model), features())
    assert fused() == 2


def test_disable_adapter_gives_the_base_model_and_leaves_flags(fused):
    model = toy()
    accelerate(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = model(features())
    assert fused() == 2
    with model.disable_adapter():
        inside = model(features())
        assert fused() == 0
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert torch.equal(model(features()), before)
    assert torch.equal(inside, model.unload()(features()))


def test_merge_and_unmerge(fused):
    model = toy()
    accelerate(model)
    before = model(features())
    weight = model.base_model.model.first.base_layer.weight.clone()
    model.merge_adapter()
    assert fused() == 2
    torch.testing.assert_close(model(features()), before)
    assert fused() == 0
    with model.disable_adapter():
        torch.testing.assert_close(model(features()), copy.deepcopy(model).unload()(features()))
    assert not model.base_model.model.first.merged, "PEFT unmerges when a disabled layer is called"
    torch.testing.assert_close(model.base_model.model.first.base_layer.weight, weight)
    torch.testing.assert_close(model(features()), before)
    assert fused() == 2
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(features()), before)
    assert fused() == 0


def test_merge_of_conv1d(fused):
    model = transformer(models.gpt2).eval()
    accelerate(model)
    batch = tokens(model)
    before = model(**batch).loss
    assert fused() == 8
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).loss, before)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).loss, before)
    assert fused() == 8


def test_weighted_adapter(fused):
    model = toy()
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    randomise(model)
    accelerate(model)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mix", combination_type="cat")
    model.set_adapter("mix")
    assert_close(model, models.twin(model), features())
    assert fused() == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_dropout_changes_nothing(reentrant, fused):
    model = transformer(llama, lora_dropout=0.3).train()
    model.enable_input_require_grads()
    accelerate(model)
    batch = tokens(model)

    def grads():
        model.zero_grad()
        torch.manual_seed(4)
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = grads()
    calls = fused()
    assert calls == 14
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = grads()
    assert fused() == 2 * calls, "every layer has run again in backward"
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert any(grad.abs().sum() > 0 for grad in plain.values())


def test_checkpointed_layer_alone(fused):
    model = toy(lora_dropout=0.4)
    accelerate(model)
    layer, x = model.base_model.model.first, features()
    torch.manual_seed(9)
    expected = torch.autograd.grad(layer(x).sum(), (x, layer.lora_A["default"].weight))
    torch.manual_seed(9)
    y = checkpoint(layer, x, use_reentrant=False)
    torch.manual_seed(123)
    grads = torch.autograd.grad(y.sum(), (x, layer.lora_A["default"].weight))
    assert all(map(torch.equal, grads, expected))
    assert fused() == 3


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles_whole_and_once(fresh_compiler):
    from torch._dynamo.backends.common import aot_autograd

    model, graphs = toy(), []
    stock = models.twin(model)
    accelerate(model)

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    model.compile(fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    assert_close(model, stock, features())
    forward, backward = graphs
    assert forward.count("torch.ops.peft_kernels.lora_linear.default") == 2
    assert backward.count("torch.ops.peft_kernels.lora_linear_backward.default") == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(model, stock, features())
    assert len(graphs) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(features()), stock(features()))
    with model.disable_adapter(), stock.disable_adapter():
        torch.testing.assert_close(model(features()), stock(features()))
    for module in (model, stock):
        module.base_model.model.first.set_scale("default", 5)
    assert_close(model, stock, features())


def test_compiles_with_dropout_and_conv1d(fresh_compiler):
    model = transformer(models.gpt2, lora_dropout=0.5).train()
    accelerate(model)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = features(3, 5, 32)
    first = compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert not torch.equal(compiled(x), first)
    first.sum().backward()
    assert x.grad.isfinite().all()


def test_compiles_with_inductor(fresh_compiler):
    model = toy(target_modules=["first"])
    stock = models.twin(model)
    accelerate(model, strict=True)
    model.compile(fullgraph=True)
    assert_close(model, stock, features())


def test_optimizer_steps_follow_peft(fused):
    model = transformer(llama)
    stock = models.twin(model)
    accelerate(model)
    batch, losses = tokens(model), []
    for module in (model, stock):
        optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(4):
            loss = module(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-5)
    assert losses[3] < losses[0]
    assert fused() == 4 * 14


def test_autocast_is_as_accurate_as_peft(fused):
    """In float64 terms, over the gradients of a whole model; single tensors differ by the luck of rounding."""
    model = transformer(llama)
    stock = models.twin(model)
    _, truth = models.gradients(models.twin(model).double(), tokens(model))
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        value, grads = models.gradients(model, tokens(model))
        assert fused() == 14
        expected, expected_grads = models.gradients(stock, tokens(model))
    assert value.dtype == expected.dtype
    assert all(grads[name].dtype == expected_grads[name].dtype == torch.float32 for name in truth)

    def error(candidate):
        return sum(float((candidate[name] - truth[name]).norm() ** 2) for name in truth) ** 0.5

    assert error(grads) <= 1.2 * error(expected_grads)


def test_inference_mode_and_generate(fused):
    model = transformer(llama).eval()
    stock = models.twin(model)
    accelerate(model)
    ids = tokens(model)["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits)
    assert fused() == 14
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, stock.generate(input_ids=ids, max_new_tokens=3, do_sample=False))
    assert fused() >= 14


def test_trainer(tmp_path, fused):
    from transformers import Trainer, TrainingArguments

    model = transformer(llama, lora_dropout=0.1)
    accelerate(model)
    ids = tokens(model, rows=8)["input_ids"]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, gradient_checkpointing=True, bf16=True,
    )  # fmt: skip
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert result.global_step == 3
    assert fused() >= 3 * 14
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    assert restore(model) == 14


def test_example(capsys):
    path = pathlib.Path(__file__).parents[2] / "examples" / "accelerate_peft.py"
    losses = runpy.run_path(str(path))["main"]()
    assert losses == sorted(losses, reverse=True)
    text = capsys.readouterr().out
    assert "14 of 14 layers fused" in text
    assert "equal: 30 outputs and gradients, 14 fused layers" in text
