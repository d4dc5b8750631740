"""Groups compute what their layers do, keep x once, and stay the layers that they are made of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import (
    FusedLoRAGroup,
    FusedLoRALinear,
    FusedLoRASwiGLU,
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)
from tests.helpers import relative_error

NAMES = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EXACT = 1e-13


def disturb(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.5)


def qkv(ranks=(3, 5, 2), bias: bool = True, **options) -> FusedLoRAGroup:
    """Grouped-query attention: k and v are narrower than q."""
    linears = [nn.Linear(12, n, bias=bias) for n in (16, 4, 4)]
    group = FusedLoRAGroup.from_linears(linears, ranks, names=NAMES, **options)
    disturb(group)
    return group


def mlp(ranks=(3, 4, 5), **options) -> FusedLoRASwiGLU:
    linears = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
    block = FusedLoRASwiGLU.from_linears(*linears, ranks, **options)
    disturb(block)
    return block


def separately(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What the children compute when called themselves."""
    if isinstance(module, FusedLoRAGroup):
        return tuple(layer(x) for layer in module.layers)
    act = {
        "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh")
    }[module.activation]  # fmt: skip
    gate, up, down = module.layers
    return (down(act(gate(x)) * up(x)),)


def together(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = module(x)
    return y if isinstance(y, tuple) else (y,)


def outputs_and_gradients(module: nn.Module, call, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    ys = call(module, x)
    sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in ys).backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {**{str(i): y.detach() for i, y in enumerate(ys)}, "x": x.grad, **grads}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float = EXACT) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert relative_error(value, expected[name]) < bound, name


MODULES = {
    "qkv": qkv,
    "one rank": lambda: FusedLoRAGroup.from_linears([nn.Linear(12, 16), nn.Linear(12, 4)], 3),
    "a frozen projection": lambda: qkv((3, None, 2)),
    "no bias": lambda: qkv(bias=False),
    "trained bias": lambda: qkv(train_bias=True),
    "frozen A": lambda: qkv(freeze_A=True),
    "rsLoRA": lambda: qkv(use_rslora=True, lora_alpha=5),
    "DoRA": lambda: qkv(use_dora=True),
    "lora_bias": lambda: qkv(lora_bias=True),
    "SwiGLU": mlp,
    "GeGLU": lambda: mlp(activation="gelu"),
    "GeGLU, tanh": lambda: mlp(activation="gelu_tanh"),
    "SwiGLU, frozen down": lambda: mlp((3, 4, None)),
    "SwiGLU, DoRA": lambda: mlp(use_dora=True),
}


@pytest.mark.parametrize("name", MODULES)
class TestAsTheLayers:
    def test_outputs_and_gradients(self, name):
        module = MODULES[name]().double()
        x = torch.randn(3, 7, 12, dtype=torch.float64)
        expected = outputs_and_gradients(module, separately, x)
        assert_same(outputs_and_gradients(module, together, x), expected)
        assert len(expected) > 3

    def test_merge_unmerge_and_plain_layers(self, name):
        module = MODULES[name]().double()
        x = torch.randn(7, 12, dtype=torch.float64)
        expected, state = together(module, x), copy.deepcopy(module.state_dict())
        module.merge()
        assert module.merged
        assert all(relative_error(a, b) < EXACT for a, b in zip(together(module, x), expected, strict=True))
        linears = module.to_linears()
        assert all(type(linear) is nn.Linear for linear in linears)
        module.unmerge()
        assert not module.merged
        assert all(torch.equal(a, b) for a, b in zip(together(module, x), expected, strict=True))
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        if isinstance(module, FusedLoRAGroup):
            assert all(relative_error(f(x), y) < EXACT for f, y in zip(linears, expected, strict=True))

    def test_copies(self, name):
        module, x = MODULES[name]().eval(), torch.randn(7, 12)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert repr(twin) == repr(module)
            assert all(torch.equal(a, b) for a, b in zip(together(twin, x), together(module, x), strict=True))
            with torch.no_grad():
                next(p for p in twin.parameters() if p.requires_grad).zero_()
            twin.load_state_dict(module.state_dict(), strict=True)
            assert all(torch.equal(a, b) for a, b in zip(together(twin, x), together(module, x), strict=True))


class TestGroup:
    def test_keys_are_those_of_the_layers(self):
        keys = [f"{name}.{part}" for name in NAMES for part in ("weight", "bias", "lora_A", "lora_B")]
        assert list(qkv().state_dict()) == keys

    def test_layers_are_shared_not_copied(self):
        linears = [nn.Linear(12, 16), nn.Linear(12, 4)]
        ready = FusedLoRALinear.from_linear(linears[0], 3)
        group = FusedLoRAGroup.from_linears([ready, linears[1]], (7, None))
        assert group.layers == (ready, linears[1])
        assert ready.r == 3
        assert [p.requires_grad for p in linears[1].parameters()] == [False, False]

    def test_conv1d(self):
        conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
        linears = [conv1d(16, 12), conv1d(12, 12)]
        group, x = FusedLoRAGroup.from_linears(linears, 3), torch.randn(5, 12)
        assert all(relative_error(y, f(x)) < 1e-6 for y, f in zip(group(x), linears, strict=True))

    def test_token_mask(self):
        group, x, mask = qkv((3, None, 2)), torch.randn(4, 7, 12), torch.rand(4, 7) < 0.5
        expected = (group.q_proj(x, token_mask=mask), group.k_proj(x), group.v_proj(x, token_mask=mask))
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(group(x, token_mask=mask), expected, strict=True))
        group.q_proj.register_forward_hook(lambda *args: None)
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(group(x, token_mask=mask), expected, strict=True))
        group.merge()
        with pytest.raises(ValueError, match=r"token_mask.*merged"):
            group(x, token_mask=mask)

    def test_x_is_kept_once(self):
        group = qkv()
        held = {p.data_ptr() for p in group.parameters()}
        kept: dict[str, list[int]] = {}
        for name, call in (("together", together), ("separately", separately)):
            sizes = kept.setdefault(name, [])

            def pack(tensor, sizes=sizes):
                if tensor.data_ptr() not in held:
                    sizes.append(tensor.numel())
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                call(group, torch.randn(1000, 12))
        assert sum(kept["together"]) == 1000 * (12 + 3 + 5 + 2)
        assert sum(kept["separately"]) == 1000 * (3 * 12 + 3 + 5 + 2)

    @pytest.mark.parametrize("training", [True, False])
    def test_dropout_of_each_layer(self, training):
        """Each has its own probability and mode; the mean over many samples is the output without dropout."""
        group, x = qkv(lora_dropout=0.5).train(training), torch.randn(1, 12)
        group.k_proj.lora_dropout = 0.0
        group.v_proj.eval()
        many = x.expand(20_000, 12)
        exact = [y.detach() for y in copy.deepcopy(group).eval()(x)]
        for y, truth, drops in zip(group(many), exact, (training, False, False), strict=True):
            assert (y.std(0).max() > 0.05) == drops
            assert relative_error(y.mean(0, keepdim=True), truth) < 0.05
        torch.manual_seed(3)
        first = group(many)
        torch.manual_seed(3)
        assert all(torch.equal(a, b) for a, b in zip(group(many), first, strict=True))

    def test_hooks_of_a_layer_run(self):
        group, x, seen = qkv(), torch.randn(4, 12), []
        expected = group(x)
        group.k_proj.register_forward_hook(lambda module, args, y: seen.append(y.shape))
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(group(x), expected, strict=True))
        assert seen == [(4, 4)]

    def test_a_layer_that_was_replaced_is_called(self):
        class Doubled(FusedLoRALinear):
            def forward(self, x, token_mask=None):
                return 2 * super().forward(x, token_mask)

        group, x = qkv(), torch.randn(4, 12)
        q, k, v = (y.detach() for y in group(x))
        group.k_proj.__class__ = Doubled
        group.v_proj = torch.compile(group.v_proj, backend="eager")
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(group(x), (q, 2 * k, v), strict=True))

    def test_one_that_cannot_be_merged_leaves_all_unmerged(self):
        group = qkv()
        with torch.no_grad():
            group.v_proj.lora_B.fill_(float("inf"))
        with pytest.raises(ValueError, match=r"FusedLoRAGroup: v_proj: .*not finite"):
            group.merge()
        assert not any(layer.merged for layer in group.layers)

    def test_model_functions_see_the_layers(self, tmp_path):
        model, x = nn.ModuleDict({"attn": qkv(), "mlp": mlp()}), torch.randn(4, 12)
        expected = [*model["attn"](x), model["mlp"](x)]
        merge_adapter(model)
        assert model["attn"].merged
        unmerge_adapter(model)
        save_adapter(model, tmp_path)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora" in name:
                    parameter.zero_()
        report = load_adapter(other, tmp_path)
        assert [layer.name for layer in report.layers] == [f"attn.{n}" for n in NAMES] + [f"mlp.{n}" for n in MLP]
        assert all(torch.equal(a, b) for a, b in zip([*other["attn"](x), other["mlp"](x)], expected, strict=True))

    def test_adapter_of_the_plain_model(self, tmp_path):
        """Where the names agree, what was saved from separate layers loads into a group."""
        plain = nn.ModuleDict({"attn": nn.ModuleDict(dict(zip(NAMES, qkv((2, 2, 2)).layers, strict=True)))})
        save_adapter(plain, tmp_path)
        grouped = nn.ModuleDict({"attn": qkv((2, 2, 2))})
        load_adapter(grouped, tmp_path)
        assert torch.equal(grouped["attn"].q_proj.lora_B, plain["attn"]["q_proj"].lora_B)

    def test_half_precision_with_float32_adapters(self):
        group = qkv().bfloat16()
        for layer in group.layers:
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
        x = torch.randn(33, 12).bfloat16()
        expected = outputs_and_gradients(group, separately, x)
        got = outputs_and_gradients(group, together, x)
        assert got["q_proj.lora_A"].dtype == torch.float32
        assert_same(got, expected, bound=4e-3)


class TestSwiGLU:
    def test_keys(self):
        assert list(mlp().state_dict()) == [
            f"{name}.{part}" for name in MLP for part in ("weight", "bias", "lora_A", "lora_B")
        ]
        named = FusedLoRASwiGLU.from_linears(
            nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4), 2, names=("w1", "w3", "w2")
        )
        assert {key.split(".")[0] for key in named.state_dict()} == {"w1", "w3", "w2"}
        assert "activation=silu" in repr(named)

    def test_keeps_x_gate_up_and_the_small_products(self):
        block, kept = mlp(), []
        held = {p.data_ptr() for p in block.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in held:
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(torch.randn(1000, 12))
        assert sum(kept) == 1000 * (12 + 20 + 20 + 3 + 4 + 5)

    def test_dropout(self):
        block, x = mlp(lora_dropout=0.5), torch.randn(64, 12)
        assert not torch.equal(block(x), block(x))
        torch.manual_seed(3)
        first = block(x)
        torch.manual_seed(3)
        assert torch.equal(block(x), first)
        assert torch.equal(block.eval()(x), block(x))


class Mine(nn.Linear):
    pass


REFUSED = {
    "subclass": (lambda: FusedLoRAGroup([nn.Linear(4, 4), Mine(4, 4)]), TypeError, "1 is .*Mine"),
    "subclass to adapt": (lambda: FusedLoRAGroup.from_linears([nn.Linear(4, 4), Mine(4, 4)]), TypeError, "Mine"),
    "nothing": (lambda: FusedLoRAGroup([]), ValueError, "layers is empty"),
    "inputs": (lambda: FusedLoRAGroup([nn.Linear(4, 4), nn.Linear(5, 4)]), ValueError, "in_features of 1 is 5"),
    "names": (lambda: FusedLoRAGroup([nn.Linear(4, 4)], names=("a", "b")), ValueError, "expected 1 different"),
    "same names": (lambda: FusedLoRAGroup([nn.Linear(4, 4)] * 2, names=("a", "a")), ValueError, "different names"),
    "ranks": (lambda: FusedLoRAGroup.from_linears([nn.Linear(4, 4)], (2, 2)), ValueError, "r has 2 entries"),
    "rank 0": (lambda: FusedLoRAGroup.from_linears([nn.Linear(4, 4)], 0), ValueError, "r is 0"),
    "adapter dtypes": (
        lambda: FusedLoRAGroup([FusedLoRALinear(4, 4, 2, adapter_dtype=d) for d in (torch.float32, torch.float16)]),
        ValueError, r"adapter dtype of 1 is torch\.float16",
    ),
    "gate and up": (
        lambda: FusedLoRASwiGLU(nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(6, 4)),
        ValueError, "out_features of up_proj",
    ),
    "down": (
        lambda: FusedLoRASwiGLU(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(5, 4)), ValueError, "down_proj has 5",
    ),
    "activation": (
        lambda: FusedLoRASwiGLU(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4), activation="relu"),
        ValueError, "activation is 'relu'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_what_is_refused_is_not_frozen():
    linears = [nn.Linear(4, 4), nn.Linear(4, 4), Mine(4, 4)]
    with pytest.raises(TypeError):
        FusedLoRAGroup.from_linears(linears, (2, None, 2))
    with pytest.raises(ValueError, match="names"):
        FusedLoRAGroup.from_linears(linears[:2], (2, None), names=("a",))
    with pytest.raises(ValueError, match="activation"):
        FusedLoRASwiGLU.from_linears(*(nn.Linear(4, 4) for _ in range(3)), 2, activation="relu")
    assert all(p.requires_grad for linear in linears for p in linear.parameters())
