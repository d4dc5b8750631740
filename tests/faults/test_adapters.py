"""Faults of others in adapter, merge and saved state: F41 to F58 (README.md lists what arrives with later ops)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_kernels
from peft_kernels import FusedLoRALinear
from tests.faults.problems import layer
from tests.helpers import relative_error
from tests.nn.models import snapshot


class Net(nn.Module):
    """Two linear layers, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 24)
        self.up, self.down, self.head = nn.Linear(24, 16), nn.Linear(16, 24), nn.Linear(24, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(self.up(self.embed(ids)).relu()))


IDS = torch.arange(12).view(3, 4)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def adapted(target_modules=("up", "down"), seed: int = 1) -> Net:
    model = net()
    peft_kernels.add_lora(model, r=3, target_modules=list(target_modules))
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            nn.init.normal_(module.lora_B, std=0.5)
    return model


def peft_model(target_modules=("up", "down"), names=("default",), **config):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, target_modules=list(target_modules), init_lora_weights=False, **config)
    model = peft.get_peft_model(net(), settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_f41_merged_equals_unmerged_and_not_the_base(dtype):
    """The merged layer computes what the adapted one did (to the rounding of one weight), and is not the base."""
    module = layer(dtype=dtype)
    x = torch.randn(9, 24).to(dtype)
    adapted_y, base = module(x), F.linear(x, module.weight, module.bias)
    module.merge()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert relative_error(module(x).detach(), adapted_y.detach()) < tolerance
    assert relative_error(module(x).detach(), base.detach()) > 0.1
    torch.testing.assert_close(module.to_linear()(x), module(x))


def test_f42_a_thousand_merges_do_not_drift():
    """bfloat16 W + BA - BA loses bits each time, 0.67 of the mean weight after 1,000 rounds; here it is bit-exact."""
    module = layer(dtype=torch.bfloat16)
    before = module.weight.detach().clone()
    for _ in range(1000):
        module.merge()
        module.unmerge()
    assert torch.equal(module.weight, before)
    drifted = before.clone()
    update = (module.scaling * module.lora_B @ module.lora_A).bfloat16()
    for _ in range(1000):
        drifted = drifted + update - update
    assert not torch.equal(drifted, before), "the situation itself: naive merging does drift"


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 3e38])
def test_f43_refused_merge_changes_nothing(bad):
    """Infinite as well as NaN results are refused before the base weight is touched."""
    module = layer()
    with torch.no_grad():
        module.lora_A[0, 0] = bad
        module.lora_B[:, 0] = 10.0
    before, x = copy.deepcopy(module.state_dict()), torch.randn(3, 24)
    for merge in (module.merge, module.to_linear, module.merged_weight):
        with pytest.raises(ValueError, match="not finite"):
            merge()
    assert not module.merged
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert module(x).shape == (3, 16)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_f44_one_scaling_everywhere(use_rslora):
    """alpha / r or alpha / sqrt(r) in forward, gradient and merge alike, also after somebody sets another."""
    module = layer(r=4, lora_alpha=12, use_rslora=use_rslora)
    assert module.scaling == (6.0 if use_rslora else 3.0)
    x = torch.randn(9, 24)
    for scaling in (module.scaling, 0.25, -1.0):
        module.scaling = scaling
        expected = F.linear(x, module.weight, module.bias) + scaling * (x @ module.lora_A.t()) @ module.lora_B.t()
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
        module.lora_B.grad = None
        module(x).sum().backward()
        torch.testing.assert_close(
            module.lora_B.grad, scaling * (x @ module.lora_A.t()).sum(0).expand(16, 4), rtol=1e-4, atol=1e-4
        )
        module.merge()
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
        module.unmerge()


@pytest.mark.parametrize("weights", [[1.0, -0.5], [0.3, 0.7]])
def test_f45_weighted_adapters_of_peft(weights):
    """Negative weights, deleting a merged adapter, unloading: the same as in a model that is not accelerated."""
    stock = peft_model(names=("one", "two"))
    fused = copy.deepcopy(stock)
    peft_kernels.accelerate(fused)
    for model in (stock, fused):
        model.add_weighted_adapter(["one", "two"], weights, "mix", combination_type="cat")
        model.set_adapter("mix")
    torch.testing.assert_close(fused(IDS), stock(IDS))
    for model in (stock, fused):
        model.merge_adapter(["mix"])
    torch.testing.assert_close(fused(IDS), stock(IDS))
    for model in (stock, fused):
        model.unmerge_adapter()
        model.delete_adapter("mix")
        model.set_adapter("two")
    torch.testing.assert_close(fused(IDS), stock(IDS))
    torch.testing.assert_close(fused.unload()(IDS), stock.unload()(IDS))


def test_f46_flags_survive():
    """train, eval, merge, unmerge, disable_adapter and accelerate leave every requires_grad as it was."""
    model = adapted()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name for name, flag in flags.items() if flag} == {
        f"{module}.lora_{matrix}" for module in ("up", "down") for matrix in "AB"
    }
    model.eval()
    peft_kernels.merge_adapter(model)
    model.train()
    peft_kernels.unmerge_adapter(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags

    stock = peft_model()
    stock.base_model.model.up.lora_A["default"].weight.requires_grad_(False)  # an inference-only factor
    fused = copy.deepcopy(stock)
    peft_kernels.accelerate(fused)
    histories = []
    for model in (stock, fused):
        history = [[p.requires_grad for p in model.parameters()]]
        model(IDS)
        history.append([p.requires_grad for p in model.parameters()])
        with torch.no_grad(), model.disable_adapter():
            torch.testing.assert_close(model(IDS), net()(IDS))
            history.append([p.requires_grad for p in model.parameters()])
        history.append([p.requires_grad for p in model.parameters()])
        histories.append(history)
    assert histories[0] == histories[1]
    assert histories[1][0] == histories[1][1]


def test_f47_tied_weights():
    """Merging an adapter of the head must not change the embedding that shares its weight."""
    model = adapted(("head",))
    assert model.head.weight is model.embed.weight
    embedded, logits = model.embed(IDS).clone(), model(IDS)
    peft_kernels.merge_adapter(model)
    assert torch.equal(model.embed(IDS), embedded)
    torch.testing.assert_close(model(IDS), logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.head.weight, model.embed.weight)
    peft_kernels.unmerge_adapter(model)
    assert model.head.weight is model.embed.weight


class Names(nn.Module):
    """Sub-modules whose names are prefixes of each other, or words of the file format."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("foo", "foobar", "lora", "weight", "default", "lora_A_like"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize("target", ["foo", "foobar", "lora", "weight", "default", "lora_A_like"])
def test_f48_names_that_contain_each_other(tmp_path, target):
    """Adapting "foo" adapts and saves "foo" alone, not "foobar"; layers named like the format's words work."""
    torch.manual_seed(0)
    model = Names()
    plain = copy.deepcopy(model)
    report = peft_kernels.add_lora(model, r=2, target_modules=[target])
    assert [adapted_layer.name for adapted_layer in report.layers] == [target]
    nn.init.normal_(getattr(model, target).lora_B)
    folder = peft_kernels.save_adapter(model, tmp_path / "adapter")
    loaded = peft_kernels.load_adapter(plain, folder)
    assert [adapted_layer.name for adapted_layer in loaded.layers] == [target]
    x = torch.randn(3, 8)
    assert torch.equal(plain(x), model(x))


def test_f49_wrong_prefix_is_an_error(tmp_path):
    """Keys that fit nothing load nothing in PEFT, with a warning; here they are refused and the model is unchanged."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder = peft_kernels.save_adapter(adapted(), tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    good = safetensors.load_file(file)
    for prefix in ("base_model.model.model.", "transformer."):
        safetensors.save_file({key.replace("base_model.model.", prefix): v for key, v in good.items()}, file)
        model = net()
        unchanged = snapshot(model)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
            peft_kernels.load_adapter(model, folder)
        unchanged()
    compiled = {key.replace("base_model.model.", "base_model.model._orig_mod."): v for key, v in good.items()}
    safetensors.save_file(compiled, file)
    model = net()
    peft_kernels.load_adapter(model, folder)
    assert torch.equal(model(IDS), adapted()(IDS))


def test_f52_in_place_updates_are_seen():
    """Nothing derived from W, A or B is cached: optimizers, load_state_dict and EMA write in place."""
    module = layer()
    x = torch.randn(5, 24)
    module(x)
    for parameter in (module.weight, module.bias, module.lora_A, module.lora_B):
        with torch.no_grad():
            parameter.mul_(1.5)
        expected = (
            F.linear(x, module.weight, module.bias) + module.scaling * (x @ module.lora_A.t()) @ module.lora_B.t()
        )
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    other = layer(seed=5)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(x), other(x))


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "lora_magnitude_vector"])
@pytest.mark.parametrize("training", [True, False])
def test_f52_norms_of_dora_see_in_place_updates(training, name):
    """What is remembered of ‖W + s B A‖ ends with any of its parts: a stale norm is a wrong scale of each output."""
    module = layer(use_dora=True).train(training)
    x = torch.randn(5, 24)
    module(x)
    with torch.no_grad():
        getattr(module, name).mul_(1.5)
    again = module(x)
    norm = (module.weight + module.scaling * module.lora_B @ module.lora_A).norm(dim=1)
    u = F.linear(x, module.weight) + module.scaling * (x @ module.lora_A.t()) @ module.lora_B.t()
    torch.testing.assert_close(again, module.lora_magnitude_vector / norm * u + module.bias, rtol=1e-4, atol=1e-5)


def test_f52_embeddings_see_in_place_updates():
    module = peft_kernels.FusedLoRAEmbedding(20, 8, r=3)
    ids = torch.arange(12).view(3, 4)
    module(ids)
    for name in ("weight", "lora_embedding_A", "lora_embedding_B"):
        parameter = getattr(module, name)
        with torch.no_grad():
            parameter.normal_()
        update = module.lora_embedding_A[:, ids].permute(1, 2, 0) @ module.lora_embedding_B.t()
        expected = module.weight[ids] + module.scaling * update
        torch.testing.assert_close(module(ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_f57_the_activation_is_the_models_own(activation):
    """Others compute SiLU whatever the model's block has: GELU, its tanh form and SiLU differ."""
    x = torch.linspace(-3, 3, 25).view(5, 5)
    w = torch.eye(5)
    wanted = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}
    y = peft_kernels.functional.lora_swiglu_mlp(
        x, (w, w, w), (None,) * 3, (None,) * 3, scalings=1.0, activation=activation
    )
    for name, function in wanted.items():
        assert (relative_error(y, function(x) * x) < 1e-6) == (name == activation), name


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy], ids=["deepcopy", "pickle", "copy"]
)
@pytest.mark.parametrize("merged", [False, True])
def test_f53_copies(copier, merged):
    """A copy computes the same, keeps its merge state, and (deep) shares nothing with the original."""
    module = layer()
    if merged:
        module.merge()
    state = set(module.__dict__)
    x = torch.randn(5, 24)
    twin = copier(module)
    assert set(module.__dict__) == state
    assert torch.equal(twin(x), module(x))
    assert twin.merged == merged
    if copier is not copy.copy:
        before = module(x).detach()
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(module(x), before)
        twin.unmerge()
        module.unmerge()
        assert not torch.equal(module(x), twin(x))


def test_f56_nothing_replaced_is_an_error():
    """ "Patched 0 layers" and training on: here it is an exception, and a second call changes nothing."""
    model = net()
    unchanged = snapshot(model)
    with pytest.raises(ValueError, match="no_such"):
        peft_kernels.add_lora(model, target_modules=["no_such"])
    with pytest.raises(RuntimeError, match="no PEFT layers"):
        peft_kernels.accelerate(model)
    unchanged()
    theirs = peft_model()
    assert "2" in str(peft_kernels.accelerate(theirs))
    classes = [type(m) for m in theirs.modules()]
    peft_kernels.accelerate(theirs)
    assert [type(m) for m in theirs.modules()] == classes
    assert type(peft_model().base_model.model.up).__module__.startswith("peft."), "instances, never the class"


def test_f56_modules_to_save():
    """A fully trained copy of a layer beside adapters (ModulesToSaveWrapper) goes on training."""
    stock = peft_model(("up",), modules_to_save=["down"])
    fused = copy.deepcopy(stock)
    peft_kernels.accelerate(fused)
    for model in (stock, fused):
        model(IDS).square().sum().backward()
    for (name, a), (_, b) in zip(stock.named_parameters(), fused.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", ["truncated", "trailing", "header", "empty", "half config"])
def test_f58_corrupt_file(tmp_path, damage):
    """A file cut short, lengthened or garbled: the message names it and the model stays what it was."""
    folder = peft_kernels.save_adapter(adapted(), tmp_path / "adapter")
    file = folder / ("adapter_config.json" if damage == "half config" else "adapter_model.safetensors")
    data = file.read_bytes()
    file.write_bytes(
        {
            "truncated": data[:-9], "trailing": data + b"\0" * 8, "header": b"\xff" * 8 + data[8:], "empty": b"",
            "half config": data[: len(data) // 2],
        }[damage]
    )  # fmt: skip
    for model in (net(), adapted(seed=5)):
        unchanged = snapshot(model)
        with pytest.raises(ValueError, match=file.name):
            peft_kernels.load_adapter(model, folder)
        unchanged()


def test_f58_interrupted_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    """The disk fills up in the middle of saving: what was saved before still loads, and no scraps remain."""
    import os

    folder = peft_kernels.save_adapter(adapted(), tmp_path / "adapter")
    expected = adapted()(IDS)
    files = sorted(path.name for path in folder.iterdir())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        peft_kernels.save_adapter(adapted(seed=7), folder)
    monkeypatch.undo()
    model = net()
    peft_kernels.load_adapter(model, folder)
    assert torch.equal(model(IDS), expected)
    assert sorted(path.name for path in folder.iterdir()) == files
