"""`multi_mask_linear` in the Triton kernels: each row under its own mask, wherever it lies and whoever has none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from peft_kernels import explain, tuning, use_backend
from peft_kernels.formats.mask import pack
from peft_kernels.kernels.reference import mask_apply
from peft_kernels.kernels.triton import _launch, multi_mask_linear
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding
from tests.problems import MultiMaskProblem
from tests.problems.masked import drawn_mask
from tests.triton.launches import record_launches

pytest.importorskip("triton", reason="triton is not installed")

F16, F32 = torch.float16, torch.float32
NAN, INF = float("nan"), float("inf")


def _take(form: str, monkeypatch) -> None:
    """However few or many the rows."""
    monkeypatch.setattr(multi_mask_linear, "MOST_DECODED", 64 if form == "decode" else -1)
    monkeypatch.setattr(multi_mask_linear, "MOST_DECODED_EACH", 64)


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Small tiles, so that small problems have many, cut short at every edge."""
    config = tuning.config

    def smaller(*arguments, **sizes):
        found = config(*arguments, **sizes)
        if hasattr(found, "programs"):
            return dataclasses.replace(found, block_m=16, block_n=32, block_k=32, num_warps=1, programs=1)
        if hasattr(found, "block_m"):
            return dataclasses.replace(found, block_m=16, block_n=16, block_k=32, num_warps=1)
        return dataclasses.replace(found, block_n=16, block_k=32, num_warps=1) if hasattr(found, "block_n") else found

    monkeypatch.setattr(tuning, "config", smaller)


# More rows than a tile, fewer than masks, sizes that divide nothing; a mask without rows and one that keeps nothing are
# in each.
PROBLEMS = {
    "whole tiles": {"m": 64, "k": 64, "n": 64},
    "odd": {"m": 70, "k": 67, "n": 45},
    "a row": {"m": 1, "k": 70, "n": 37},
    "few rows": {"m": (3, 3), "k": 136, "n": 70, "bias": False},
}


@pytest.mark.parametrize(("name", "arch"), list(zip(PROBLEMS, ["sm_90", "sm_80"] * 2, strict=True)))
def test_forward_and_gradients(name, arch, monkeypatch):
    monkeypatch.setattr(_launch, "architecture", lambda device: arch)
    problem = MultiMaskProblem(**PROBLEMS[name], dtype=F16)
    result = problem.run()
    assert_within_rounding(problem, result)
    assert_as_accurate_as_eager(problem, result)


def test_float32():
    problem = MultiMaskProblem(**PROBLEMS["odd"])
    assert_within_rounding(problem, problem.run())


def _whole_numbers(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    return torch.randint(-3, 4, shape).to(dtype)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """Every second column of a wider one full of NaN."""
    wide = torch.full((values.shape[0], 2 * values.shape[1]), NAN, dtype=values.dtype)
    wide[:, ::2] = values
    return wide[:, ::2]


N, K = 36, 40
IDS = {
    "mixed": [3, 0, -1, 3, 7, 0, 0, 3, -5, 1] + [0] * 15,  # mask 2 has no rows; 4 and above, below 0: none
    "nobody": [-1, 9] * 3,
    "no row": [],
}


@pytest.mark.parametrize("form", ["decode", "grouped"])
@pytest.mark.parametrize("name", IDS)
@pytest.mark.usefixtures("tiny")
def test_exact_whoever_has_which_mask(name, form, monkeypatch):
    """Whole numbers, so that every order of the sums is exact; words are those of a part of wider masks, W, x and dY
    have strides."""
    _take(form, monkeypatch)
    ids = torch.tensor(IDS[name], dtype=torch.int64)
    kept = torch.stack([drawn_mask(N, K, density, i) for i, density in enumerate((0.5, 0.0, 1.0, 0.3))])
    around = torch.full((4, N, 4), -1, dtype=torch.int32)
    for i in range(4):
        around[i, :, 1:3] = pack(kept[i]).words
    words = around[:, :, 1:3]
    weight, x, bias = _whole_numbers(N, K), _whole_numbers(len(ids), K), _whole_numbers(N)
    grad_y = _whole_numbers(len(ids), N)
    each = [*(mask_apply.forward(weight, own, F32) for own in words), weight.float()]
    numbers = [i if 0 <= i < 4 else 4 for i in IDS[name]]
    strided = weight.t().contiguous().t()
    y = multi_mask_linear.forward(_wide(x), strided, words, ids, bias)
    assert y.shape == (len(ids), N)
    for row, number in enumerate(numbers):
        assert torch.equal(y[row].float(), each[number] @ x[row].float() + bias), row
    if form == "decode":
        return
    grads = multi_mask_linear.backward(_wide(grad_y), x, strided, words, ids, (True, True, True))
    for row, number in enumerate(numbers):
        assert torch.equal(grads[0][row].float(), grad_y[row].float() @ each[number]), row
    everything = torch.cat((kept, torch.ones(1, N, K, dtype=torch.bool)))[numbers]
    assert torch.equal(grads[1], (everything * grad_y[:, :, None] * x[:, None, :]).sum(0))
    assert torch.equal(grads[2], grad_y.float().sum(0))


@pytest.mark.parametrize("form", ["decode", "grouped"])
@pytest.mark.usefixtures("tiny")
def test_what_is_outside_a_mask_reaches_nobody(form, monkeypatch):
    """Neither in W, nor from the rows of other masks, of which one has nothing but NaN."""
    _take(form, monkeypatch)
    kept = torch.stack([drawn_mask(N, K, 0.5, i) for i in range(2)])
    words = torch.stack([pack(each).words for each in kept])
    ids = torch.tensor([0, 1, 0, -1])
    weight = torch.where(kept[0], _whole_numbers(N, K), torch.tensor([NAN, INF], dtype=F16)[torch.arange(K) % 2])
    x, grad_y = _whole_numbers(4, K), _whole_numbers(4, N)
    x[1] = NAN
    grad_y[1] = INF
    with np.errstate(invalid="ignore"):
        y = multi_mask_linear.forward(x, weight, words, ids, None)
        grad_x, grad_weight, _ = multi_mask_linear.backward(grad_y, x, weight, words, ids, (True, True, False))
    masked = torch.where(kept[0], weight, 0.0)
    assert torch.equal(y[::2], x[::2] @ masked.t())
    assert torch.equal(grad_x[::2], grad_y[::2] @ masked)
    others = grad_y[[0, 2]].t() @ x[[0, 2]] * kept[0] + grad_y[3][:, None] * x[3]
    assert torch.equal(grad_weight[~kept[1]], others[~kept[1]])
    assert grad_weight[kept[1]].isnan().all()


def test_a_split_sum_and_a_weight_of_another_dtype(monkeypatch):
    """A float32 weight is rounded to x's dtype before it is multiplied; its gradient is of its own."""
    launched = record_launches(monkeypatch)
    n, k = 40, 300
    kept = drawn_mask(n, k, 0.5)
    weight = torch.where(kept, _whole_numbers(n, k, dtype=F32) + 2.0**-14, NAN)
    x, grad_y, ids = _whole_numbers(3, k), _whole_numbers(3, n), torch.tensor([0, 0, 0])
    words = pack(kept).words.unsqueeze(0)
    masked = torch.where(kept, weight, 0.0).to(F16)
    for form, kernel in (("grouped", "_multi_mask_gemm"), ("decode", "_multi_mask_decode")):
        _take(form, monkeypatch)
        assert torch.equal(multi_mask_linear.forward(x, weight, words, ids, None), x @ masked.t())
        assert launched[-2:] == [kernel, "splitk_reduce"]
    _, grad, _ = multi_mask_linear.backward(grad_y, x, weight, words, ids, (False, True, False))
    assert torch.equal(grad, grad_y.float().t() @ x.float() * kept)


@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize(("n", "k"), [(0, 70), (6, 0)])
def test_empty(m, n, k):
    words, ids = torch.zeros(2, n, -(-k // 32), dtype=torch.int32), torch.zeros(m, dtype=torch.int64)
    x, weight = torch.ones(m, k), torch.ones(n, k)
    assert torch.equal(multi_mask_linear.forward(x, weight, words, ids, torch.ones(n)), torch.ones(m, n))
    grads = multi_mask_linear.backward(torch.ones(m, n), x, weight, words, ids, (True, True, True))
    assert torch.equal(grads[0], torch.zeros(m, k))
    assert torch.equal(grads[1], torch.zeros(n, k))
    assert torch.equal(grads[2], torch.full((n,), float(m)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"m": 1 << 31}, "2^31 or more rows"),
        ({"weight_dtype": torch.float64}, "float64 runs in PyTorch"),
        ({"dtype": torch.bfloat16}, "interpreter rounds to bfloat16 wrongly"),
        ({}, None),
    ],
)
def test_unsupported_says_why(changes, reason):
    found = multi_mask_linear.unsupported(MultiMaskProblem(4).dispatched()._replace(**changes))
    assert found is None if reason is None else reason in found


def test_the_interpreter_is_never_chosen_by_itself():
    problem = MultiMaskProblem(4)
    args, options = problem.arguments(problem.tensors)
    with use_backend(None):
        rejected = explain("multi_mask_linear", *args, **options).rejected
    assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in rejected
