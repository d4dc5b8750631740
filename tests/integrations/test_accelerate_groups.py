"""Layers that share an input: computed together where that is the same, right in every case."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from peft import LoraConfig
from torch import nn

from peft_kernels import accelerate, restore
from peft_kernels.integrations import _peft_groups
from tests.integrations import blocks, models
from tests.integrations.blocks import attention
from tests.integrations.models import assert_close, bert, features, llama, randomise, tokens, transformer

ONE = {"lora_linear_group": 1, "lora_linear": 1}
SINGLY = {"lora_linear": 4}


def inner(model):
    return model.base_model.model


def pair(kind=blocks.Attention, **config):
    """An accelerated model and PEFT's own."""
    model = attention(kind, **config)
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    return model, stock, report


@pytest.mark.parametrize(
    ("make", "expected", "dtype"),
    [
        (
            llama,
            {"lora_linear_group": 2, "lora_linear": 2, "lora_swiglu_mlp": 2},
            torch.float64,
        ),  # q/k/v, o, gate/up/down
        (bert, {"lora_linear_group": 2, "lora_linear": 7}, torch.float32),
    ],
    ids=["llama", "bert"],
)
def test_one_call_for_the_projections_of_a_block(make, expected, dtype, fused, monkeypatch):
    model = transformer(make, exclude_modules=["classifier"]).to(dtype)
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    assert_close(model, stock, tokens(model))
    assert fused.ops() == expected
    assert fused() == report.fused
    with torch.no_grad():
        assert_equal_outputs(model, stock, tokens(model))
    assert fused.ops() == expected
    assert report.calls.ended == {}


def assert_equal_outputs(model, stock, batch):
    torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)


def test_the_report_shows_the_groups():
    report = accelerate(transformer(llama))
    lines = {line.split()[0]: line for line in str(report).splitlines()}
    line = lines["base_model.model.model.layers.{0-1}.self_attn"]
    assert "q_proj, k_proj, v_proj" in line
    assert line.split()[1] == "2"
    assert [block.layers for block in report.blocks].count(("q_proj", "k_proj", "v_proj")) == 2


def test_groups_can_be_switched_off(fused):
    model = attention()
    assert accelerate(model, groups=False).blocks == ()
    model(features())
    assert fused.ops() == SINGLY
    assert len(accelerate(model).blocks) == 1
    model(features())
    assert fused.ops() == ONE
    accelerate(model, groups=False)
    model(features())
    assert fused.ops() == SINGLY
    accelerate(model)
    restore(model)
    model(features())
    assert fused.ops() == {}
    assert "_peft_kernels_place" not in inner(model).q.__dict__


def test_small_problems_on_a_cpu_are_computed_one_by_one(monkeypatch, fused):
    """Where handing over takes longer than it saves; decided by the shape alone, so that a checkpoint agrees."""
    model, stock, report = pair()
    llama_model = transformer(llama)
    accelerate(llama_model)
    monkeypatch.setattr(_peft_groups, "SMALL_ON_CPU", 5 * 24 * 16)
    assert_close(model, stock, features(5, 24))
    assert fused.ops() == ONE
    assert_close(model, stock, features(4, 24))
    assert fused.ops() == SINGLY
    monkeypatch.setattr(_peft_groups, "SMALL_ON_CPU", 1 << 25)
    llama_model(**tokens(llama_model))
    assert fused.ops() == {"lora_linear": 14}
    assert report.calls.ended == {}


@pytest.mark.parametrize("targets", [["q", "v"], ["q", "k", "v"]], ids=str)
def test_only_adapted_projections_are_members(targets, fused):
    model, stock, _ = pair(target_modules=targets)
    assert_close(model, stock, features())
    assert_close(model, stock, features(2, 3, 24))
    assert fused.ops() == {"lora_linear_group": 2}
    assert fused() == 2 * len(targets)


def test_adapters_of_many_kinds_in_one_group(fused):
    """Ranks, scales, a missing adapter, several at once."""
    model = attention(rank_pattern={"q": 7, "v": 1}, alpha_pattern={"k": 3}, use_rslora=True)
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["k", "v", "o"]))
    stock = models.twin(randomise(model))
    accelerate(model, strict=True)
    for active in (["default"], ["default", "other"]):
        for module in (model, stock):
            module.base_model.set_adapter(active)
        assert_close(model, stock, features())
    assert fused.ops() == {"lora_linear_group": 3, "lora_linear": 1}
    for module in (model, stock):
        module.base_model.set_adapter(["other"])
    assert_close(model, stock, features())
    assert fused.ops() == ONE


def test_a_member_that_runs_pefts_code_is_left_out(fused):
    model, stock, report = pair()
    accelerate(model)
    for module in (model, stock):
        inner(module).k.lora_A["default"].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert_close(model, stock, features())
    assert fused.ops() == ONE
    assert fused() == 3
    assert report.calls.ended == {}


def test_members_with_a_bias_of_their_adapter_run_singly(fused):
    model, stock, report = pair(lora_bias=True)
    assert_close(model, stock, features())
    assert fused.ops() == SINGLY
    assert report.calls.ended == {}


def test_disabled_merged_and_switched_adapters(fused):
    model, stock, _ = pair()
    x = features()
    with model.disable_adapter(), stock.disable_adapter():
        assert torch.equal(model(x), stock(x))
    model.merge_adapter(), stock.merge_adapter()
    assert torch.equal(model(x), stock(x))
    assert fused.ops() == {}
    model.unmerge_adapter(), stock.unmerge_adapter()
    assert_close(model, stock, x)
    assert fused.ops() == ONE
    for module in (model, stock):
        torch.manual_seed(9)
        module.add_adapter("other", LoraConfig(r=2, target_modules=blocks.PROJECTIONS))
        randomise(module).set_adapter("other")
    assert_close(model, stock, x)
    assert fused.ops() == {"lora_linear_group": 1}


def test_hooks_of_every_member_run_and_count(fused):
    model, stock, _ = pair()
    seen = []
    for module in (model, stock):
        for name in blocks.PROJECTIONS:
            layer = getattr(inner(module), name)
            layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape))
            layer.register_forward_hook(lambda layer, inputs, output: output * 2)
    assert_close(model, stock, features())
    assert len(seen) == 6
    assert fused.ops() == ONE


def grads_of(model, x):
    return models.gradients(model, x)[1]


def test_dropout_has_a_mask_per_projection(fused):
    model = attention(lora_dropout=0.5)
    accelerate(model)
    block, x = inner(model), features(64, 24)
    for which in ("lora_A", "lora_B"):
        getattr(block.v, which)["default"].weight.data = getattr(block.k, which)["default"].weight.data.clone()
    torch.manual_seed(1)
    q, k, v = block.q(x), block.k(x), block.v(x)
    assert fused.ops() == {"lora_linear_group": 1}
    k_update, v_update = k - block.k.base_layer(x), v - block.v.base_layer(x)
    assert not torch.allclose(k_update, v_update)
    whole = block.k.eval()(x) - block.k.base_layer(x)
    for update in (k_update, v_update):
        assert 1.1 < float(update.norm() / whole.norm()) < 1.7  # E||drop(x)||² = ||x||² / (1 - p)
    block.k.train()
    torch.manual_seed(1)
    assert torch.equal(block.q(x), q)
    assert torch.equal(block.k(x), k)


def test_dropout_gradients_use_the_forward_mask(fused):
    """Along fixed masks each projection is linear in A, so that y - x Wᵀ = <dy/dA, A>."""
    model = attention(lora_dropout=0.5).double()
    accelerate(model)
    block, x = inner(model), features(6, 24, dtype=torch.float64)
    ys = [getattr(block, name)(x) for name in blocks.PROJECTIONS]
    for name, y in zip(blocks.PROJECTIONS, ys, strict=True):
        layer = getattr(block, name)
        update = (y - layer.base_layer(x)).sum()
        (grad,) = torch.autograd.grad(update, layer.lora_A["default"].weight, retain_graph=True)
        torch.testing.assert_close((grad * layer.lora_A["default"].weight).sum(), update)
    assert fused.ops() == {"lora_linear_group": 1}


@pytest.mark.parametrize("kind", [blocks.Overwriting, blocks.HalfCheckpointed], ids=lambda kind: kind.__name__)
def test_what_the_model_does_with_the_results_is_its_own_business(kind, fused):
    model, stock, report = pair(kind)
    for _ in range(2):
        assert_close(model, stock, features())
    assert report.calls.ended == {}


@pytest.mark.parametrize("kind", [blocks.Crossed, blocks.Branching], ids=lambda kind: kind.__name__)
def test_no_group_where_the_source_does_not_show_one(kind, fused):
    model, stock, report = pair(kind)
    together = {frozenset(block.layers) for block in report.blocks}
    assert frozenset("qkv") not in together
    for _ in range(2):
        assert_close(model, stock, features())
    assert report.calls.ended == {}


def test_copies_have_groups_of_their_own(fused):
    model, stock, report = pair()
    x = features()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(copied, stock, x)
        assert fused.ops() == ONE
        nn.init.zeros_(inner(copied).k.lora_B["default"].weight)
        torch.testing.assert_close(inner(copied).k(x), inner(copied).k.base_layer(x))
        fused.ops()
    assert_close(model, stock, x)
    assert fused.ops() == ONE
    alone = copy.deepcopy(inner(model).q)
    torch.testing.assert_close(alone(x), inner(stock).q(x))
    assert fused.ops() == {"lora_linear": 1}, "a copy of one layer has no siblings"
    assert report.calls.ended == {}


def test_shallow_copies_and_replicas_run_singly(fused):
    """DataParallel's replicas share the attributes of the original, and run in threads beside it."""
    model, stock, report = pair()
    block = inner(model)
    replica = block._replicate_for_data_parallel()
    for name, child in block.named_children():
        replica._modules[name] = copy.copy(child) if name == "k" else child._replicate_for_data_parallel()
        replica._modules[name]._modules = dict(child._modules)
    x = features()
    torch.testing.assert_close(replica(x), stock(x))
    assert fused.ops() == SINGLY
    assert_close(model, stock, x)
    assert fused.ops() == ONE
    assert report.calls.ended == {}


def test_threads_do_not_mix(fused):
    model, stock, report = pair()
    barrier = threading.Barrier(2)
    inner(model).q.register_forward_hook(lambda *_: (barrier.wait(30), None)[1])
    inner(model).k.register_forward_hook(lambda *_: (barrier.wait(30), None)[1])
    xs = [features().detach() * scale for scale in (1, -2)]
    results: dict[int, torch.Tensor] = {}

    def run(index):
        results[index] = model(xs[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, x in enumerate(xs):
        torch.testing.assert_close(results[index], stock(x))
    assert fused.ops() == {"lora_linear_group": 2, "lora_linear": 2}
    assert report.calls.ended == {}


def test_accumulated_gradients_and_retained_graphs(fused):
    model, stock, _ = pair()
    for module in (model, stock):
        for scale in (1, 2):
            y = module(features() * scale).square().sum()
            y.backward(retain_graph=True)
            y.backward()
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        if p.requires_grad:
            assert error([p.grad], [q.grad]) < 1e-5, name
    assert fused.ops() == {"lora_linear_group": 2, "lora_linear": 2}


def test_an_unused_projection_has_no_gradient(fused):
    model, stock, _ = pair()
    x = features()
    for module in (model, stock):
        block = inner(module)
        q, _, v = block.q(x), block.k(x), block.v(x)
        (q.sum() + v.square().sum()).backward()
    assert inner(model).k.lora_B["default"].weight.grad is None
    torch.testing.assert_close(
        inner(model).v.lora_A["default"].weight.grad, inner(stock).v.lora_A["default"].weight.grad
    )
    assert fused.ops() == {"lora_linear_group": 1}


def test_inference_tensors_run_singly(fused):
    """Nothing counts the changes of such a tensor, so that a changed x would not be noticed."""
    model, stock, report = pair(blocks.InPlace)
    with torch.inference_mode():
        x = torch.ones(3, 24)
        torch.testing.assert_close(model(x), stock(x))
    assert fused.ops() == SINGLY
    assert report.calls.ended == {}


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_sixteen_bits_as_accurate_as_peft(adapter, autocast, fused):
    """Over all gradients of the block; what PEFT computes in float32 is compared with its 16-bit adapters."""
    model = attention().to(torch.float32 if autocast else torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    stock = models.twin(model)
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    accelerate(model, strict=True)
    x = features(200, 24, dtype=torch.float32 if autocast else torch.bfloat16)
    truth_value, truth = models.gradients(models.twin(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, grads = models.gradients(model, x)
        eager_value, eager = models.gradients(stock, x)
    assert fused.ops() == ONE
    assert error([value], [truth_value]) <= 1.2 * error([eager_value], [truth_value])
    names = list(truth)
    assert error([grads[n] for n in names], [truth[n] for n in names]) <= 1.2 * error(
        [eager[n] for n in names], [truth[n] for n in names]
    )
    assert all(grads[n].dtype == model.get_parameter(n).dtype for n in names if n != "x")


def error(values, truths) -> float:
    squares = [((v.double() - t.double()).norm() / t.double().norm()) ** 2 for v, t in zip(values, truths, strict=True)]
    return float(sum(squares)) ** 0.5


def test_compiles_whole():
    torch._dynamo.reset()
    model, stock, report = pair()
    model.compile(fullgraph=True, backend="aot_eager")
    assert_close(model, stock, features())
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_close(model, stock, features())
    assert report.calls.ended == {}
    torch._dynamo.reset()


def test_generate(fused):
    model = transformer(llama).eval()
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    ids = tokens(model)["input_ids"]
    expected = stock.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)
    assert fused.ops() == dict.fromkeys(("lora_linear_group", "lora_linear", "lora_swiglu_mlp"), 2 * 4)
    assert report.calls.ended == {}
