"""`FusedQLoRAExperts` equals `FusedLoRAExperts` over the stack that it unpacks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import FusedLoRAExperts, FusedQLoRAExperts
from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight
from tests.helpers import RATIO, relative_error
from tests.nn.quantised import COPIERS, same_bits, same_state

E, N, K, R = 4, 10, 37, 3  # odd K: blocks run over rows and from one expert into the next
OFFSETS = torch.tensor([4, 4, 11, 13], dtype=torch.int32)


def trained(dtype: torch.dtype = torch.float32, **options) -> FusedQLoRAExperts:
    stack = FusedQLoRAExperts(E, K, N, R, dtype=dtype, **options)
    nn.init.normal_(stack.lora_B)
    return stack


def dense_twin(stack: FusedQLoRAExperts, dtype: torch.dtype, **options) -> FusedLoRAExperts:
    twin = FusedLoRAExperts(
        E, K, N, R, bias=stack.bias is not None, dtype=dtype, adapter_dtype=torch.float32, **options
    )
    state = {name: value for name, value in stack.state_dict().items() if not name.startswith("weight")}
    twin.load_state_dict({**state, "weight": stack.dequantize(dtype)})
    return twin


def run(stack: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    stack.zero_grad()
    torch.manual_seed(9)
    y = stack(x, OFFSETS)
    (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
    return {"y": y.detach(), "x": x.grad, "A": stack.lora_A.grad.clone(), "B": stack.lora_B.grad.clone()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"lora_dropout": 0.5}, {"use_rslora": True, "lora_alpha": 5}], ids=str
)
def test_outputs_and_gradients(dtype, options):
    stack, x = trained(dtype, **options), torch.randn(15, K, dtype=dtype)
    twin = dense_twin(stack, dtype, **{name: value for name, value in options.items() if name != "bias"})
    ours, theirs, truth = run(stack, x), run(twin, x), run(copy.deepcopy(twin).double(), x.double())
    assert not ours["y"][13:].any()
    for key, value in ours.items():
        allowed = max(RATIO * relative_error(theirs[key], truth[key]), torch.finfo(dtype).eps)
        assert value.dtype == theirs[key].dtype
        assert relative_error(value, truth[key]) <= allowed, key


def test_ownership_and_repr():
    stack = trained(bias=True)
    assert [name for name, _ in stack.named_parameters()] == ["bias", "lora_A", "lora_B"]
    assert [name for name, p in stack.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert not list(stack.buffers())
    text = "num_experts=4, in_features=37, out_features=10, bias=True, r=3, scaling=5.33333, lora_dropout=0"
    assert repr(stack) == f"FusedQLoRAExperts({text}, nf4, blocksize=64, double_quant=True)"


@pytest.mark.parametrize("is_transposed", [False, True])
def test_from_experts(is_transposed):
    weight = nn.Parameter(torch.randn(E, K, N) if is_transposed else torch.randn(E, N, K))
    bias = nn.Parameter(torch.randn(E, N))
    stack = FusedQLoRAExperts.from_experts(weight, bias, R, is_transposed=is_transposed, blocksize=32)
    dense = weight.detach().mT.contiguous() if is_transposed else weight.detach()
    assert same_bits(stack.weight, nf4.quantize(dense, 32))
    assert stack.bias is bias
    assert not bias.requires_grad
    assert weight.requires_grad
    twin = FusedQLoRAExperts.from_experts(stack.weight, None, R)
    assert twin.weight is stack.weight


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge(requantize, dtype):
    stack, x = trained(dtype, lora_dropout=0.5, bias=True).eval(), torch.randn(15, K, dtype=dtype)
    expected, state, q = stack(x, OFFSETS), copy.deepcopy(stack.state_dict()), stack.weight
    before = q.dequantize(torch.float32).double()
    exact = before + stack.scaling * stack.lora_B.detach().double() @ stack.lora_A.detach().double()
    error = stack.merge(requantize=requantize)
    if requantize:
        assert isinstance(stack.weight, NF4Weight)
        off = stack.weight.dequantize(torch.float32).double() - exact
        assert math.isclose(error.relative, off.norm() / exact.norm(), rel_tol=1e-5)
        assert math.isclose(error.relative_to_update, off.norm() / (exact - before).norm(), rel_tol=1e-5)
        assert math.isclose(error.max_abs, off.abs().max(), rel_tol=1e-5)
    else:
        assert error is None
        assert relative_error(stack.weight, exact) < torch.finfo(dtype).eps
        assert relative_error(stack(x, OFFSETS).detach(), expected.detach()) < 4 * torch.finfo(dtype).eps
    assert torch.equal(stack.train()(x, OFFSETS), stack.eval()(x, OFFSETS))
    assert stack(x.half(), OFFSETS).dtype == torch.float16
    assert same_state(stack.state_dict(), state)
    stack.unmerge()
    assert stack.weight is q
    assert torch.equal(stack(x, OFFSETS), expected)


def test_state_copies_and_moves():
    stack, other, x = trained(bias=True), trained(bias=True, blocksize=32), torch.randn(15, K)
    other.load_state_dict(stack.state_dict(), strict=True)
    expected, q = stack(x, OFFSETS), copy.deepcopy(stack.weight)
    assert other.weight.shape == (E, N, K)
    assert same_bits(other.weight, stack.weight)
    assert torch.equal(other(x, OFFSETS), expected)
    for copier in COPIERS.values():
        assert torch.equal(copier(stack)(x, OFFSETS), expected)
    stack.half()
    assert same_bits(stack.weight, q)
    assert stack(x.half(), OFFSETS).dtype == torch.float16
    stack.to("meta").to_empty(device="cpu").float().load_state_dict(other.state_dict())
    assert torch.equal(stack(x, OFFSETS), expected)


def test_one_graph():
    torch._dynamo.reset()
    stack = trained()

    def call(x: Tensor) -> Tensor:
        m = x.shape[0]
        return stack(x, torch.tensor([m // 4, m // 2, m // 2, m], dtype=torch.int32))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 9, 64):
            x = torch.randn(m, K, requires_grad=True)
            expected, got = (torch.autograd.grad(f(x).square().sum(), [x, stack.lora_A]) for f in (call, compiled))
            assert all(relative_error(one, two) < 1e-5 for one, two in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("weight", "options", "error", "text"),
    [
        (torch.ones(2, 3, 4), {}, TypeError, "FusedQLoRAExperts.from_experts: weight is Tensor"),
        (nn.Parameter(torch.ones(3, 4)), {}, ValueError, r"weight has shape \(3, 4\)"),
        (nn.Parameter(torch.ones(2, 3, 4)), {"bias": nn.Parameter(torch.ones(3))}, ValueError, "bias has shape"),
        (nn.Parameter(torch.ones(2, 3, 4) / 0), {}, ValueError, "not finite"),
        (nn.Parameter(torch.ones(2, 3, 4)), {"r": 0}, ValueError, "FusedQLoRAExperts: r is 0"),
    ],
    ids=["tensor", "matrix", "bias", "infinite", "rank"],
)
def test_refused(weight, options, error, text):
    with pytest.raises(error, match=text):
        FusedQLoRAExperts.from_experts(weight, **options)


def test_quantised_stacks_are_refused_where_they_mean_nothing():
    q = nf4.quantize(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="is_transposed"):
        FusedQLoRAExperts.from_experts(q, is_transposed=True)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 4\)"):
        FusedQLoRAExperts.from_experts(nf4.quantize(torch.ones(3, 4)))
    with pytest.raises(TypeError, match="weight is NF4Weight"):
        FusedLoRAExperts.from_experts(q)
