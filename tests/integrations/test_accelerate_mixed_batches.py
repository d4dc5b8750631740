"""`adapter_names`: each row of a batch runs its own adapter, in eval and in training mode."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.model import LoraModel
from torch import Tensor, nn

from peft_kernels import accelerate, check, functional, restore
from peft_kernels.integrations import _peft_multi
from tests.integrations import models
from tests.integrations.blocks import PROJECTIONS, Attention
from tests.integrations.models import TARGETS, bert, features, gpt2, llama, tokens, toy, transformer

# Not in order, not together, with a sample for the base model; "narrow" is not in every layer.
NAMES = ["narrow", "wide", "default", "__base__", "default", "wide"]


def add(model: nn.Module, name: str, **config) -> None:
    model.add_adapter(name, LoraConfig(**config))
    models.randomise(model)
    for parameter, value in model.named_parameters():
        value.requires_grad_("lora_" in parameter)


def three_adapters(model: nn.Module, targets: list[str], **config) -> nn.Module:
    """ "default" of rank 4, "wide" of ranks 64 and 9, "narrow" of rank 1 in the first target alone."""
    add(model, "wide", r=64, lora_alpha=96, rank_pattern={targets[-1]: 9}, target_modules=targets, **config)
    add(model, "narrow", r=1, lora_alpha=3, target_modules=targets[:1], **config)
    return model


def adapted(make, **config) -> nn.Module:
    return three_adapters(transformer(make, **config), TARGETS[make], **config)


def logits(model: nn.Module, batch, **kwargs) -> Tensor:
    output = model(**batch, **kwargs) if isinstance(batch, dict) else model(batch, **kwargs)
    return getattr(output, "logits", output)


def alone(model: nn.Module, name: str, batch, **kwargs) -> Tensor:
    """The whole batch with one adapter, by PEFT's own code."""
    if name == "__base__":
        with model.disable_adapter():
            return logits(model, batch, **kwargs)
    model.base_model.set_adapter(name)
    return logits(model, batch, **kwargs)


def rows_alone(model: nn.Module, names: list[str], batch, **kwargs) -> Tensor:
    by_name = {name: alone(model, name, batch, **kwargs) for name in set(names)}
    return torch.stack([by_name[name][row] for row, name in enumerate(names)])


def assert_near(value: Tensor, truth: Tensor, what: str = "", dtype: torch.dtype | None = None) -> None:
    value, truth, tolerance = value.detach(), truth.detach(), models.TOLERANCES[dtype or value.dtype]
    error = float((value.double() - truth.double()).norm() / truth.double().norm())
    assert error <= tolerance, f"{what}: {error:.2e}"


def pick(batch, rows: list[int]):
    return {name: value[rows] for name, value in batch.items()} if isinstance(batch, dict) else batch[rows]


def assert_trained_alone(model: nn.Module, stock: nn.Module, batch, names: list[str], **kwargs) -> None:
    """The gradients of every adapter are those of a step with its own rows and no other adapter."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = logits(model, batch, adapter_names=names, **kwargs)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    grads = torch.autograd.grad((y * direction).sum(), list(parameters.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    for adapter in sorted(set(names) - {"__base__"}):
        rows = [row for row, name in enumerate(names) if name == adapter]
        single = alone(stock, adapter, pick(batch, rows))
        leaves = {
            n: p.requires_grad_() for n, p in stock.named_parameters() if f".{adapter}." in n or n.endswith(adapter)
        }
        truth = torch.autograd.grad((single * direction[rows]).sum(), list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, truth, strict=True):
            if grad is not None:
                assert_near(found.pop(name), grad, name, y.dtype)
    assert all(not grad.any() for grad in found.values()), "adapters without rows"


@pytest.mark.parametrize("make", [llama, gpt2, bert], ids=lambda make: make.__name__)
def test_each_row_equals_the_single_adapter_run(make, fused):
    model = adapted(make).eval()
    stock, batch = models.twin(model), tokens(model, rows=len(NAMES))
    del batch["labels"]
    report = accelerate(model, strict=True)
    for training in (False, True):
        assert_near(logits(model.train(training), batch, adapter_names=NAMES), rows_alone(stock, NAMES, batch))
        assert fused() == report.fused
        assert set(fused.ops()) == {"multi_lora_linear", *(["multi_lora_linear_group"] if make is not gpt2 else [])}
    assert not report.fallbacks


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda make: make.__name__)
def test_gradients_are_those_of_training_alone(make, fused):
    model = adapted(make).train()
    stock, batch = models.twin(model), tokens(model, rows=len(NAMES))
    del batch["labels"]
    report = accelerate(model, strict=True)
    assert_trained_alone(model, stock, batch, NAMES)
    assert fused() == report.fused


@pytest.mark.parametrize("names", [["__base__"] * 4, ["wide"] * 4, ["narrow", "__base__"] * 2], ids="-".join)
def test_few_names(names, fused):
    """Base alone, one adapter alone, an adapter of which one layer has nothing."""
    model = three_adapters(toy().double(), ["first", "second"]).double()
    stock, x = models.twin(model), features(4, 24, dtype=torch.float64)
    report = accelerate(model, strict=True)
    assert_near(model(x, adapter_names=names), rows_alone(stock, names, x))
    named = {"wide": 2, "narrow": 1, "__base__": 0}[names[0]]
    assert fused() == named
    if named < 2:
        assert report.fallbacks == {"no adapter of the batch has weights in this layer": 2 - named}
    if named:
        assert_trained_alone(model, stock, x, names)


def test_samples_of_several_tokens_and_a_frozen_adapter(fused):
    model = three_adapters(toy(), ["first", "second"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name)
    stock, x = models.twin(model), features(6, 2, 3, 24)
    accelerate(model)
    y = model(x, adapter_names=NAMES)
    assert_near(y, rows_alone(stock, NAMES, x))
    y.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if "default" in n
    }
    assert x.grad is not None
    assert fused.ops() == {"multi_lora_linear": 2}


def test_projections_of_one_input_run_together_where_batch_and_dropout_are_one(fused):
    torch.manual_seed(1)
    model = models.adapted(Attention(), target_modules=[*PROJECTIONS, "o"])
    three_adapters(model, [*PROJECTIONS, "o"])
    stock, x = models.twin(model), features(6, 24)
    report = accelerate(model, strict=True)
    assert_trained_alone(model, stock, x, NAMES)
    assert fused.ops() == {"multi_lora_linear_group": 1, "multi_lora_linear": 1}
    model.base_model.model.v.lora_dropout["wide"] = nn.Dropout(0.5)
    model(x, adapter_names=NAMES)
    assert fused.ops() == {"multi_lora_linear_group": 1, "multi_lora_linear": 2}, "v by itself"
    model.eval()
    with torch.no_grad():
        assert_near(model(x, adapter_names=NAMES), rows_alone(stock.eval(), NAMES, x))
        assert_near(model(x, adapter_names=NAMES[::-1]), rows_alone(stock, NAMES[::-1], x))
        assert_near(model(x), alone(stock, "default", x))
    assert not report.calls.ended
    q, k = model.base_model.model.q, model.base_model.model.k
    q(x, adapter_names=NAMES)
    others = [*NAMES[:3], "default", *NAMES[4:]]  # the same adapters, for other rows
    assert torch.equal(k(x, adapter_names=others), k(x.clone(), adapter_names=others))
    assert list(report.calls.ended.values()) == ["k is called in another state than q"]


def test_every_adapter_has_its_own_dropout(fused):
    """ "halved" shows the mask it got, "dropped" drops everything, "default" nothing."""
    model = toy(lora_alpha=4, target_modules=["first"])
    add(model, "halved", r=24, lora_alpha=24, lora_dropout=0.5, target_modules=["first"])
    add(model, "dropped", r=2, lora_dropout=1.0, target_modules=["first"])
    layer = model.base_model.model.first
    layer.lora_A["halved"].weight.data.copy_(torch.eye(24))
    layer.lora_B["halved"].weight.data.copy_(torch.eye(16, 24))
    names = ["halved", "dropped", "default", "halved", "__base__"]
    accelerate(model, strict=True)
    x = features(5, 40, 24)
    with layer_adapter_names(layer, names), torch.no_grad():
        y = layer(x)
    update, expected = y - layer.base_layer(x), x[..., :16] * 2
    kept = update[[0, 3]].abs() > 1e-4
    torch.testing.assert_close(update[[0, 3]], expected[[0, 3]] * kept, atol=1e-5, rtol=0)
    assert 0.4 < kept.float().mean() < 0.6
    assert not torch.equal(kept[0], kept[1])
    assert_near(
        y[2], layer.base_layer(x[2]) + x[2] @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    )
    torch.testing.assert_close(y[[1, 4]], layer.base_layer(x[[1, 4]]), atol=1e-6, rtol=0)


def layer_adapter_names(layer: nn.Module, names: list[str]):
    def hook(module, args, kwargs):
        return args, {**kwargs, "adapter_names": names}

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation(num_beams, fused, monkeypatch):
    model = adapted(llama).eval()
    stock = models.twin(model)
    accelerate(model, strict=True)
    made = []
    choose = _peft_multi._choose
    monkeypatch.setattr(_peft_multi, "_choices", {})
    monkeypatch.setattr(_peft_multi, "_choose", lambda *args: made.append(args) or choose(*args))
    options = {
        "max_new_tokens": 5, "do_sample": False, "num_beams": num_beams, "use_cache": True, "pad_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip
    ids = tokens(model, rows=len(NAMES))["input_ids"]
    found = model.generate(input_ids=ids, adapter_names=NAMES, **options)
    ops = fused.ops()
    assert len(made) == 1, "the ids are made once for all layers and steps"
    assert torch.equal(found, stock.generate(input_ids=ids, adapter_names=NAMES, **options))
    for row, name in enumerate(NAMES):
        if name != "__base__":
            stock.set_adapter(name)
            assert torch.equal(found[row], stock.generate(input_ids=ids[row : row + 1], **options)[0])
    assert set(ops) == {"multi_lora_linear", "multi_lora_linear_group"}
    assert len(set(map(tuple, found[:, ids.shape[1] :].tolist()))) > 1


def test_over_four_bits(fused):
    from tests.integrations import quantised

    model = three_adapters(quantised.llama(), TARGETS[llama])
    stock, batch = models.twin(model), tokens(model, rows=len(NAMES))
    del batch["labels"]
    report = accelerate(model, strict=True)
    with torch.no_grad():
        assert_near(logits(model.eval(), batch, adapter_names=NAMES), rows_alone(stock.eval(), NAMES, batch))
    assert fused() == report.fused
    assert_trained_alone(model.train(), stock.train(), batch, NAMES)
    assert fused() == report.fused


def test_only_the_adapters_of_the_batch_are_passed_on(monkeypatch):
    model = toy()
    for number in range(40):
        model.add_adapter(f"a{number}", LoraConfig(r=2, target_modules=["first", "second"]))
    models.randomise(model)
    stock = models.twin(model)
    accelerate(model)
    counts = []
    original = functional.multi_lora_linear

    def counted(x, weight, lora_As, *args, **kwargs):
        counts.append(len(lora_As))
        return original(x, weight, lora_As, *args, **kwargs)

    monkeypatch.setattr(functional, "multi_lora_linear", counted)
    names, x = ["a39", "a7", "a39", "__base__", "default"], features()
    assert_near(model(x, adapter_names=names), rows_alone(stock, names, x))
    assert counts == [3, 3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_takes_the_names_along(reentrant):
    """Blocks run again in backward, when PEFT's hooks are gone, here after another batch has run."""
    model = adapted(llama).train()
    accelerate(model)
    batch, other = tokens(model, rows=6), NAMES[::-1]
    losses = [model(**batch, adapter_names=names).loss for names in (NAMES, other)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    truth = [torch.autograd.grad(loss, parameters) for loss in losses]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    functions = [block._gradient_checkpointing_func for block in model.get_base_model().model.layers]
    for adapter in ("default", "wide"):  # what a block without names would run
        model.base_model.set_adapter(adapter)
        for parameter in parameters:
            parameter.requires_grad_()
        losses = [model(**batch, adapter_names=names).loss for names in (NAMES, other)]
        for loss, expected in zip(losses, truth, strict=True):
            model.zero_grad()
            loss.backward()
            for parameter, grad in zip(parameters, expected, strict=True):
                assert_near(parameter.grad, grad)
    assert functions == [block._gradient_checkpointing_func for block in model.get_base_model().model.layers]
    assert_no_hooks(model)


def assert_no_hooks(model: nn.Module) -> None:
    assert not any(m._forward_pre_hooks for m in model.modules() if hasattr(m, "lora_A"))


def test_errors_are_pefts():
    model = three_adapters(toy(), ["first", "second"])
    stock = models.twin(model).eval()
    accelerate(model, strict=True)
    for mode in (False, True):
        model.train(mode)
        for names, text in ((["default"], "Length of"), (["default", "nobody", "who", "wide", "wide"], "non-existing")):
            with pytest.raises(ValueError, match=text) as expected:
                stock(features(), adapter_names=names)
            with pytest.raises(ValueError, match=text) as raised:
                model(features(), adapter_names=names)
            assert str(raised.value) == str(expected.value)
            assert_no_hooks(model)
        model.merge_adapter(["wide"])
        with pytest.raises(ValueError, match="when there are merged adapters"):
            model(features(), adapter_names=["default"] * 5)
        model.unmerge_adapter()
        with model.disable_adapter(), torch.no_grad():
            layer, x = model.base_model.model.first, features()
            assert torch.equal(layer(x, adapter_names=NAMES[:5]), layer.base_layer(x))
    add(model, "dora", r=2, use_dora=True, target_modules=["first"])
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        model(features(), adapter_names=["default", "dora", "wide", "default", "default"])
    model(features(), adapter_names=NAMES[:5])


def biased(model):
    add(model, "other", r=2, lora_bias=True, target_modules=["first", "second"])


def of_another_dtype(model):
    add(model, "other", r=2, target_modules=["first", "second"])
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_A["other"].double(), layer.lora_B["other"].double()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(biased, "has a bias"), (of_another_dtype, "several dtypes")],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_the_op_does_not_cover_runs_pefts_code_which_can_be_trained(change, reason, fused):
    model = toy()
    change(model)
    stock = models.twin(model)
    report = accelerate(model)
    names = ["other", "default", "__base__", "other", "default"]
    for order in (names, names[::-1]):  # also where the first adapter could be fused
        assert_trained_alone(model, stock, features(), order)
    assert fused() == 0
    (text,) = report.fallbacks
    assert reason in text
    model(features(), adapter_names=["default"] * 5)
    assert fused() == 2
    accelerate(model, strict=True)
    with pytest.raises(RuntimeError, match=f"first: .*{reason}"):
        model(features(), adapter_names=names)


def test_saved_modules_run_pefts_code_which_can_be_trained(fused):
    model = transformer(bert, modules_to_save=["classifier"])
    add(model, "wide", r=64, target_modules=TARGETS[bert], modules_to_save=["classifier"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "modules_to_save" in name)
        if "modules_to_save.wide" in name:
            parameter.data.add_(0.5)
    stock, batch = models.twin(model), tokens(model, rows=6)
    del batch["labels"]
    report = accelerate(model, strict=True)
    assert_trained_alone(model, stock, batch, ["wide", "default", "__base__", "default", "wide", "wide"])
    assert fused() == report.fused


def test_embeddings_run_pefts_code_which_can_be_trained():
    targets = ["q_proj", "embed_tokens"]
    model = three_adapters(transformer(llama, target_modules=targets), targets[::-1])
    for name, parameter in model.named_parameters():
        if "lora_embedding_A" in name or "lora_embedding_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(9))
    stock, batch = models.twin(model), tokens(model, rows=6)
    del batch["labels"]
    report = accelerate(model)
    assert_trained_alone(model, stock, batch, NAMES)
    assert report.fallbacks == {"the call has arguments besides x (adapter_names)": 1}


def test_restore_brings_pefts_refusal_back():
    model = three_adapters(toy(), ["first", "second"])
    accelerate(model)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(copied.train()).count("LoraModel") == 1
        copied(features(), adapter_names=NAMES[:5])
        restore(copied)
        assert type(copied.base_model) is LoraModel
        with pytest.raises(ValueError, match="in training mode"):
            copied(features(), adapter_names=NAMES[:5])


def test_check_compares_such_batches():
    model = adapted(llama, lora_dropout=0.3).train()
    accelerate(model)
    result = check(model, {**tokens(model, rows=6), "adapter_names": NAMES}, verbose=False)
    assert result.ok
    assert result.fused == 14
    assert result.worst.error < 1e-5


def test_inference_mode_leaves_nothing_that_training_cannot_use():
    model = three_adapters(toy(), ["first", "second"])
    accelerate(model, strict=True)
    names = ["wide", "narrow", "default", "wide", "wide"]
    with torch.inference_mode():
        y = model(features(), adapter_names=names)
    z = model(features(), adapter_names=names)
    z.sum().backward()
    assert torch.equal(y, z)


def test_compiled():
    """A layer in one graph. The hooks that PEFT makes at every call of a model are none of Dynamo's business."""
    model = three_adapters(toy(), ["first", "second"])
    stock, names = models.twin(model), NAMES[:5]
    accelerate(model, strict=True)
    layer = torch.compile(model.base_model.model.first, backend="eager", fullgraph=True)
    assert_near(layer(features(), adapter_names=names), stock.base_model.model.first(features(), adapter_names=names))
    compiled = torch.compile(model, backend="eager")
    assert_near(compiled(features(), adapter_names=names), rows_alone(stock, names, features()))
