"""`FusedLoRAExperts` equals one adapted linear layer for each expert, and PEFT's adapted expert stack."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import FusedLoRAExperts
from peft_kernels.formats.peft_experts import from_peft, to_peft
from tests.helpers import relative_error

EXACT = 1e-13
OFFSETS = torch.tensor([4, 4, 11, 13], dtype=torch.int32)  # the second expert has no rows, the last two none


def trained(dtype: torch.dtype = torch.float64, **options) -> FusedLoRAExperts:
    stack = FusedLoRAExperts(4, 12, 10, 3, dtype=dtype, **options)
    nn.init.normal_(stack.lora_B)
    return stack


def one_by_one(stack: FusedLoRAExperts, x: Tensor) -> Tensor:
    y, start = torch.zeros(len(x), stack.out_features, dtype=x.dtype), 0
    parts = [y[:0]]
    for e, end in enumerate(OFFSETS.tolist()):
        rows = x[start:end]
        update = F.linear(F.linear(rows, stack.lora_A[e]), stack.lora_B[e])
        parts.append(
            F.linear(rows, stack.weight[e], None if stack.bias is None else stack.bias[e]) + stack.scaling * update
        )
        start = end
    return torch.cat([*parts, y[start:]])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_rslora", [True, False])
def test_output_and_gradients(bias, use_rslora):
    stack = trained(bias=bias, use_rslora=use_rslora, lora_alpha=5)
    x = torch.randn(15, 12, dtype=torch.float64, requires_grad=True)
    wanted, grad_y = [x, *stack.adapter_parameters.values()], torch.randn(15, 10, dtype=torch.float64)
    y, expected = stack(x, OFFSETS), one_by_one(stack, x)
    assert relative_error(y, expected) < EXACT
    assert not y[13:].any()
    for grad, truth in zip(
        torch.autograd.grad(y, wanted, grad_y), torch.autograd.grad(expected, wanted, grad_y), strict=True
    ):
        assert relative_error(grad, truth) < EXACT
    assert [name for name, p in stack.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_start_is_the_frozen_stack():
    stack, x = FusedLoRAExperts(4, 12, 10, 3), torch.randn(15, 12)
    frozen = torch.cat([*(x[a:b] @ stack.weight[e].T for e, (a, b) in enumerate(((0, 4), (4, 4), (4, 11), (11, 13))))])
    assert relative_error(stack(x, OFFSETS)[:13], frozen) < 1e-6
    bound = 12**-0.5
    assert all(0.8 * bound < matrix.abs().max() <= bound for matrix in stack.lora_A)


@pytest.mark.parametrize("merged_dtype", [torch.float64, torch.bfloat16], ids=str)
def test_merge(merged_dtype):
    stack, x = trained(merged_dtype, lora_dropout=0.5).eval(), torch.randn(15, 12, dtype=merged_dtype)
    expected, state, weight = stack(x, OFFSETS), copy.deepcopy(stack.state_dict()), stack.weight
    stack.merge()
    assert relative_error(stack(x, OFFSETS), expected) < (EXACT if merged_dtype == torch.float64 else 0.02)
    assert torch.equal(stack.train()(x, OFFSETS), stack.eval()(x, OFFSETS))
    assert all(torch.equal(value, state[key]) for key, value in stack.state_dict().items())
    stack.unmerge()
    assert stack.weight is weight
    assert torch.equal(stack(x, OFFSETS), expected)


def test_merged_sum_that_is_not_finite():
    stack = trained()
    with torch.no_grad():
        stack.lora_B[2, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        stack.merge()
    assert not stack.merged


@pytest.mark.parametrize("is_transposed", [False, True])
def test_from_experts_shares_the_weight(is_transposed):
    weight, bias = (
        nn.Parameter(torch.randn(4, 12, 10) if is_transposed else torch.randn(4, 10, 12)),
        nn.Parameter(torch.randn(4, 10)),
    )
    stack = FusedLoRAExperts.from_experts(weight, bias, 3, is_transposed=is_transposed)
    assert stack.weight.shape == (4, 10, 12)
    assert stack.weight.data_ptr() == weight.data_ptr()
    assert stack.bias is bias
    assert not weight.requires_grad
    assert not bias.requires_grad
    x = torch.randn(15, 12)
    assert relative_error(stack(x, OFFSETS), one_by_one(stack, x)) < 1e-6


def test_dropout():
    stack, x = trained(torch.float32, lora_dropout=0.5), torch.randn(15, 12)
    torch.manual_seed(1)
    first = stack(x, OFFSETS)
    assert not torch.equal(stack(x, OFFSETS), first)
    torch.manual_seed(1)
    assert torch.equal(stack(x, OFFSETS), first)
    assert relative_error(stack.eval()(x, OFFSETS), one_by_one(stack, x)) < 1e-6


def test_copies_moves_and_repr():
    stack, x = trained(torch.float32, bias=True), torch.randn(15, 12)
    assert list(stack.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    for twin in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert repr(twin) == repr(stack)
        assert torch.equal(twin(x, OFFSETS), stack(x, OFFSETS))
    assert "num_experts=4, in_features=12, out_features=10, bias=True, r=3" in repr(stack)
    expected, state = stack(x, OFFSETS), copy.deepcopy(stack.state_dict())
    stack.merge()
    stack.to("meta").to_empty(device="cpu").unmerge()
    stack.load_state_dict(state, strict=True)
    assert torch.equal(stack(x, OFFSETS), expected)
    assert {p.dtype for p in stack.half().parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("weight", "bias", "error", "text"),
    [
        (torch.ones(2, 3, 4), None, TypeError, "weight is Tensor"),
        (nn.Parameter(torch.ones(3, 4)), None, ValueError, r"weight has shape \(3, 4\)"),
        (nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(3)), ValueError, "bias has shape"),
        (nn.Parameter(torch.ones(2, 3, 4).int(), requires_grad=False), None, TypeError, "int32"),
    ],
    ids=["tensor", "matrix", "bias", "integers"],
)
def test_refused(weight, bias, error, text):
    flag = weight.requires_grad
    with pytest.raises(error, match=text):
        FusedLoRAExperts.from_experts(weight, bias, 2)
    assert weight.requires_grad == flag


class Experts(nn.Module):
    """A stack as transformers has them."""

    def __init__(self, weight: Tensor, is_transposed: bool) -> None:
        super().__init__()
        self.stack, self.is_transposed = nn.Parameter(weight), is_transposed

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("mi,eio->emo" if self.is_transposed else "mi,eoi->emo", x, self.stack)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_transposed", [False, True])
def test_peft_layout(is_transposed):
    """PEFT's `target_parameters`: the same update for each expert, from PEFT's matrices and back."""
    peft = pytest.importorskip("peft")
    weight = torch.randn(4, 12, 10) if is_transposed else torch.randn(4, 10, 12)
    model = nn.ModuleDict({"experts": Experts(weight, is_transposed)})
    model.forward = lambda x: model["experts"](x)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_parameters=["experts.stack"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).base_model.model["experts"]
    matrices = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    base = theirs.get_base_layer().stack.detach()
    stack = FusedLoRAExperts.from_experts(nn.Parameter(base), None, 3, is_transposed=is_transposed, lora_alpha=5)
    lora_A, lora_B = from_peft(*matrices, num_experts=4)
    stack.load_state_dict({"weight": stack.weight, "lora_A": lora_A, "lora_B": lora_B})
    delta = theirs.get_delta_weight("default")
    delta = delta.mT if is_transposed else delta
    assert relative_error(stack.merged_weight() - stack.weight, delta) < 1e-5
    back = to_peft(stack.lora_A, stack.lora_B)
    assert all(torch.equal(one, two) for one, two in zip(back, matrices, strict=True))


def test_matrices_that_do_not_fit():
    with pytest.raises(ValueError, match=r"lora_A has shape \(6, 5\).*4 experts"):
        from_peft(torch.ones(6, 5), torch.ones(7, 6), num_experts=4)
    with pytest.raises(ValueError, match=r"lora_B has shape \(7, 4\)"):
        from_peft(torch.ones(6, 5), torch.ones(7, 4), num_experts=2)
