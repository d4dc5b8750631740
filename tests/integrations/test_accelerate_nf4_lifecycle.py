"""Accelerated layers over 4-bit weights through merging, copying, saving, compiling, and what runs PEFT's own code."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import VeloraConfig
from peft.tuners.lora import bnb as peft_bnb
from torch import nn

from peft_kernels import accelerate, check, functional, restore
from peft_kernels.integrations.peft import LINEARS
from tests.integrations import models, quantised
from tests.integrations.models import features, tokens
from tests.integrations.quantised import bnb
from tests.integrations.test_accelerate_nf4 import first, layers_of, pair, two_adapters
from tests.integrations.test_accelerate_sharded import ddp, fsdp_of_blocks

TARGETS = ["first", "second"]
REQUANTISES = "ignore:.*erge lora module to 4-bit linear may get different generations"


def x_of(*shape: int, dtype: torch.dtype = torch.float32):
    return features(*(shape or (5, 64)), dtype=dtype)


# What changes a layer's weight, each in its own way.


def replaced(model):
    other = quantised.quantised(nn.Linear(64, 64))
    first(model).base_layer.weight, first(model).base_layer.quant_state = other.weight, other.quant_state


def data_replaced(model):
    first(model).base_layer.weight.data = first(model).base_layer.weight.data.flip(0)


def in_place(model):
    first(model).base_layer.weight.data.bitwise_xor_(0x10)


def absmax_replaced(model):
    state = first(model).base_layer.weight.quant_state
    state.offset = state.offset.clone()
    state.absmax = state.absmax.flip(0)


def merged_and_unmerged(model):
    model.merge_adapter()
    model.unmerge_adapter()


def loaded(model):
    own = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("first.base_layer.weight")}
    model.load_state_dict({name: tensor.flip(0) for name, tensor in own.items()}, strict=False)


def moved(model):
    model.to("cpu", torch.float32)


CHANGES = [replaced, data_replaced, in_place, absmax_replaced, merged_and_unmerged, loaded, moved]


@pytest.mark.filterwarnings(REQUANTISES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_of_the_weight_are_seen(change, fused):
    model, _ = pair()
    before = model(x_of())
    torch.manual_seed(8)
    change(model)
    models.assert_close(model, models.twin(model), x_of())
    assert fused() == 4
    assert torch.equal(model(x_of()), before) == (change is moved)


@pytest.mark.filterwarnings(REQUANTISES)
@pytest.mark.parametrize("change", [replaced, merged_and_unmerged, moved], ids=lambda change: change.__name__)
def test_the_weight_is_made_once_and_an_old_one_is_not_kept(change, fused, monkeypatch):
    from peft_kernels.integrations import _peft_nf4

    made, original = [], _peft_nf4.from_bitsandbytes
    monkeypatch.setattr(_peft_nf4, "from_bitsandbytes", lambda params: made.append(1) or original(params))
    model, _ = pair()
    for _ in range(3):
        model(x_of())
    assert len(made) == 2
    old = weakref.ref(first(model).base_layer.weight)
    memory = first(model).base_layer.weight.data.data_ptr()
    stored = first(model).__dict__["_peft_kernels_stored"]
    assert stored.get(old(), old().quant_state, torch.float32).packed.data_ptr() == memory
    change(model)
    assert (old() is None) == (change is merged_and_unmerged), "a merged layer makes no call that would let go of it"
    model(x_of())
    assert (old() is None) == (change is not moved)


def test_copies_have_weights_of_their_own(fused):
    model, _ = pair()
    model(x_of())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(first(copied)) in LINEARS
        assert first(copied).__dict__["_peft_kernels_stored"]._made is None, "made over the original's memory"
        models.assert_close(copied, models.twin(model), x_of())
        in_place(copied)
        models.assert_close(copied, models.twin(copied), x_of())
        assert not torch.equal(copied(x_of()), model(x_of()))
    assert "_peft_kernels_stored" not in models.twin(model).base_model.model.first.__dict__


@pytest.mark.filterwarnings(REQUANTISES)
def test_merged_and_disabled_layers_run_pefts_code(fused):
    model, stock = pair()
    with model.disable_adapter(), stock.disable_adapter():
        assert torch.equal(model(x_of()), stock(x_of()))
    models.assert_close(model, stock, x_of())
    assert fused() == 2
    for module in (model, stock):
        module.merge_adapter()
    assert torch.equal(model(x_of()), stock(x_of()))
    assert torch.equal(first(model).base_layer.weight.data, first(stock).base_layer.weight.data)
    for module in (model, stock):
        module.unmerge_adapter()
    models.assert_close(model, stock, x_of())
    assert fused() == 2
    merged, expected = model.merge_and_unload(), stock.merge_and_unload()
    assert type(merged.first) is bnb.nn.Linear4bit
    assert torch.equal(merged(x_of()), expected(x_of()))


def test_saving_and_loading(tmp_path, fused):
    model, stock = pair()
    keys = list(stock.state_dict())
    assert list(model.state_dict()) == keys
    assert any(key.endswith("quant_state.bitsandbytes__nf4") for key in keys)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stock.state_dict()[name]), name
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(quantised.quantise(models.Toy(64, 64)), tmp_path, is_trainable=True)
    accelerate(loaded, strict=True)
    models.assert_close(loaded, stock, x_of())
    assert fused() == 2


def test_restore_gives_pefts_classes_back(fused):
    model, stock = pair()
    text, parameters = repr(model), {name: id(p) for name, p in model.named_parameters()}
    assert text == repr(stock)
    assert "lora.Linear4bit(" in text
    assert accelerate(model).rows == accelerate(model).rows
    model(x_of())
    assert restore(model) == 2
    assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert first(model).__dict__.keys() == first(stock).__dict__.keys()
    assert parameters == {name: id(p) for name, p in model.named_parameters()}
    assert fused() == 2
    assert torch.equal(model(x_of()), stock(x_of()))
    assert fused() == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_dropout_changes_nothing(reentrant, fused):
    model = quantised.llama(adapter={"lora_dropout": 0.3}).train()
    model.enable_input_require_grads()
    accelerate(model, strict=True)
    results = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(4)
        model.zero_grad()
        loss = model(**tokens(model)).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (other_loss, other_grads) = results
    assert torch.equal(loss, other_loss)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name])
    assert fused() == 14 * 3


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}], ids=str)
def test_compiled_without_graph_breaks(adapter, fused):
    """Also a second time, after another weight has come."""
    torch._dynamo.reset()
    model, stock = pair(adapter=adapter)
    model.compile(fullgraph=True, backend="aot_eager")
    models.assert_close(model, stock, x_of())
    for module in (model, stock):
        torch.manual_seed(8)
        replaced(module)
    models.assert_close(model, stock, x_of())
    torch._dynamo.reset()
    assert fused()


def test_compiled_whole_blocks(fused):
    torch._dynamo.reset()
    model = quantised.llama()
    llama = model.base_model.model.model
    del llama.layers[1:]  # each is compiled by itself, and to the same graph
    llama.config.num_hidden_layers = 1
    stock = models.twin(model)
    accelerate(model, strict=True)
    (layer,) = llama.layers
    layer.mlp.compile(fullgraph=True, backend="eager")
    models.assert_close(model, stock, tokens(model))
    assert fused.ops()["lora_swiglu_mlp"]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("shard", "storage"),
    [(ddp, torch.uint8), (fsdp_of_blocks, torch.uint8), (fsdp_of_blocks, torch.float32)],  # DDP moves no weights
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_sharded(shard, storage, world, fused):
    """FSDP2 puts a plain tensor where the parameter was, at another address in backward."""
    model = quantised.llama(quant_storage=storage)
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    wrapped = shard(model)
    loss, expected = wrapped(**tokens(model)).loss, stock(**tokens(stock)).loss
    for value in (loss, expected):
        value.backward()
    torch.testing.assert_close(loss, expected)
    for (name, parameter), truth in zip(model.named_parameters(), stock.parameters(), strict=True):
        if parameter.requires_grad:
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            torch.testing.assert_close(grad, truth.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert fused() == report.fused
    assert report.fallbacks == {}


def test_prepared_by_peft_for_training(fused):
    """Norms and the head in float32, so that x is, beside a compute dtype of 16 bits; and checkpointing."""
    model = quantised.llama(compute=torch.bfloat16, dtype=torch.bfloat16, prepared=True).train()
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    losses = []
    with torch.autocast("cpu", torch.bfloat16):
        for module in (model, stock):
            loss = module(**tokens(model)).loss
            loss.backward()
            losses.append(float(loss.detach()))
    assert fused() >= 2 * report.fused
    assert report.fallbacks == report.calls.ended == {}
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    grads = [torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad]) for module in (model, stock)]
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < 3e-2


def test_check_finds_a_wrong_product_and_leaves_bitsandbytes_as_it_was(monkeypatch, fused):
    model, _ = pair()
    model.eval()  # evaluated, bitsandbytes repacks weights in place on some CPUs
    layer = first(model).base_layer
    layer.support_avx512bf16_for_cpu = True
    assert check(model, x_of().detach(), verbose=False).ok
    assert layer.support_avx512bf16_for_cpu
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    original = functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear", lambda *args, **kwargs: 1.001 * original(*args, **kwargs))
    assert not check(model, x_of(), verbose=False).ok


# What runs PEFT's own code, and why.


def four_bit_floats(model):
    for layer in layers_of(model):
        layer.base_layer = quantised.quantised(nn.Linear(64, 64, bias=layer.base_layer.bias is not None), kind="fp4")


def not_quantised_yet(model):
    for layer in layers_of(model):
        layer.base_layer.weight = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")


def repacked(model):
    for layer in layers_of(model):
        layer.base_layer.weight.quant_state.packing_format_for_cpu = True


def other_orientation(model):
    for layer in layers_of(model):
        layer.base_layer.weight.quant_state.shape = torch.Size((32, 128))


def other_nested_blocks(model):
    for layer in layers_of(model):
        weight = layer.base_layer.weight
        weight.quant_state = copy.copy(weight.quant_state)
        weight.quant_state.state2 = copy.copy(weight.quant_state.state2)
        weight.quant_state.state2.blocksize = 128


def hooked(model):
    for layer in layers_of(model):
        layer.base_layer.register_forward_hook(lambda *_: None)


def subclassed(model):
    class Other(bnb.nn.Linear4bit):
        pass

    for layer in layers_of(model):
        layer.base_layer.__class__ = Other


def tensor_scaling(model):
    for layer in layers_of(model):
        layer.scaling["default"] = torch.tensor(1.5)


def in_place_dropout(model):
    for layer in layers_of(model):
        layer.lora_dropout["default"] = nn.Dropout(0.0, inplace=True)


def disabled(model):
    model.base_model.disable_adapter_layers()


CASES = [
    (four_bit_floats, "the base weight is quantised as fp4, not nf4"),
    (repacked, "bitsandbytes has repacked the base weight for a CPU"),
    (hooked, "base_layer has hooks"),
    (subclassed, "Other, not exactly torch.nn.Linear"),
    (in_place_dropout, "lora_dropout works in place"),
    (tensor_scaling, "scaling is a torch.Tensor, not a float"),
    (disabled, "the adapters are disabled"),
]
BROKEN = [
    (not_quantised_yet, "the base weight is not quantised yet"),
    (other_orientation, r"the base weight was quantised with the shape \(32, 128\)"),
    (other_nested_blocks, "the base weight is no NF4 weight of a kind known here: .*128"),
]


@pytest.mark.parametrize(("change", "reason"), CASES + BROKEN, ids=[c.__name__ for c, _ in CASES + BROKEN])
def test_the_report_foresees_what_falls_back(change, reason):
    model = quantised.toy()
    change(model)
    with pytest.raises(RuntimeError, match=f"no layer can be fused(.|\n)*{reason}"):
        accelerate(model)
    assert type(first(model)) is peft_bnb.Linear4bit


def peft_ran(model, monkeypatch) -> list:
    """A record of the calls of PEFT's own forward, which is not run: bitsandbytes' might fail or be wrong there."""
    calls = []
    monkeypatch.setattr(peft_bnb.Linear4bit, "forward", lambda self, x: calls.append(self) or self.lora_A["default"](x))
    return calls


@pytest.mark.parametrize(("change", "reason"), CASES + BROKEN, ids=[c.__name__ for c, _ in CASES + BROKEN])
def test_fallbacks_are_counted_with_their_reasons(change, reason, fused, monkeypatch):
    model, _ = pair(adapter={"r": 64})
    report = accelerate(model)
    calls = peft_ran(model, monkeypatch)
    model(x_of())
    assert fused() == 2
    change(model)
    model(x_of())
    assert fused() == 0
    assert calls == list(layers_of(model))
    (found,) = report.fallbacks
    assert re.search(reason, found)
    assert report.fallbacks[found] == 2


# Without repacked bytes the flag makes bitsandbytes' own result meaningless.
@pytest.mark.parametrize("change", [c for c, _ in CASES if c is not repacked], ids=lambda change: change.__name__)
def test_fallback_is_pefts_own_result(change, fused):
    model = quantised.toy()
    stock = models.twin(model)
    accelerate(model)
    for module in (model, stock):
        torch.manual_seed(8)
        change(module)
    assert torch.equal(model(x_of()), stock(x_of()))
    assert fused() == 0


def test_a_call_with_strict_raises():
    model, _ = pair()
    hooked(model)
    with pytest.raises(RuntimeError, match=r"first: base_layer has hooks.*strict=True"):
        model(x_of())


def test_x_that_bitsandbytes_does_not_know(fused):
    model = quantised.toy()
    report = accelerate(model)
    with disable_input_dtype_casting(model):
        first(model)(x_of())
    assert list(report.fallbacks) == ["PEFT's casting of the input is switched off (cast_input_dtype_enabled)"]
    with pytest.raises((RuntimeError, ValueError)):
        first(model)(x_of(5, 63))
    assert fused() <= 1


def test_a_trained_bias_gets_the_compute_dtype_from_bitsandbytes(fused):
    """In the first call, which PEFT's code runs: the bias and its gradient then have PEFT's dtype."""
    model = quantised.toy(compute=torch.bfloat16, adapter={"bias": "all"})
    report = accelerate(model)
    assert first(model).base_layer.bias.dtype == torch.float32
    assert "the bias is trained in torch.float32" in next(iter(report.reasons))
    first(model)(x_of())
    assert fused() == 0
    assert first(model).base_layer.bias.dtype == torch.bfloat16
    _, grads = models.gradients(first(model), x_of())
    assert fused() == 1
    assert grads["base_layer.bias"].dtype == torch.bfloat16


def test_a_frozen_bias_of_another_dtype_is_only_rounded_in_the_product(fused):
    model = quantised.toy(compute=torch.bfloat16)
    stock = models.twin(model)
    accelerate(model, strict=True)
    y, expected = first(model)(x_of()), first(stock)(x_of())
    assert first(model).base_layer.bias.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert fused() == 1


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_call_fixes_the_compute_dtype_as_bitsandbytes_does(x_dtype, fused):
    model = quantised.toy(compute=None)
    stock = models.twin(model)
    accelerate(model)
    for module in (model, stock):
        first(module)(x_of(dtype=x_dtype))
        y = first(module)(x_of())
        assert y.dtype == torch.float32
        assert first(module).base_layer.compute_dtype == x_dtype
        assert first(module).base_layer.compute_type_is_set
    assert fused() == 2


def test_pefts_own_refusals_stay():
    model, _ = pair()
    with pytest.raises(ValueError, match="does not support VeLoRA"):
        model.add_adapter("other", LoraConfig(target_modules=TARGETS, velora_config=VeloraConfig(num_groups=4)))


def test_new_adapters_and_deleted_ones(fused):
    model = two_adapters()
    accelerate(model, strict=True)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mix", combination_type="cat")
    model.set_adapter("mix")
    models.assert_close(model, models.twin(model), x_of())
    model.delete_adapter("mix")
    model.set_adapter("other")
    models.assert_close(model, models.twin(model), x_of())
    assert fused() == 4


def test_without_bitsandbytes_there_are_dense_layers_only(monkeypatch):
    import peft.import_utils

    from peft_kernels.integrations import _peft_linear, _peft_objections

    monkeypatch.setattr(peft.import_utils, "is_bnb_4bit_available", lambda: False)
    for module in (_peft_objections, _peft_linear):
        specification = importlib.util.spec_from_file_location("without_bitsandbytes", module.__file__)
        without = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, "without_bitsandbytes", without)
        specification.loader.exec_module(without)
        if module is _peft_objections:
            assert without.QUANTISED == ()
        else:
            assert [plain.__name__ for plain in without.LINEARS.values()] == ["Linear"]
