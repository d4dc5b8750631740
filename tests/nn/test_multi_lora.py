"""`MultiLoRALinear`: each row is its own adapter's layer; whole models; what a pool's layer shares and refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import AdapterPool, FusedLoRALinear, MultiLoRALinear, attach_pool, check, detach_pool
from peft_kernels.nn import FusedQLoRALinear, NF4Linear, add_lora
from peft_kernels.nn.nf4 import is_quantised_linear
from tests.helpers import relative_error
from tests.nn import models
from tests.nn.quantised import same_bits, same_state

K, N = 64, 48
RANKS = {"one": 1, "eight": 8, "wide": 64, "odd": 37}
NAMES = ["wide", "one", "__base__", "odd", "wide", "eight"]
LAYER = "proj"


def factors(r: int, n: int = N, k: int = K, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * r + seed)
    return torch.randn(r, k, generator=generator) * k**-0.5, torch.randn(n, r, generator=generator) * r**-0.5


def alpha(r: int) -> float:
    return 0.5 * r + 1


def a_pool(names=tuple(RANKS)) -> AdapterPool:
    pool = AdapterPool({LAYER: (N, K)}, budget=1 << 20)
    for name in names:
        pool.load(name, {LAYER: factors(RANKS[name])}, lora_alpha=alpha(RANKS[name]))
    return pool


def conv1d() -> nn.Module:
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(N, K)
    nn.init.normal_(layer.bias)
    return layer


def linear4bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(K, N, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu")


LINEARS = {
    "linear": lambda: nn.Linear(K, N),
    "no bias": lambda: nn.Linear(K, N, bias=False),
    "conv1d": conv1d,
    "nf4": lambda: NF4Linear(K, N),
    "bitsandbytes": linear4bit,
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(5)
    return LINEARS[kind]()


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(2))


def alone(linear: nn.Module, name: str, x: Tensor) -> Tensor:
    """The layer with one adapter, by the module for one."""
    if name == "__base__":
        return linear(x)
    r = RANKS[name]
    kind = FusedQLoRALinear if is_quantised_linear(linear) else FusedLoRALinear
    layer = kind.from_linear(copy.deepcopy(linear), r, lora_alpha=alpha(r))
    with torch.no_grad():
        for parameter, value in zip((layer.lora_A, layer.lora_B), factors(r), strict=True):
            parameter.copy_(value)
    return layer(x)


@pytest.mark.parametrize("kind", LINEARS)
@torch.no_grad()
def test_each_row_is_its_own_adapters_layer(kind):
    linear, pool = make(kind), a_pool()
    layer = MultiLoRALinear.from_linear(linear, pool)
    for x in (x_of(6), x_of(6, 3)):
        truth = torch.stack([alone(linear, name, x)[row] for row, name in enumerate(NAMES)])
        with pool.use(NAMES) as ids:
            y = layer(x)
            assert torch.equal(layer(x, ids), y)
        assert relative_error(y, truth) < 1e-6
        assert y.shape == truth.shape


@torch.no_grad()
def test_ids_of_each_token_and_weighted_adapters():
    linear, pool = make("linear"), a_pool()
    layer, x = MultiLoRALinear.from_linear(linear, pool), x_of(2, 3)
    truth = torch.stack([alone(linear, name, x.view(6, K))[row] for row, name in enumerate(NAMES)]).view(2, 3, N)
    assert relative_error(layer(x, pool.ids(NAMES).view(2, 3)), truth) < 1e-6
    pairs, weights = [["wide", "odd"], ["__base__", "one"]], torch.tensor([[0.5, -2.0], [3.0, 1.0]])
    y = layer(x, torch.stack([pool.ids(pair) for pair in pairs]), weights)
    for row, (pair, w) in enumerate(zip(pairs, weights.tolist(), strict=True)):
        base = linear(x[row])
        expected = base + sum(c * (alone(linear, n, x)[row] - base) for c, n in zip(w, pair, strict=True))
        assert relative_error(y[row], expected) < 1e-6


def test_gradients_reach_x_and_the_weights_of_adapters():
    linear, pool = make("linear").double(), AdapterPool({LAYER: (N, K)}, budget=1 << 20, dtype=torch.float64)
    pool.load("one", {LAYER: factors(3)}, scaling=0.7)
    layer, x = MultiLoRALinear.from_linear(linear, pool), x_of(2).double().requires_grad_()
    w = torch.tensor([[0.3], [1.2]], dtype=torch.float64, requires_grad=True)
    with pool.use(["one", "one"]) as ids:
        assert torch.autograd.gradcheck(lambda x, w: layer(x, ids.view(2, 1), w), (x, w))
        layer(x).sum().backward()
    assert [p.grad for p in layer.parameters()] == [None, None]


def test_the_innermost_block_says_which_adapters_run():
    linear, pool = make("linear"), a_pool()
    layer, x = MultiLoRALinear.from_linear(linear, pool), x_of(1)
    with pool.use(["one"]):
        one = layer(x)
        with pool.use(["wide"]):
            assert not torch.allclose(layer(x), one)
        assert torch.equal(layer(x), one)
    for _ in range(2):  # never the base model by oversight
        with pytest.raises(RuntimeError, match=r"proj is called without adapter_ids.*__base__"):
            layer(x)
    with pool.use(["__base__"]):
        assert relative_error(layer(x), linear(x)) < 1e-6


@pytest.mark.parametrize("kind", LINEARS)
def test_state_dict_and_what_comes_back(kind):
    linear, pool = make(kind), a_pool()
    state, flags = copy.deepcopy(linear.state_dict()), [p.requires_grad for p in linear.parameters()]
    layer = MultiLoRALinear.from_linear(linear, pool)
    assert not any(p.requires_grad for p in (*layer.parameters(), *linear.parameters()))
    own = layer.state_dict()
    if kind == "conv1d":
        assert torch.equal(own["weight"], state["weight"].t())
        assert layer.weight.data_ptr() == linear.weight.data_ptr()
    else:
        assert same_state(own, state)
    layer.load_state_dict({name: value.clone() for name, value in own.items()})
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({name: value for name, value in own.items() if not name.startswith("weight")})
    back = layer.to_linear()
    assert type(back) is (NF4Linear if kind == "bitsandbytes" else type(linear))
    assert same_state(back.state_dict(), state)
    if kind in ("linear", "no bias", "conv1d"):
        assert [p.requires_grad for p in back.parameters()] == flags == [True] * len(flags)
        assert back.weight.data_ptr() == linear.weight.data_ptr()
    x = x_of(3)
    with torch.no_grad():
        assert relative_error(back(x), linear(x)) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_copies_and_moves_share_the_pool(kind):
    pool = a_pool()
    layer = MultiLoRALinear.from_linear(make(kind), pool)
    copied, x = copy.deepcopy(layer), x_of(2)
    assert copied.pool_layer.pool is pool
    with pool.use(["wide", "one"]):
        y = layer(x)
        assert torch.equal(copied(x), y)
        half = copied.to(torch.bfloat16)(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert relative_error(half, y) < 2e-2
        assert torch.equal(layer(x), y)
    assert f"pool_layer={LAYER}" in repr(layer)
    assert ("nf4" in repr(layer)) == (kind == "nf4")
    assert kind != "nf4" or same_bits(copied.weight, layer.weight)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(layer)


def test_refusals():
    pool, linear = a_pool(), nn.Linear(K, N)
    two = AdapterPool({"a": (N, K), "b": (N, N)}, budget=1 << 16)
    with pytest.raises(TypeError, match="from_linear or attach_pool"):
        MultiLoRALinear(K, N)
    with pytest.raises(TypeError, match="expected an AdapterPool"):
        MultiLoRALinear.from_linear(linear, None)
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.sparse\.Embedding"):
        MultiLoRALinear.from_linear(nn.Embedding(N, K), pool)
    with pytest.raises(ValueError, match="name is None, but the pool has 2 layers"):
        MultiLoRALinear.from_linear(linear, two)
    with pytest.raises(ValueError, match="no layer 'c'"):
        MultiLoRALinear.from_linear(linear, two, "c")
    with pytest.raises(ValueError, match=r"layer b is for \(48, 48\)"):
        MultiLoRALinear.from_linear(linear, two, "b")
    assert linear.weight.requires_grad, "nothing was frozen"
    layer = MultiLoRALinear.from_linear(linear, pool)
    with pytest.raises(ValueError, match="adapter_ids has shape"):
        layer(x_of(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="adapter_weights has shape"), pool.use(["one"] * 3):
        layer(x_of(3), adapter_weights=torch.ones(3, 2))


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def load_some(pool: AdapterPool) -> dict[str, dict]:
    """ "all" in every layer, "few" in half of them."""
    made = {
        name: {layer: factors(r, *size, seed=i) for i, (layer, size) in enumerate(pool.sizes.items()) if i % step == 0}
        for name, r, step in (("all", 5, 1), ("few", 12, 2))
    }
    for name, tensors in made.items():
        pool.load(name, tensors, scaling=0.4)
    return made


@pytest.mark.parametrize("build", [llama, models.gpt2], ids=["llama", "gpt2"])
@torch.no_grad()
def test_each_row_of_a_model_is_its_own_adapters_model(build):
    """The truth has the adapter added to the weights."""
    model = build()
    targets = ["c_attn", "c_fc"] if build is models.gpt2 else ["q_proj", "v_proj", "down_proj"]
    pool = AdapterPool.for_model(model, budget=1 << 22, target_modules=targets)
    tensors, plain = load_some(pool), copy.deepcopy(model)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    assert attach_pool(model, pool) == tuple(pool.sizes)
    assert sum(isinstance(module, MultiLoRALinear) for module in model.modules()) == len(pool.sizes)
    ids, names = torch.arange(21).reshape(3, 7) % 20, ["few", "__base__", "all"]
    with pool.use(names):
        logits = model(ids).logits
        assert check(model, {"input_ids": ids}, verbose=False).ok
    for row, name in enumerate(names):
        merged = copy.deepcopy(plain)
        for layer, (a, b) in tensors.get(name, {}).items():
            weight, update = merged.get_submodule(layer).weight, 0.4 * b @ a
            weight += update.t() if build is models.gpt2 else update
        assert relative_error(logits[row], merged(ids).logits[row]) < 1e-5
    assert not torch.allclose(logits[0], plain(ids).logits[0], atol=1e-2)
    with pytest.raises(RuntimeError, match="without adapter_ids"):
        model(ids)
    assert detach_pool(model) == tuple(pool.sizes)
    assert same_state(model.state_dict(), state)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_a_model_that_does_not_fit_stays_as_it_is():
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))

    fitting = {"0": (6, 8)}
    cases = [
        ({**fitting, "4": (4, 6)}, lambda m: None, "no layer 4"),
        ({**fitting, "2": (4, 5)}, lambda m: None, r"layer 2 is for \(4, 5\)"),
        ({**fitting, "1": (6, 6)}, lambda m: None, "Tanh"),
        (fitting, lambda m: m[0].register_forward_hook(lambda *_: None), "0 has hooks"),
        (fitting, lambda m: attach_pool(m, AdapterPool(fitting, budget=4096)), "0 has a pool already"),
    ]
    for sizes, change, message in cases:
        broken = model()
        change(broken)
        unchanged = models.snapshot(broken)
        with pytest.raises((ValueError, TypeError), match=message):
            attach_pool(broken, AdapterPool(sizes, budget=4096))
        unchanged()
    with pytest.raises(ValueError, match="itself a linear layer; use MultiLoRALinear"):
        attach_pool(nn.Linear(8, 6), AdapterPool(fitting, budget=4096))
    with pytest.raises(ValueError, match="itself a MultiLoRALinear"):
        detach_pool(MultiLoRALinear.from_linear(nn.Linear(8, 6), AdapterPool(fitting, budget=4096)))


def test_pytorchs_encoder_layer_leaves_its_fast_path():
    encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    pool = AdapterPool({"linear1": (24, 16), "linear2": (16, 24)}, budget=1 << 16)
    attach_pool(encoder, pool)
    pool.load("a", {"linear1": factors(2, 24, 16)}, scaling=1.0)
    x = torch.randn(2, 3, 16)
    with torch.no_grad(), pool.use(["a", "__base__"]):
        y = encoder(x)
        with pool.use(["__base__"] * 2):
            base = encoder(x)
    assert not torch.allclose(y[0], base[0], atol=1e-3)
    assert torch.equal(y[1], base[1])


def test_one_graph_under_torch_compile():
    linear, pool = make("linear"), a_pool()
    layer, x = MultiLoRALinear.from_linear(linear, pool), x_of(6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for names in (NAMES, NAMES[::-1]):
        ids = pool.ids(names)
        with torch.no_grad():
            assert torch.equal(compiled(x, ids), layer(x, ids))


def test_an_adapted_model_is_refused():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    add_lora(model, r=2, target_modules=["0"])
    with pytest.raises(TypeError, match="FusedLoRALinear"):
        attach_pool(model, AdapterPool({"0": (6, 8)}, budget=4096))
