"""`NF4Linear` computes with the weight that it unpacks, and moves, copies, saves and loads it byte for byte."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peft_kernels import NF4Linear
from peft_kernels.formats import nf4
from tests.helpers import relative_error
from tests.nn.quantised import COPIERS, MOVES, same_bits, same_state

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KEYS = ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"]
NESTED_KEYS = [*KEYS, "weight.nested_absmax", "weight.nested_quant_map"]


def made(n: int = 10, k: int = 36, dtype: torch.dtype = torch.float32, **options) -> NF4Linear:
    return NF4Linear.from_linear(nn.Linear(k, n, dtype=dtype), **options)


def conv1d(n: int, k: int) -> nn.Module:
    layer = pytest.importorskip("transformers").pytorch_utils.Conv1D(n, k)
    nn.init.normal_(layer.bias)
    return layer


def linear4bit(n: int = 10, k: int = 36, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """bitsandbytes' layer, quantised by its being moved; in training mode, since its evaluation mode on a CPU with
    AVX-512 packs the weight anew and refuses most shapes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(k, n, quant_type="nf4", compute_dtype=dtype, **options)
    return layer.to(dtype).to("cpu").train()


class TestForward:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    @pytest.mark.parametrize("quantised", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    def test_output_and_gradients(self, dtype, quantised, bias):
        """With the weight rounded to x's dtype, whatever was quantised."""
        layer = NF4Linear.from_linear(nn.Linear(36, 10, bias=bias, dtype=quantised))
        x = torch.randn(7, 36, dtype=dtype, requires_grad=True)
        grad_y = torch.randn(7, 10, dtype=dtype)
        y = layer(x)
        wanted = [x, *layer.parameters()]
        grads = torch.autograd.grad(y, wanted, grad_y)
        weight = layer.dequantize(dtype).double()
        assert y.dtype == dtype
        exact = x.double() @ weight.T + (layer.bias.to(dtype).double() if bias else 0)
        eps = 4 * torch.finfo(dtype).eps  # of sums of 36 products in this dtype, or in float32 rounded once
        assert relative_error(y.detach(), exact.detach()) < eps
        assert relative_error(grads[0], grad_y.double() @ weight) < eps
        if bias:
            assert grads[1].dtype == quantised
            assert relative_error(grads[1], grad_y.double().sum(0)) < max(eps, torch.finfo(quantised).eps)

    @pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (40,)], ids=str)
    def test_any_batch(self, batch):
        layer, x = made(), torch.randn(*batch, 36)
        y = layer(x)
        assert y.shape == (*batch, 10)
        assert torch.allclose(y, F.linear(x, layer.dequantize(), layer.bias), atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_autocast(self, dtype):
        layer, x = made(), torch.randn(33, 36)
        with torch.autocast("cpu", dtype):
            y = layer(x)
        assert y.dtype == dtype
        weight = layer.dequantize(dtype).double()
        exact = x.to(dtype).double() @ weight.T + layer.bias.to(dtype).double()
        assert relative_error(y.detach(), exact.detach()) < torch.finfo(dtype).eps

    def test_checkpointing_gives_the_same_gradients(self):
        from torch.utils.checkpoint import checkpoint

        layer, results = made(), []
        for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
            x = torch.ones(5, 36, requires_grad=True)
            layer.zero_grad()
            call(x).square().sum().backward()
            results.append((x.grad, layer.bias.grad.clone()))
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))

    def test_one_graph_for_all_batches(self):
        torch._dynamo.reset()
        model = nn.Sequential(made(36, 36, double_quant=False), nn.Tanh(), made(10, 36))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for m in (5, 9, 64):
                x = torch.randn(m, 36, requires_grad=True)
                expected, got = (torch.autograd.grad(y.square().sum(), x)[0] for y in (model(x), compiled(x)))
                assert relative_error(got, expected) < 1e-6

    def test_compiled_code_sees_a_weight_that_was_loaded(self):
        torch._dynamo.reset()
        layer, other, x = made(), made(), torch.randn(3, 36)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(x)
        layer.load_state_dict(other.state_dict())
        assert relative_error(compiled(x).detach(), other(x).detach()) < 1e-6


class TestFromLinear:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("blocksize", [32, 64, 4096])
    @pytest.mark.parametrize("double_quant", [True, False])
    def test_linear(self, dtype, blocksize, double_quant):
        linear = nn.Linear(36, 10, dtype=dtype).eval()
        linear.bias.requires_grad_(False)
        before = copy.deepcopy(linear.state_dict())
        layer = NF4Linear.from_linear(linear, blocksize=blocksize, double_quant=double_quant)
        assert same_bits(layer.weight, nf4.quantize(linear.weight, blocksize, double_quant))
        assert layer.bias is linear.bias
        assert not layer.bias.requires_grad
        assert not layer.training
        assert (layer.in_features, layer.out_features) == (36, 10)
        assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((10, 36), dtype, "cpu")
        assert same_state(linear.state_dict(), before)
        assert linear.weight.requires_grad

    @pytest.mark.parametrize(("n", "k"), [(10, 36), (8, 8)], ids=["rectangular", "square"])
    def test_conv1d(self, n, k):
        linear, x = conv1d(n, k), torch.randn(5, k)
        layer = NF4Linear.from_linear(linear)
        assert same_bits(layer.weight, nf4.quantize(linear.weight.t().contiguous()))
        assert relative_error(layer(x).detach(), linear(x).detach()) < 0.2
        assert layer.bias is linear.bias

    def test_quantised_layers_are_shared(self):
        layer = made(blocksize=128, double_quant=False)
        twin = NF4Linear.from_linear(layer)
        assert twin.weight is layer.weight

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("compress_statistics", [True, False])
    def test_bitsandbytes(self, dtype, compress_statistics):
        theirs = linear4bit(dtype=dtype, compress_statistics=compress_statistics)
        layer, x = NF4Linear.from_linear(theirs), torch.randn(7, 36, dtype=dtype)
        assert layer.weight.packed.data_ptr() == theirs.weight.data_ptr()
        assert layer.weight.is_nested == compress_statistics
        assert layer.bias is theirs.bias
        assert relative_error(layer(x).detach(), theirs(x).detach()) < 2 * torch.finfo(dtype).eps

    def test_refuses_what_may_compute_something_else(self):
        class Mine(nn.Linear):
            pass

        for module in (Mine(3, 3), nn.Bilinear(3, 3, 3), nn.Embedding(3, 3), nn.Sequential(), None):
            with pytest.raises(TypeError, match=rf"NF4Linear.from_linear: got .*{type(module).__name__}"):
                NF4Linear.from_linear(module)

    @pytest.mark.parametrize(
        ("change", "options", "error", "text"),
        [
            (lambda w: w.double(), {}, TypeError, "float64"),
            (lambda w: w.int(), {}, TypeError, "int32"),
            (lambda w: w / 0, {}, ValueError, "not finite"),
            (lambda w: w, {"blocksize": 48}, ValueError, "blocksize is 48"),
        ],
        ids=["float64", "int32", "infinite", "blocksize"],
    )
    def test_refuses_weights(self, change, options, error, text):
        linear = nn.Linear(36, 10)
        linear.weight = nn.Parameter(change(linear.weight.detach()), requires_grad=False)
        with pytest.raises(error, match=text):
            NF4Linear.from_linear(linear, **options)

    def test_refuses_fp4(self):
        bitsandbytes = pytest.importorskip("bitsandbytes")
        with pytest.raises(ValueError, match="fp4"):
            NF4Linear.from_linear(bitsandbytes.nn.Linear4bit(36, 10, quant_type="fp4").to("cpu"))


class TestConstructor:
    def test_starts_as_a_linear_layer_does(self):
        torch.manual_seed(3)
        layer = NF4Linear(36, 10, blocksize=32, double_quant=False)
        torch.manual_seed(3)
        linear = nn.Linear(36, 10)
        assert same_bits(layer.weight, nf4.quantize(linear.weight, 32, False))
        assert torch.equal(layer.bias, linear.bias)
        assert layer.bias.requires_grad

    @pytest.mark.parametrize("double_quant", [True, False])
    def test_meta(self, double_quant):
        layer = NF4Linear(2**17, 2**15, device="meta", dtype=torch.bfloat16, double_quant=double_quant)
        x = torch.empty(3, 2**17, device="meta", dtype=torch.bfloat16)
        assert layer(x).shape == (3, 2**15)
        assert all(tensor.is_meta for tensor in layer.state_dict().values())

    def test_no_bias_and_repr(self):
        layer = NF4Linear(36, 10, False, blocksize=128, double_quant=False)
        text = "in_features=36, out_features=10, bias=False, nf4, blocksize=128, double_quant=False"
        assert repr(layer) == f"NF4Linear({text})"


class TestInFull:
    @pytest.mark.parametrize("bias", [True, False])
    def test_to_linear(self, bias):
        layer, x = NF4Linear(36, 10, bias, dtype=torch.bfloat16).eval(), torch.randn(4, 36).bfloat16()
        linear = layer.to_linear()
        assert type(linear) is nn.Linear
        assert not linear.training
        assert torch.equal(linear.weight, layer.dequantize())
        assert not any(p.requires_grad for p in linear.parameters())
        assert relative_error(linear(x), layer(x).detach()) < 2 * torch.finfo(torch.bfloat16).eps
        if bias:
            assert linear.bias.data_ptr() != layer.bias.data_ptr()

    def test_in_another_dtype(self):
        layer = made(dtype=torch.bfloat16)
        assert layer.dequantize(torch.float32).dtype == torch.float32
        linear = layer.half().to_linear()
        assert {p.dtype for p in linear.parameters()} == {torch.bfloat16}  # what was quantised, not what the bias is
        linear = layer.to_linear(torch.float32)
        assert {p.dtype for p in linear.parameters()} == {torch.float32}
        linear(torch.randn(2, 36))


class TestMoves:
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("name", MOVES)
    def test_casts_leave_the_bits_alone(self, name, double_quant):
        layer = made(double_quant=double_quant)
        before = copy.deepcopy(layer.weight)
        cast, dtype = MOVES[name]
        assert cast(layer) is layer
        assert same_bits(layer.weight, before)
        assert layer.bias.dtype == dtype
        layer(torch.randn(2, 36, dtype=dtype))

    @pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS.keys())
    def test_copies_are_their_own(self, copier):
        layer, x = made(), torch.randn(3, 36)
        layer.eval()
        expected, before = layer(x), copy.deepcopy(layer.weight)
        twin = copier(layer)
        assert torch.equal(twin(x), expected)
        assert same_bits(twin.weight, layer.weight)
        assert same_state(twin.state_dict(), layer.state_dict())
        assert repr(twin) == repr(layer)
        for tensor in twin.weight.tensors:
            tensor.zero_()
        assert same_bits(layer.weight, before)

    def test_meta_and_back(self):
        layer, x = made(), torch.randn(3, 36)
        expected, state = layer(x), copy.deepcopy(layer.state_dict())
        layer.to("meta")
        assert {tensor.device.type for tensor in layer.weight.tensors} == {"meta"}
        assert list(layer.state_dict()) == list(state)
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
        layer.to_empty(device="cpu")
        assert layer.weight.device.type == "cpu"
        layer.load_state_dict(state)
        assert torch.equal(layer(x), expected)

    def test_share_memory(self):
        layer = made().share_memory()
        assert all(tensor.is_shared() for tensor in layer.weight.tensors)

    @pytest.mark.gpu
    def test_cuda(self):
        layer, x = made(), torch.randn(3, 36)
        expected, before = layer(x), copy.deepcopy(layer.weight)
        y = layer.cuda()(x.cuda())
        assert all(tensor.is_cuda for tensor in layer.weight.tensors)
        assert relative_error(y.detach(), expected.detach()) < 1e-6
        assert same_bits(layer.to("cpu", torch.float16).weight, before)


class TestOwnership:
    def test_neither_parameter_nor_buffer(self):
        layer = made()
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
        assert not list(layer.buffers())
        before = copy.deepcopy(layer.weight)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        layer(torch.randn(4, 36)).square().sum().backward()
        optimizer.step()
        assert same_bits(layer.weight, before)

    def test_stands_in_for_a_linear_layer(self):
        """What other code reads of a layer's weight."""
        weight = made(dtype=torch.bfloat16).weight
        assert (*weight.shape, weight.dtype, weight.device) == (10, 36, torch.bfloat16, torch.device("cpu"))


class TestStateDict:
    @pytest.mark.parametrize("double_quant", [True, False])
    def test_keys_are_those_of_bitsandbytes(self, double_quant):
        ours = made(double_quant=double_quant).state_dict()
        theirs = linear4bit(compress_statistics=double_quant).state_dict()
        assert sorted(ours) == sorted(theirs) == sorted(["bias", *(NESTED_KEYS if double_quant else KEYS)])
        for key, value in theirs.items():
            assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape) or "quant_state" in key

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("double_quant", [True, False])
    @pytest.mark.parametrize("assign", [True, False])
    def test_strict_round_trip(self, dtype, double_quant, assign):
        """Also where the target has another blocksize: that of the checkpoint is what its bytes mean."""
        source = made(9, 37, dtype=dtype, blocksize=32, double_quant=double_quant)
        target = nn.Sequential(NF4Linear(37, 9, dtype=dtype))
        state = {f"0.{key}": value for key, value in source.state_dict().items()}
        target.load_state_dict(state, strict=True, assign=assign)
        assert same_bits(target[0].weight, source.weight)
        assert same_state(target.state_dict(), state)
        shares = target[0].weight.packed.data_ptr() == source.weight.packed.data_ptr()
        assert shares == assign

    @pytest.mark.parametrize("assign", [True, False])
    def test_into_a_layer_on_the_meta_device(self, assign):
        source, target = made(), NF4Linear(36, 10, device="meta")
        if assign:
            target.load_state_dict(source.state_dict(), assign=True)
            assert same_bits(target.weight, source.weight)
            return
        with pytest.warns(UserWarning, match="weight: loading into a weight on the meta device"):
            target.load_state_dict(source.state_dict())
        assert target.weight.device.type == "meta"

    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("compress_statistics", [True, False])
    def test_loads_bitsandbytes(self, storage, compress_statistics):
        theirs = linear4bit(32, 64, quant_storage=storage, compress_statistics=compress_statistics)
        layer, x = NF4Linear(64, 32), torch.randn(3, 64)
        layer.load_state_dict(theirs.state_dict(), strict=True)
        assert relative_error(layer(x).detach(), theirs(x).detach()) < 1e-6

    @pytest.mark.parametrize("double_quant", [True, False])
    def test_bitsandbytes_loads_ours(self, double_quant):
        """As transformers does it, since `Linear4bit.load_state_dict` refuses even its own."""
        bitsandbytes = pytest.importorskip("bitsandbytes")
        layer, x = made(double_quant=double_quant), torch.randn(3, 36)
        state = layer.state_dict()
        theirs = bitsandbytes.nn.Linear4bit(36, 10, compute_dtype=torch.float32, quant_type="nf4").train()
        statistics = {key: state[key] for key in state if key.startswith("weight.")}
        theirs.weight = bitsandbytes.nn.Params4bit.from_prequantized(state["weight"], statistics, device="cpu")
        theirs.bias = layer.bias
        assert relative_error(theirs(x).detach(), layer(x).detach()) < 1e-6

    def test_not_strict(self):
        layer = made()
        before = copy.deepcopy(layer.weight)
        assert sorted(layer.load_state_dict({}, strict=False).missing_keys) == ["bias", "weight"]
        result = layer.load_state_dict({"bias": torch.zeros(10), "other": torch.ones(1)}, strict=False)
        assert result.unexpected_keys == ["other"]
        assert same_bits(layer.weight, before)
        with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
            layer.load_state_dict({"bias": torch.zeros(10)})
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"other"'):
            layer.load_state_dict({**layer.state_dict(), "other": torch.ones(1)})


def json_with(state: dict, **changes) -> torch.Tensor:
    """The text of a state's description with other values; None takes an entry out."""
    facts = json.loads(bytes(state["weight.quant_state.bitsandbytes__nf4"].tolist()))
    facts = {key: value for key, value in (facts | changes).items() if value is not None}
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


DESCRIPTION = "weight.quant_state.bitsandbytes__nf4"
# What a checkpoint may hold instead of a state, and the key that the message names.
CORRUPT = {
    "dense": (lambda s: {"weight": torch.ones(10, 36)}, "weight is a dense weight of torch.float32"),
    "no absmax": (lambda s: {k: v for k, v in s.items() if k != "weight.absmax"}, "weight.absmax"),
    "no description": (lambda s: {k: v for k, v in s.items() if k != DESCRIPTION}, "weight.quant_state"),
    "only statistics": (lambda s: {k: v for k, v in s.items() if k != "weight"}, "weight"),
    "short weight": (lambda s: {**s, "weight": s["weight"][:-1]}, "weight"),
    "short absmax": (lambda s: {**s, "weight.absmax": s["weight.absmax"][:-1]}, "weight.absmax"),
    "NaN": (lambda s: {**s, "weight.nested_absmax": s["weight.nested_absmax"] * torch.nan}, "weight.nested_absmax"),
    "no JSON": (lambda s: {**s, DESCRIPTION: torch.zeros(4, dtype=torch.uint8)}, DESCRIPTION),
    "negative size": (lambda s: {**s, DESCRIPTION: json_with(s, shape=[-10, -36])}, DESCRIPTION),
    "blocksize": (lambda s: {**s, DESCRIPTION: json_with(s, blocksize=48)}, DESCRIPTION),
    "another shape": (lambda s: {**s, DESCRIPTION: json_with(s, shape=[36, 10])}, "size mismatch for 0.weight"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_what_is_corrupt_is_refused_and_nothing_of_it_loaded(name):
    change, key = CORRUPT[name]
    model, other = nn.Sequential(made()), made()
    before, weight = copy.deepcopy(model.state_dict()), model[0].weight
    state = {f"0.{k}": v for k, v in change(other.state_dict() | {"bias": torch.full((10,), 7.0)}).items()}
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert (key if key.startswith("size") else f"0.{key}") in str(error.value)
    assert model[0].weight is weight
    assert same_state(model.state_dict(), before)
