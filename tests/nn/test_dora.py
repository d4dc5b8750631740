"""`FusedLoRALinear` with DoRA: its start, dropout, which norms are kept and what makes them stale, copies, moves."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import FusedLoRALinear, functional
from tests.helpers import relative_error
from tests.nn.against_peft import pair

HALF = [torch.float16, torch.bfloat16]


def trained(dtype: torch.dtype = torch.float32, k: int = 12, n: int = 10, **options) -> FusedLoRALinear:
    layer = FusedLoRALinear(k, n, 3, dtype=dtype, use_dora=True, **options)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.uniform_(0.5, 2)
    return layer


def composition(layer: FusedLoRALinear, x: Tensor, dropped: Tensor | None = None) -> Tensor:
    """The formula in PyTorch's own functions, in float64, differentiable; the norm from the sum itself."""
    w, a, b, m = (p.double() for p in (layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    g = m / (w + layer.scaling * b @ a).norm(dim=1).detach()
    low_rank = ((x if dropped is None else dropped).double() @ a.T) @ b.T
    y = g * (x.double() @ w.T + layer.scaling * low_rank)
    return y if layer.bias is None else y + layer.bias.double()


@pytest.fixture
def norms_computed(monkeypatch) -> list:
    """Grows by one entry for each norm of a sum that is computed: whether ‖W‖² was at hand."""
    calls, compute = [], functional.dora_weight_norm

    def counted(*args, weight_norm_squared=None, **kwargs):
        calls.append(weight_norm_squared)
        return compute(*args, weight_norm_squared=weight_norm_squared, **kwargs)

    monkeypatch.setattr(functional, "dora_weight_norm", counted)
    return calls


class TestStart:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
    def test_equals_the_frozen_layer(self, dtype):
        layer = FusedLoRALinear(12, 10, 3, use_dora=True, dtype=dtype)
        x = torch.randn(7, 12, dtype=dtype)
        assert relative_error(layer(x), F.linear(x, layer.weight, layer.bias)) < torch.finfo(dtype).eps
        assert torch.allclose(layer.lora_magnitude_vector.double(), layer.weight.double().norm(dim=1), rtol=1e-6)
        assert layer.lora_magnitude_vector.dtype == torch.promote_types(dtype, torch.float32)

    def test_as_in_peft(self):
        peft = pytest.importorskip("peft")
        theirs, _ = pair(nn.Linear(12, 10), {"r": 3, "use_dora": True}, {"use_dora": True})
        fresh = peft.get_peft_model(
            nn.Sequential(theirs.base_layer), peft.LoraConfig(r=3, target_modules=["0"], use_dora=True)
        ).base_model.model[0]
        ours = FusedLoRALinear.from_linear(fresh.base_layer, 3, use_dora=True)
        start = fresh.lora_magnitude_vector["default"].weight
        assert torch.allclose(ours.lora_magnitude_vector, start.double(), rtol=1e-12)

    def test_what_trains(self):
        layer = trained()
        layer(torch.randn(4, 12)).square().sum().backward()
        trains = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert trains == {"lora_A", "lora_B", "lora_magnitude_vector"} == set(layer.adapter_parameters)
        assert all(getattr(layer, name).grad.any() for name in trains)

    def test_reset(self):
        layer, x = trained(), torch.randn(4, 12)
        layer.eval()(x)
        layer.reset_lora_parameters()
        assert relative_error(layer(x), F.linear(x, layer.weight, layer.bias)) < 1e-6

    def test_meta(self):
        layer = FusedLoRALinear(2**20, 2**20, 8, device="meta", use_dora=True)
        assert layer(torch.empty(3, 2**20, device="meta")).shape == (3, 2**20)


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
    def test_output_and_gradients_with_the_mask_of_the_seed(self, p):
        """The seed is drawn from torch's generator, so the mask can be drawn again."""
        layer = trained(lora_dropout=p, train_bias=True).double()
        x = torch.randn(64, 12, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(5)
        y = layer(x)
        torch.manual_seed(5)
        ones = functional.philox_dropout(torch.ones_like(x), p)
        expected = composition(layer, x, x * ones)
        wanted = [x, *layer.adapter_parameters.values()]
        grad_y = torch.randn_like(y)
        assert relative_error(y, expected) < 1e-13
        names = ("x", *layer.adapter_parameters)
        for name, grad, truth in zip(
            names, torch.autograd.grad(y, wanted, grad_y), torch.autograd.grad(expected, wanted, grad_y), strict=True
        ):
            assert relative_error(grad, truth) < 1e-12, name

    def test_same_expectation_as_peft(self):
        """PEFT drops x in (g - 1) x Wᵀ as well: other samples, the same mean."""
        options = {"lora_alpha": 6, "use_dora": True, "lora_dropout": 0.3}
        theirs, ours = pair(nn.Linear(12, 10), {"r": 3, **options}, options)
        x = torch.randn(1, 12, dtype=torch.float64)
        truth = ours.eval()(x)
        ours.train()
        many = x.expand(40_000, 12)
        means = [layer(many).mean(0, keepdim=True) for layer in (ours, theirs)]
        errors = [layer(many).std(0).max() / 200 for layer in (ours, theirs)]
        assert (means[0] - truth).abs().max() < 5 * errors[0]
        assert (means[1] - truth).abs().max() < 5 * errors[1]
        assert errors[0] > 0

    def test_in_training_only(self):
        layer, x = trained(lora_dropout=0.5), torch.randn(16, 12)
        assert not torch.equal(layer(x), layer(x))
        assert torch.equal(layer.eval()(x), layer(x))


class TestNorms:
    def test_training_computes_the_norm_at_each_call_from_a_kept_square(self, norms_computed):
        layer, x = trained(), torch.randn(4, 12)
        for _ in range(3):
            layer(x).sum().backward()
        assert len(norms_computed) == 3
        assert norms_computed[0] is norms_computed[1] is norms_computed[2]
        assert relative_error(norms_computed[0], layer.weight.square().sum(1)) < 1e-6

    def test_evaluation_computes_it_once(self, norms_computed):
        layer, x = trained().eval(), torch.randn(4, 12)
        first = layer(x)
        assert torch.equal(layer(x), first)
        with torch.inference_mode():
            layer(x)
        assert len(norms_computed) == 1

    @pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
    def test_in_place_changes_are_seen(self, name):
        layer, x = trained().eval(), torch.randn(4, 12)
        layer(x)
        with torch.no_grad():
            getattr(layer, name).mul_(1.5)
        assert relative_error(layer(x), composition(layer, x)) < 1e-6

    @pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
    def test_new_parameters_are_seen(self, name):
        """Also where the new one has the address and the version that the old one had."""
        layer, x = trained().eval(), torch.randn(4, 12)
        for _ in range(20):
            layer(x)
            shape = getattr(layer, name).shape
            setattr(layer, name, None)
            setattr(layer, name, nn.Parameter(torch.randn(shape), requires_grad=name != "weight"))
            assert relative_error(layer(x), composition(layer, x)) < 1e-6

    def test_scaling_is_seen(self):
        layer, x = trained().eval(), torch.randn(4, 12)
        layer(x)
        layer.scaling = 0.1
        assert relative_error(layer(x), composition(layer, x)) < 1e-6

    @pytest.mark.parametrize("foreach", [True, False])
    def test_optimizers_are_seen(self, foreach):
        layer, x = trained(), torch.randn(4, 12)
        optimizer = torch.optim.SGD(layer.adapter_parameters.values(), lr=0.1, foreach=foreach)
        for mode in (True, False):
            layer.train(mode)
            for _ in range(3):
                layer(x).square().sum().backward()
                optimizer.step()
                assert relative_error(layer(x), composition(layer, x)) < 1e-6

    def test_writes_that_leave_no_trace_are_seen_in_training_and_after_eval(self):
        """`.data` and raw pointers (bitsandbytes' optimizers) do not change a tensor's version."""
        layer, x = trained(), torch.randn(4, 12)
        for _ in range(2):
            layer(x)
            layer.lora_B.data.mul_(1.5)
            layer.lora_A.detach().numpy()[:] += 0.25
            assert relative_error(layer(x), composition(layer, x)) < 1e-6
        layer.eval()(x)
        layer.lora_B.data.mul_(1.5)
        assert relative_error(layer.eval()(x), composition(layer, x)) < 1e-6

    def test_loading_is_seen(self):
        layer, other, x = trained().eval(), trained(), torch.randn(4, 12)
        layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other.eval()(x))

    def test_trained_weights_are_not_kept(self, norms_computed):
        layer, x = trained(), torch.randn(4, 12)
        layer.weight.requires_grad_()
        layer(x)
        assert norms_computed == [None]

    def test_kept_under_inference_mode_and_used_in_training(self):
        layer, x = trained().eval(), torch.randn(4, 12, requires_grad=True)
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
        layer.train()(x).sum().backward()
        assert x.grad.any()

    def test_parameters_made_under_inference_mode(self):
        """They have no version, so nothing of them is kept."""
        with torch.inference_mode():
            layer, x = trained().eval(), torch.randn(4, 12)
            layer(x)
            layer.lora_A.mul_(2)
            assert relative_error(layer(x), composition(layer, x)) < 1e-6


@pytest.mark.gpu
class TestNormsOnAGpu:
    def test_another_stream_does_not_read_a_norm_that_is_still_being_computed(self):
        layer, x = trained(k=512, n=512).cuda().eval(), torch.randn(64, 512, device="cuda")
        expected = composition(layer, x)
        layer.eval()
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            torch.cuda._sleep(100_000_000)
            layer(x)
        with torch.cuda.stream(second):
            y = layer(x)
        torch.cuda.synchronize()
        assert relative_error(y, expected) < 1e-5

    def test_a_captured_graph_follows_the_weights(self):
        layer, x = trained(k=64, n=64).cuda().eval(), torch.randn(64, 64, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = layer(x)
        with torch.no_grad():
            layer.lora_B.mul_(1.5)
            layer.weight.mul_(0.5)
        layer(x)  # replaces what was kept
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(y, composition(layer, x)) < 1e-5


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
    def test_computes_the_same_within_rounding(self, dtype):
        layer, x = trained(dtype), torch.randn(64, 12, dtype=dtype)
        unmerged, truth, state = layer(x), composition(layer, x), copy.deepcopy(layer.state_dict())
        weight = layer.weight
        layer.merge()
        rounding = max(torch.finfo(dtype).eps, 1e-7) if dtype != torch.float64 else 1e-14
        assert relative_error(layer(x), truth) < 2 * rounding
        assert relative_error(unmerged, truth) < 2 * rounding
        lengths = layer.weight.double().norm(dim=1)
        assert torch.allclose(lengths, layer.lora_magnitude_vector.double(), rtol=4 * rounding)
        assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
        layer.unmerge()
        assert layer.weight is weight
        assert torch.equal(layer(x), unmerged)

    def test_row_of_length_zero(self):
        """0 / 0: refused, and nothing is changed."""
        layer = FusedLoRALinear(12, 10, 3, use_dora=True)
        with torch.no_grad():
            layer.weight[3] = 0
        layer.reset_lora_parameters()
        with pytest.raises(ValueError, match="not finite"):
            layer.merge()
        assert not layer.merged


class TestState:
    def test_keys(self):
        keys = ["weight", "bias", "lora_A", "lora_B", "lora_magnitude_vector"]
        layer = trained()
        assert list(layer.state_dict()) == keys
        layer.merge()
        assert list(layer.state_dict()) == keys

    @pytest.mark.parametrize("merged", [True, False])
    def test_strict_round_trip(self, merged):
        source, target, x = trained(), trained(), torch.randn(4, 12)
        if merged:
            source.merge()
            target.merge()
        target.load_state_dict(source.state_dict(), strict=True)
        assert target.merged == merged
        assert torch.equal(target(x), source(x))
        with pytest.raises(RuntimeError, match="lora_magnitude_vector"):
            FusedLoRALinear(12, 10, 3).load_state_dict(source.state_dict())

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_copies_have_norms_of_their_own(self, copier):
        layer, x = trained().eval(), torch.randn(4, 12)
        expected = layer(x)
        twin = copier(layer)
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            twin.lora_B.mul_(3)
            twin.weight.mul_(0.5)
        assert relative_error(twin(x), composition(twin, x)) < 1e-6
        assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
    def test_moves(self, dtype):
        layer, x = trained().eval(), torch.randn(16, 12)
        layer(x)
        layer.to(dtype)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        x = x.to(dtype)
        assert relative_error(layer(x), composition(layer, x)) < 2 * max(torch.finfo(dtype).eps, 1e-8)

    def test_to_meta_and_back(self):
        layer, x = trained().eval(), torch.randn(3, 12)
        expected, state = layer(x), copy.deepcopy(layer.state_dict())
        layer.to("meta").to_empty(device="cpu")
        layer.load_state_dict(state)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(dtype):
    layer, x = trained(), torch.randn(64, 12)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert layer.lora_magnitude_vector.grad.dtype == torch.float32
    assert relative_error(y, composition(layer, x)) < 2 * torch.finfo(dtype).eps


def test_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    layer, x = trained(lora_dropout=0.3), torch.randn(16, 12, requires_grad=True)
    results = []
    for call in (layer, lambda value: checkpoint(layer, value, use_reentrant=False)):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        call(x).square().sum().backward()
        results.append([x.grad, *(p.grad.clone() for p in layer.adapter_parameters.values())])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
