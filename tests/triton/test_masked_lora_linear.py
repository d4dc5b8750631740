"""`masked_lora_linear` in the Triton kernels: the update beside the mask or inside it, with PyTorch's accuracy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from peft_kernels import tuning
from peft_kernels.formats.mask import pack
from peft_kernels.kernels.reference import mask_apply
from peft_kernels.kernels.triton import _launch, masked_lora_linear
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding
from tests.problems.masked import MaskedLoraProblem, drawn_mask
from tests.triton.launches import record_launches

pytest.importorskip("triton", reason="triton is not installed")

F16, F32 = torch.float16, torch.float32
NAN, INF = float("nan"), float("inf")

PROBLEMS = {
    "beside": {"m": 65, "k": 67, "n": 45, "r": 5, "density": 0.1},
    "beside, few rows, dropout": {"m": (3, 4), "k": 136, "n": 70, "r": 16, "dropout_p": 0.3, "adapter_dtype": F32},
    "beside, many ranks, none kept": {"m": 17, "k": 40, "n": 33, "r": 70, "density": 0.0, "bias": False},
    "beside, clean": {"m": 20, "k": 40, "n": 30, "clean": True, "dropout_p": 0.3},
    "inside": {"m": 65, "k": 67, "n": 45, "r": 5, "update_masked": True},
    "inside, few rows": {"m": (3, 4), "k": 136, "n": 70, "r": 20, "update_masked": True, "adapter_dtype": F32},
    "inside, clean": {"m": 70, "k": 40, "n": 30, "r": 3, "update_masked": True, "clean": True, "density": 0.9},
}


@pytest.mark.parametrize(("name", "arch"), [(name, ("sm_80", "sm_90")[i % 2]) for i, name in enumerate(PROBLEMS)])
def test_forward_and_gradients(name, arch, monkeypatch):
    monkeypatch.setattr(_launch, "architecture", lambda device: arch)
    problem = MaskedLoraProblem(**{"adapter_dtype": F16, **PROBLEMS[name], "dtype": F16})
    result = problem.run()
    assert_within_rounding(problem, result)
    assert_as_accurate_as_eager(problem, result)


@pytest.mark.parametrize("update_masked", [False, True], ids=["beside", "inside"])
def test_float32(update_masked):
    problem = MaskedLoraProblem(m=33, k=35, n=37, r=4, update_masked=update_masked)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("by_rows", [False, True], ids=["y", "dx"])
@pytest.mark.parametrize("inside", [False, True], ids=["beside", "inside"])
def test_exact_over_many_tiles_of_any_strides(inside, by_rows, monkeypatch):
    """Whole numbers, so that every order of the sums is exact; neither what is no number outside the mask has an
    effect, nor have ranks that are not there."""
    from peft_kernels.kernels.triton._masked_lora_gemm import masked_lora_gemm, masked_update_gemm

    config = tuning.config

    def smaller(*arguments, **sizes):
        found = config(*arguments, **sizes)
        if not hasattr(found, "programs"):
            return found
        return dataclasses.replace(found, block_m=16, block_n=32, block_k=32, num_warps=1, programs=1)

    monkeypatch.setattr(tuning, "config", smaller)
    m, n, k, r = 18, 36, 40, 3
    kept = drawn_mask(n, k, 0.5)
    around = torch.full((n, 4), -1, dtype=torch.int32)
    around[:, 1:3] = pack(kept).words
    words = around[:, 1:3]
    outside = torch.tensor([NAN, INF, -INF])[torch.arange(n * k).view(n, k) % 3]
    weight = torch.where(kept, _whole_numbers(n, k), outside)
    x, bias = _whole_numbers(m, n if by_rows else k), None if by_rows else _whole_numbers(n)
    a, b, s = _whole_numbers(r, k), _whole_numbers(n, r), _whole_numbers(m, r)
    if inside:
        matrix = mask_apply.forward(weight + 2.0 * b @ a, words, F32)
        more = torch.zeros(())
    else:
        matrix = mask_apply.forward(weight, words, F32)
        more = 2.0 * s @ (a if by_rows else b.t())
    expected = x @ (matrix if by_rows else matrix.t()) + more + (0 if bias is None else bias)
    if inside:
        y = masked_update_gemm(_strided(x), weight, words, _strided(a), _strided(b), 2.0, bias, by_rows=by_rows)
    else:
        factor = _strided(a) if by_rows else _strided(b).t()
        y = masked_lora_gemm(_strided(x), weight, words, _strided(s), factor, 2.0, bias, by_rows=by_rows)
    assert torch.equal(y, expected)


def test_gradients_of_the_factors_are_exact_over_many_tiles(monkeypatch):
    """What is no number outside the mask has no effect, nor have ranks that are not there."""
    from peft_kernels.kernels.triton._masked_grad_factors import masked_grad_factors

    config = tuning.config

    def smaller(*arguments, **sizes):
        found = config(*arguments, **sizes)
        return dataclasses.replace(found, block_m=16, block_n=16, block_k=32) if hasattr(found, "group_m") else found

    monkeypatch.setattr(tuning, "config", smaller)
    m, n, k, r = 18, 36, 40, 3
    kept = drawn_mask(n, k, 0.5)
    kept[:, 7], kept[5] = False, False
    grad_y, x, a, b = _whole_numbers(m, n), _whole_numbers(m, k), _whole_numbers(r, k), _whole_numbers(n, r)
    update = (grad_y.t() @ x).where(kept, 0.0)
    x[:, 7], grad_y[:, 5] = INF, NAN
    words = pack(kept).words
    with np.errstate(invalid="ignore"):
        grads = masked_grad_factors(_strided(grad_y), _strided(x), words, _strided(a), _strided(b), 2.0)
    assert torch.equal(grads[0], 2 * b.t() @ update)
    assert torch.equal(grads[1], 2 * update @ a.t())


def _whole_numbers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).float()


def _strided(values: torch.Tensor) -> torch.Tensor:
    """Every second column of a wider one full of NaN."""
    wide = torch.full((values.shape[0], 2 * values.shape[1]), NAN, dtype=values.dtype)
    wide[:, ::2] = values
    return wide[:, ::2]


def test_an_update_is_rounded_once_with_its_weight():
    """W + s B A in float32, then float16: 1 + 2⁻¹¹ + 2⁻¹¹ is neither number's rounding but the next float16."""
    from peft_kernels.kernels.triton._masked_lora_gemm import masked_update_gemm

    weight, ones = torch.full((8, 32), 1 + 2.0**-11), torch.ones(1, 32, dtype=F16)
    words = pack(torch.ones(8, 32, dtype=torch.bool)).words
    for by_rows in (False, True):
        x = torch.eye(8 if by_rows else 32, dtype=F16)
        y = masked_update_gemm(x, weight, words, ones, ones[:, :8].t(), 2.0**-11, by_rows=by_rows)
        assert torch.equal(y, torch.full(y.shape, 1 + 2.0**-10, dtype=F16))


def test_launches(monkeypatch):
    """Inside the mask one launch each for y, dx and, up to rank 16, both factors: above, `composed` finds their
    gradients."""
    launched = record_launches(monkeypatch)
    for r, more in ((3, ["_masked_grad_factors"]), (17, [])):
        launched.clear()
        MaskedLoraProblem(m=8, k=40, n=24, r=r, update_masked=True).run()
        kernels = [name for name in launched if name.startswith("_masked")]
        assert kernels == ["_masked_update_gemm"] * 2 + more
    launched.clear()
    MaskedLoraProblem(m=8, k=40, n=24, r=3).run()
    assert launched.count("_masked_lora_gemm") == 2
    launched.clear()
    MaskedLoraProblem(m=8, k=40, n=24, r=3, clean=True).run()
    assert not any("masked" in name for name in launched)


@pytest.mark.parametrize("m", [0, 3])
@pytest.mark.parametrize("update_masked", [False, True], ids=["beside", "inside"])
def test_empty(m, update_masked):
    """No rows, no outputs, nothing to sum."""
    none = (True, 1.0, 0.0, None, update_masked)[1:]
    for n, k in ((0, 70), (6, 0), (6, 33)):
        words = pack(torch.zeros(n, k, dtype=torch.bool)).words
        weight, a, b = torch.ones(n, k), torch.ones(2, k), torch.zeros(n, 2)
        y, _ = masked_lora_linear.forward(torch.ones(m, k), weight, words, False, torch.ones(n), a, b, *none)
        assert torch.equal(y, torch.ones(m, n))
        grad_y, x, s = torch.ones(m, n), torch.ones(m, k), torch.zeros(m, 2)
        needs = (True, True, True, True)
        grads = masked_lora_linear.backward(grad_y, x, s, weight, words, False, a, b, *none, needs)
        expected = torch.zeros(m, k), torch.full((n,), float(m)), torch.zeros(2, k), torch.zeros(n, 2)
        assert all(torch.equal(one, two) for one, two in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"update_masked": True, "r": 65}, "rank 65 is above 64"),
        ({"update_masked": True, "dropout_p": 0.1}, "dropout"),
        ({"nf4": True, "k": 64, "n": 64}, "NF4"),
        ({"r": 65, "dropout_p": 0.1}, None),
    ],
)
def test_unsupported_says_why(options, reason):
    found = masked_lora_linear.unsupported(MaskedLoraProblem(4, **options).dispatched())
    assert found is None if reason is None else reason in found
