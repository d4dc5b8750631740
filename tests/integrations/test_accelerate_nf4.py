"""PEFT's layers over 4-bit weights of bitsandbytes: the same numbers, without a dense weight."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import bnb as peft_bnb

from peft_kernels import accelerate, check
from peft_kernels.integrations.peft import LINEARS
from tests.integrations import blocks, models, quantised
from tests.integrations.models import TOLERANCES, features, randomise, tokens
from tests.integrations.quantised import dense

SHAPES = ((5, 64), (2, 3, 64), (1, 64))


def first(model):
    return model.base_model.model.first


def layers_of(model):
    return model.base_model.model.first, model.base_model.model.second


def pair(**options):
    """An accelerated model and PEFT's own."""
    model = quantised.toy(**options)
    stock = models.twin(model)
    accelerate(model, strict=True)
    return model, stock


def error(value, truth) -> float:
    return float((value.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())


def assert_close_to(model, truth, batch) -> None:
    """As `models.assert_close`, for a truth that has other frozen parameters."""
    (value, grads), (expected, expected_grads) = models.gradients(model, batch), models.gradients(truth, batch)
    assert grads.keys() == expected_grads.keys()
    assert error(value, expected) <= TOLERANCES[torch.float32]
    for name, grad in grads.items():
        assert error(grad, expected_grads[name]) <= TOLERANCES[torch.float32], name


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
def test_model_equals_peft_in_loss_and_every_gradient(nested, fused):
    """Single layers, groups and whole blocks."""
    model = quantised.llama(nested=nested)
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    assert report.fused == 14
    models.assert_close(model, stock, tokens(model))
    assert fused.ops() == {"lora_linear_group": 2, "lora_linear": 2, "lora_swiglu_mlp": 2}
    assert report.fallbacks == report.calls.ended == {}
    accelerate(model, groups=False)
    models.assert_close(model, stock, tokens(model))
    assert fused.ops() == {"lora_linear": 14}
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj) in LINEARS


def test_the_dense_weight_is_never_made(fused, monkeypatch):
    """What bitsandbytes' own layer would have called."""
    model, _ = pair()

    def refuse(*args, **kwargs):
        raise AssertionError("bitsandbytes has multiplied or unpacked the weight")

    monkeypatch.setattr(quantised.bnb, "matmul_4bit", refuse)
    monkeypatch.setattr(quantised.bnb.functional, "dequantize_4bit", refuse)
    models.gradients(model, features(5, 64))
    assert fused.ops() == {"lora_linear": 2}


@pytest.mark.parametrize("k", [96, 65, 33])
@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
def test_blocks_that_straddle_rows(k, nested, fused):
    """bitsandbytes is wrong there on some CPUs, so that the truth is the formula."""
    model = quantised.toy(k, 48, nested=nested)
    accelerate(model, strict=True)
    assert_close_to(model, dense(model), features(5, k))
    assert fused() == 2


@pytest.mark.parametrize(
    "adapter",
    [
        {"use_rslora": True},
        {"rank_pattern": {"first": 7}, "alpha_pattern": {"second": 3}},
        {"bias": "all"},
        {"lora_bias": True},
        {"r": 1},
    ],
    ids=str,
)
def test_configurations(adapter, fused):
    model, stock = pair(adapter=adapter)
    for shape in SHAPES:
        models.assert_close(model, stock, features(*shape))
    assert fused() == 6


def test_biases_of_base_and_adapter_are_added_and_trained(fused):
    model = quantised.toy(adapter={"lora_bias": True, "bias": "all"})
    for layer in layers_of(model):
        torch.nn.init.normal_(layer.lora_B["default"].bias, generator=torch.Generator().manual_seed(2))
    stock = models.twin(model)
    accelerate(model, strict=True)
    models.assert_close(model, stock, features(5, 64))
    assert sum("bias" in name for name in models.gradients(model, features(5, 64))[1]) == 3
    assert fused() == 4


def two_adapters():
    model = quantised.toy()
    torch.manual_seed(21)
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"]))
    return randomise(model)


def test_several_adapters(fused):
    model = two_adapters()
    stock = models.twin(model)
    accelerate(model, strict=True)
    for active in ("other", ["default", "other"], ["default"]):
        for module in (model, stock):
            module.base_model.set_adapter(active)
        models.assert_close(model, stock, features(5, 64))
    assert fused.ops() == {"lora_linear": 4, "lora_linear_group": 2}


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_activated_lora(fused):
    model = quantised.toy(adapter={"alora_invocation_tokens": [1]})
    stock = models.twin(model)
    accelerate(model, strict=True)
    x, offsets = features(3, 4, 64), [2, None, 9]
    outputs = [first(module)(x, alora_offsets=offsets) for module in (model, stock)]
    torch.testing.assert_close(*outputs)
    assert not torch.equal(outputs[0][0], first(model)(x)[0])
    grads = [torch.autograd.grad(y.square().sum(), [x, *first(module).lora_A.parameters()]) for module, y in
             zip((model, stock), outputs, strict=True)]  # fmt: skip
    for grad, expected in zip(*grads, strict=True):
        assert error(grad, expected) <= TOLERANCES[torch.float32]
    assert fused.ops() == {"lora_linear": 2}


def with_magnitudes(model):
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("adapter", [{}, {"use_rslora": True}, {"bias": "all"}], ids=str)
def test_dora(adapter, fused):
    model = with_magnitudes(quantised.toy(adapter={"use_dora": True, **adapter}))
    stock = models.twin(model)
    accelerate(model, strict=True)
    for shape in SHAPES:
        models.assert_close(model, stock, features(*shape))
    assert any("magnitude" in name for name in models.gradients(model, features(5, 64))[1])
    assert fused.ops() == {"dora_linear": 8}


@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested"])
def test_dora_of_blocks_that_straddle_rows(nested, fused):
    model = with_magnitudes(quantised.toy(96, 48, nested=nested, adapter={"use_dora": True}))
    accelerate(model, strict=True)
    assert_close_to(model, dense(model), features(5, 96))
    assert fused() == 2


def test_dora_norms_of_the_base_weight_are_kept_until_it_is_another(fused, monkeypatch):
    from peft_kernels import functional

    model, _ = pair(adapter={"use_dora": True})
    counts, original = [], functional.dora_weight_norm

    def counted(*args, **kwargs):
        counts.append(kwargs.get("weight_norm_squared") is None)
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "dora_weight_norm", counted)
    for expected in (2, 2):
        models.assert_close(model, models.twin(model), features(5, 64))
        assert sum(counts) == expected
    base = first(model).base_layer
    other = quantised.quantised(torch.nn.Linear(64, 64), compute=torch.float32)
    base.weight = other.weight
    models.assert_close(model, models.twin(model), features(5, 64))
    assert sum(counts) == 3


def test_dora_under_cudas_autocast_is_as_wide_as_pefts(fused):
    """PEFT asks for CUDA's autocast, whatever the device."""
    model = quantised.toy(compute=torch.bfloat16, adapter={"use_dora": True})
    stock = models.twin(model)
    accelerate(model, strict=True)
    x, before = features(5, 64, dtype=torch.bfloat16), torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = first(model)(x), first(stock)(x)
    finally:
        torch.set_autocast_enabled("cuda", before)
    assert y.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    assert fused() == 1


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_and_biases_beside_a_compute_dtype_of_sixteen_bits(x_dtype, fused):
    """Biases that bitsandbytes would have cast in place."""
    torch.manual_seed(1)
    base = quantised.quantise(blocks.Attention(64), compute=torch.bfloat16)
    model = models.adapted(base, target_modules=["q", "k", "v", "o"])
    stock = models.twin(model)
    accelerate(model, strict=True)
    x = features(5, 64, dtype=x_dtype)
    value, grads = models.gradients(model, x)
    expected, expected_grads = models.gradients(stock, x)
    assert value.dtype == expected.dtype == x_dtype
    assert error(value, expected) < 1e-2
    for name, grad in grads.items():
        assert grad.dtype == expected_grads[name].dtype
        assert error(grad, expected_grads[name]) < 2e-2, name
    assert fused.ops() == {"lora_linear_group": 1, "lora_linear": 1}


@pytest.mark.parametrize("dense_projection", ["q", "v"])
def test_groups_of_dense_and_four_bit_layers(dense_projection, fused):
    """Together while x has the dense layer's dtype, which is the others' compute dtype."""
    torch.manual_seed(1)
    base = blocks.Attention(64)
    for name in {"q", "k", "v", "o"} - {dense_projection}:
        base.set_submodule(name, quantised.quantised(base.get_submodule(name)))
    base.is_loaded_in_4bit = True
    model = models.adapted(base, target_modules=["q", "k", "v", "o"])
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    models.assert_close(model, stock, features(5, 64))
    assert fused.ops()["lora_linear_group"] == 1
    assert report.calls.ended == {}


# x, compute dtype (None: fixed by the first call), adapters, autocast
DTYPES = list(
    itertools.product(
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float32, torch.bfloat16, torch.float16, None),
        (torch.float32, torch.bfloat16),
        (None, torch.bfloat16),
    )
)


def is_fused(x, compute, autocast) -> bool:
    if autocast is not None:
        return x in (torch.float32, autocast) and compute in (torch.float32, autocast, None)
    return compute != torch.float16 or x == torch.float16


@pytest.mark.parametrize(("x_dtype", "compute", "adapter", "autocast"), DTYPES, ids=str)
def test_dtypes_and_values_as_peft(x_dtype, compute, adapter, autocast, fused):
    """Results and gradients have PEFT's dtypes, and are as close to float64 as PEFT's are with the same dtypes: x and
    adapters rounded to what this library computes in."""
    model = quantised.toy(compute=compute)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter)
    stock = models.twin(model)
    accelerate(model)
    x = features(40, 64, dtype=x_dtype)

    def run(module, x):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            return models.gradients(first(module), x)

    value, grads = run(model, x)
    expected, expected_grads = run(stock, x)
    assert value.dtype == expected.dtype
    assert {n: g.dtype for n, g in grads.items()} == {n: g.dtype for n, g in expected_grads.items()}
    assert fused() == is_fused(x_dtype, compute, autocast)
    if not is_fused(x_dtype, compute, autocast):
        assert torch.equal(value, expected)
        return
    used = autocast or compute or x_dtype
    truth_value, truth = models.gradients(first(dense(model, used).double()), x.detach().double().requires_grad_())
    rounded = copy.deepcopy(stock)
    for name, parameter in rounded.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(used)
    first(rounded).register_forward_pre_hook(lambda layer, inputs: (inputs[0].to(used),))
    first(rounded).register_forward_hook(lambda layer, inputs, y: y.to(x_dtype))
    eager_value, eager = run(rounded, x)
    assert error(value, truth_value) <= 1.2 * error(eager_value, truth_value) + 1e-6
    for name, grad in grads.items():
        bound = error(eager[name].to(grad.dtype), truth[name])
        assert error(grad, truth[name]) <= 1.2 * bound + 1e-6, name


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_models_in_sixteen_bits(x_dtype, fused):
    """As accurate as PEFT's, also where x is float32 and the compute dtype is not, as after
    `prepare_model_for_kbit_training`; but for that, groups and blocks round no more often than single layers."""
    model = quantised.llama(compute=torch.bfloat16, dtype=x_dtype)
    stock = models.twin(model)
    report = accelerate(model, strict=True)
    truth_value, truth = models.gradients(dense(model, torch.bfloat16).double(), tokens(model))
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    value, grads = models.gradients(model, tokens(model))
    eager_value, eager = models.gradients(stock, tokens(model))
    assert value.dtype == eager_value.dtype
    ours, theirs = (sum(error(g[n], truth[n]) ** 2 for n in truth) ** 0.5 for g in (grads, eager))
    assert ours <= 1.2 * theirs
    assert error(value, truth_value) <= 1.2 * error(eager_value, truth_value) + 2e-3
    assert fused() == report.fused
    assert check(model, tokens(model), verbose=False).ok


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}], ids=str)
def test_all_is_computed_in_the_compute_dtype_and_returned_in_that_of_x(adapter, monkeypatch):
    """Groups, blocks, single layers, sums of adapters and DoRA, where x is float32."""
    from peft_kernels import functional

    model = quantised.llama(compute=torch.bfloat16, adapter=adapter)
    accelerate(model, strict=True)
    seen, results = set(), set()

    def watch(name, original):
        def watched(x, *args, **kwargs):
            seen.add((name, x.dtype))
            return original(x, *args, **kwargs)

        return watched

    for name in ("lora_linear", "lora_linear_group", "lora_swiglu_mlp", "dora_linear"):
        monkeypatch.setattr(functional, name, watch(name, getattr(functional, name)))
    block = model.base_model.model.model.layers[0]
    for module in (block.self_attn.k_proj, block.self_attn.o_proj, block.mlp):
        module.register_forward_hook(lambda module, inputs, y: results.add(y.dtype))
    model(**tokens(model))
    if not adapter:
        model.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"]))
        model.base_model.set_adapter(["default", "other"])
        model(**tokens(model))
    expected = {"dora_linear"} if adapter else {"lora_linear", "lora_linear_group", "lora_swiglu_mlp"}
    assert seen == {(name, torch.bfloat16) for name in expected}
    assert results == {torch.float32}


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_weights_stored_as_another_dtype(storage, fused):
    """As FSDP wants them: the same bytes."""
    model, stock = pair(quant_storage=storage)
    assert first(model).base_layer.weight.dtype == storage
    models.assert_close(model, stock, features(5, 64))
    assert fused() == 2


def test_a_parameter_that_has_lost_its_class(fused):
    """As FSDP1 leaves it: bitsandbytes takes the state from the module then."""
    model, stock = pair()
    base = first(model).base_layer
    data = base.weight.data
    base.weight = torch.nn.Parameter(data, requires_grad=False)
    models.assert_close(model, stock, features(5, 64))
    del base.weight
    base.weight = data
    models.assert_close(model, stock, features(5, 64))
    assert fused() == 4


def test_lora_linear_over_a_four_bit_layer(fused):
    """What PEFT makes where the model does not say that it is quantised."""
    torch.manual_seed(0)
    base = quantised.quantise(models.Toy(64, 64))
    del base.is_loaded_in_4bit
    model = models.adapted(base, target_modules=["first", "second"])
    assert type(first(model)) is not peft_bnb.Linear4bit
    stock = models.twin(model)
    accelerate(model, strict=True)
    models.assert_close(model, stock, features(5, 64))
    assert fused.ops() == {"lora_linear": 2}


def test_dropout_follows_the_seed_and_its_mask_is_used_in_backward(fused):
    model = quantised.toy(adapter={"lora_dropout": 0.5})
    accelerate(model, strict=True)
    layer, x = model.base_model.model.second, features(64, 64)
    torch.manual_seed(1)
    y, other = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), y)
    assert not torch.equal(y, other)
    base = layer.base_layer(x)
    kept = ((y - base).norm() / (layer.eval()(x) - base).norm()).item()
    assert 1.1 < kept < 1.7  # E||drop(v)||² = ||v||² / (1 - p)
    # Along a fixed mask the layer is linear in x: y = <dy/dx, x>, and A times its gradient is the low-rank part.
    weight = layer.lora_A["default"].weight
    grad_x, grad_a = torch.autograd.grad(y.double().sum(), (x, weight))
    torch.testing.assert_close((grad_x * x).double().sum(), y.double().sum(), rtol=1e-4, atol=1e-3)
    low_rank = (y - base).double().sum()
    torch.testing.assert_close((grad_a * weight).double().sum(), low_rank, rtol=1e-4, atol=1e-3)
    assert fused() == 4


def test_only_wanted_gradients(fused):
    model, stock = pair()
    for frozen in ("lora_A", "lora_B"):
        for module in (model, stock):
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.requires_grad_(frozen not in name)
        x = features(5, 64)
        expected = models.gradients(stock, x)[1]
        grads = models.gradients(model, x)[1]
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name])
    assert fused() == 4
