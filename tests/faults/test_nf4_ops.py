"""Faults of others in 4-bit weights: F06, F12 to F14, F32, F41 and F53 to F55 (README.md says where the rest is)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from peft_kernels import NF4Linear, functional, use_backend
from peft_kernels.formats.nf4 import BLOCKSIZES
from peft_kernels.problems import Draw, nf4_decoded, nf4_weight
from tests.backends import across, everywhere, on_cpu
from tests.helpers import assert_within_rounding
from tests.problems import Nf4LoraProblem, Nf4Problem
from tests.problems.nf4 import part_of, zeros_without_memory

LINEAR = pytest.mark.parametrize("backend", everywhere("nf4_linear"), indirect=True)
BOTH = pytest.mark.parametrize("backend", across("nf4_linear", "nf4_lora_linear"), indirect=True)
DEQUANTIZE = pytest.mark.parametrize("backend", everywhere("nf4_dequantize"), indirect=True)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize("numel", [2**31 - 64, 2**31, 2**31 + 64], ids=["below", "at", "past"])
@LINEAR
def test_f06_2_to_the_31_elements(backend, numel):
    """The last rows of a weight with about 2^31 elements, forward and backward, by themselves and in the whole."""
    k = 64
    n = numel // k
    q = nf4_weight(Draw("cpu"), 4, k, nested=False)
    packed = zeros_without_memory(numel // 2, backend.device)
    packed[-2 * k :] = q.packed.to(packed)
    absmax = zeros_without_memory(4 * numel // 64, backend.device).view(F32)
    absmax[-4:] = q.absmax.to(absmax)
    weight = nf4_decoded(q, F32).to(backend.device)
    whole = q._replace(packed=packed, absmax=absmax, shape=torch.Size((n, k)))
    x = torch.eye(3, k, device=backend.device).requires_grad_()
    y = functional.nf4_linear(x, whole.rows(n - 4, n))
    assert torch.equal(y, weight[:, :3].t())
    (grad_x,) = torch.autograd.grad(y, x, torch.eye(3, 4, device=backend.device))
    assert torch.equal(grad_x, weight[:3])
    assert torch.equal(whole.rows(n - 2, n).columns(1, k).dequantize(), weight[2:, 1:])


def test_f12_four_bits_stored_in_by_out():
    """No shape is guessed: a weight [in, out] is refused, and a square one is [out, in]."""
    q = nf4_weight(Draw("cpu"), 48, 64)
    x = torch.randn(3, 48)
    with pytest.raises(
        ValueError, match=r"q has shape \(48, 64\), but x has 48 features; expected \(out_features, 48\)"
    ):
        functional.nf4_linear(x, q)
    square = nf4_weight(Draw("cpu"), 48, 48)
    torch.testing.assert_close(functional.nf4_linear(x, square), x @ nf4_decoded(square, F32).t())


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True])
@BOTH
def test_f13_every_blocksize(backend, blocksize, nested):
    """Also those that are longer than a row, and than the whole weight."""
    make = Nf4LoraProblem if backend.op == "nf4_lora_linear" else Nf4Problem
    for m, k in ((1, 160), (20, 33)):
        problem = make(m, k, 48, blocksize=blocksize, nested=nested, device=backend.device)
        assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("numel", [1, 31, 33, 63, 65, 129])
@DEQUANTIZE
def test_f14_odd_element_counts(backend, numel):
    """The last byte holds one element, in its high half."""
    for shape in ((1, numel), (numel, 1)):
        q = nf4_weight(Draw("cpu"), *shape, blocksize=32).to(backend.device)
        assert torch.equal(q.dequantize(), nf4_decoded(q, F32))
        q.packed[-1] ^= 15  # the low half belongs to nobody
        assert torch.equal(q.dequantize(), nf4_decoded(q, F32))


@DEQUANTIZE
def test_f14_every_number_of_the_table(backend):
    """All 256 bytes, whichever half: the same bits in every implementation."""
    packed = torch.arange(256, dtype=torch.uint8, device=backend.device)
    q = part_of("whole", 8, 64, nested=False, device=backend.device)._replace(packed=packed)
    for dtype in (F32, F16, BF16):
        assert torch.equal(q.dequantize(dtype), nf4_decoded(q, dtype))


@pytest.mark.parametrize("stored", [F32, F16, BF16], ids=str)
@BOTH
def test_f32_the_product_has_the_dtype_of_x(backend, stored):
    """Whatever the weight was quantised from: no detour in float32, and weights rounded once, to x's dtype."""
    q = nf4_weight(Draw("cpu"), 48, 64, dtype=stored).to(backend.device)
    x = torch.eye(5, 64, dtype=BF16, device=backend.device).requires_grad_()
    zeros = [torch.zeros(4, 64, device=backend.device), torch.zeros(48, 4, device=backend.device)]
    y = functional.nf4_linear(x, q) if backend.op == "nf4_linear" else functional.nf4_lora_linear(x, q, *zeros)
    assert y.dtype == BF16
    assert torch.equal(y, nf4_decoded(q, BF16)[:, :5].t())
    (grad_x,) = torch.autograd.grad(y, x, torch.eye(5, 48, dtype=BF16, device=backend.device))
    assert torch.equal(grad_x, nf4_decoded(q, BF16)[:5])


@pytest.mark.parametrize("name", on_cpu("nf4_lora_linear"))
def test_f41_merged_into_a_dense_layer(name):
    """The adapter added to the decoded weight gives the layer's own output; requantised, what four bits lose and no
    more."""
    problem = Nf4LoraProblem(30, 96, 64, 8, bias=False)
    t = {name: None if tensor is None else tensor.detach() for name, tensor in problem.tensors.items()}
    with use_backend(name):
        y = problem.call(t)
    merged = nf4_decoded(problem.q, F32) + problem.scaling * t["lora_B"] @ t["lora_A"]
    torch.testing.assert_close(F.linear(t["x"], merged), y, rtol=1e-4, atol=1e-4)
    lost = functional.nf4_quantize(merged).dequantize() - merged
    assert 0.02 < lost.norm() / merged.norm() < 0.15


@pytest.mark.parametrize("nested", [False, True])
def test_f53_copies_and_pickles(nested):
    """Of a weight that a layer holds, with its state: the copy computes the same and shares nothing."""
    q = nf4_weight(Draw("cpu"), 33, 67, nested=nested)
    x = torch.randn(3, 67)
    y = functional.nf4_linear(x, q)
    for clone in (copy.deepcopy(q), pickle.loads(pickle.dumps(q)), copy.deepcopy([q])[0]):
        assert torch.equal(functional.nf4_linear(x, clone), y)
        for tensor in clone.tensors:
            tensor.zero_()
        assert torch.equal(functional.nf4_linear(x, q), y)


@pytest.mark.parametrize("nested", [False, True])
def test_f54_to_moves_the_whole_state(nested):
    """One tensor left behind is refused by name; `to` leaves none."""
    q = nf4_weight(Draw("cpu"), 33, 67, nested=nested)
    moved = q.to("meta")
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"}
    assert functional.nf4_linear(torch.empty(3, 67, device="meta"), moved).shape == (3, 33)
    last = "nested_offset" if nested else "absmax"
    with pytest.raises(ValueError, match=rf"q\.{last} is on cpu, but q\.packed is on meta"):
        functional.nf4_linear(torch.empty(3, 67, device="meta"), moved._replace(**{last: getattr(q, last)}))


def test_f55_distributed_checkpoints_follow_every_key():
    """Each key of a state dict is looked up by attributes, and loads again."""
    model = torch.nn.Sequential(NF4Linear(64, 48), NF4Linear(48, 5, double_quant=False))
    other = torch.nn.Sequential(NF4Linear(64, 48), NF4Linear(48, 5, double_quant=False))
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    result = set_model_state_dict(other, state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(3, 64)
    assert torch.equal(other(x), model(x))
