"""`masked_linear` in the Triton kernels: PyTorch's accuracy, exact zeros, gathered gradients, any layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from peft_kernels import functional, tuning
from peft_kernels.formats.mask import pack
from peft_kernels.formats.positions import positions
from peft_kernels.kernels.reference import mask_apply
from peft_kernels.kernels.triton import _grad_at, _launch, masked_linear
from peft_kernels.kernels.triton._grad_at import grad_at, tile_places
from peft_kernels.kernels.triton._masked_gemm import masked_gemm
from peft_kernels.kernels.triton._masked_grad_weight import masked_grad_weight
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding
from tests.problems.masked import MaskedProblem, drawn_mask
from tests.triton.launches import record_launches

F16, F32 = torch.float16, torch.float32
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request, monkeypatch) -> str:
    """The configurations of this architecture, which the interpreter runs as well as any others."""
    monkeypatch.setattr(_launch, "architecture", lambda device: request.param)
    return request.param


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Tiles of 16 x 32, summed in steps of 32 or 16 and gathered by 64: small problems have many, cut short at every
    edge."""
    config = tuning.config

    def smaller(*arguments, **sizes):
        found = config(*arguments, **sizes)
        if not hasattr(found, "block_m"):  # passes over masks, of whole words
            return found
        if hasattr(found, "programs"):
            return dataclasses.replace(found, block_m=16, block_n=32, block_k=32, num_warps=1, programs=1)
        return dataclasses.replace(found, block_m=16, block_n=16, block_k=32, num_warps=1)

    monkeypatch.setattr(tuning, "config", smaller)
    monkeypatch.setattr(_grad_at, "_OF_THREAD", 2)


PROBLEMS = {
    "whole tiles": {"m": 64, "k": 64, "n": 64},
    "odd": {"m": 65, "k": 67, "n": 45, "density": 0.1},
    "a row": {"m": 1, "k": 70, "n": 37},
    "few rows": {"m": (3, 5), "k": 136, "n": 70, "bias": False},
    "all kept": {"m": 17, "k": 33, "n": 20, "density": 1.0},
    "none kept": {"m": 17, "k": 33, "n": 20, "density": 0.0},
    "clean": {"m": 20, "k": 40, "n": 30, "clean": True},
    "compact": {"m": 33, "k": 67, "n": 45, "compact": True, "density": 0.3},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_and_gradients(name, arch):
    problem = MaskedProblem(**PROBLEMS[name], dtype=F16)
    result = problem.run()
    assert_within_rounding(problem, result)
    assert_as_accurate_as_eager(problem, result)
    if "weight" in result[1]:
        assert not result[1]["weight"][~problem.kept].any()


@pytest.mark.parametrize("name", ["odd", "compact"])
def test_float32(name):
    problem = MaskedProblem(**PROBLEMS[name])
    assert_within_rounding(problem, problem.run())


def _whole_numbers(*shape: int, dtype: torch.dtype = F32, least: int = -3, most: int = 4) -> torch.Tensor:
    return torch.randint(least, most, shape).to(dtype)


def _strided(values: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous, transposed, and every second column of a wider one full of NaN."""
    wide = torch.full((values.shape[0], 2 * values.shape[1]), NAN, dtype=values.dtype)
    wide[:, ::2] = values
    return [values, values.t().contiguous().t(), wide[:, ::2]]


@pytest.mark.parametrize("by_rows", [False, True], ids=["y", "dx"])
@pytest.mark.usefixtures("tiny")
def test_exact_over_many_tiles_of_any_strides(by_rows):
    """Whole numbers, so that every order of the sums is exact; infinities and NaN outside the mask have no effect, and
    words are those of a part of a wider mask."""
    m, n, k = 18, 40, 70
    kept = drawn_mask(n, k, 0.5)
    around = pack(torch.ones(n, 5 * 32, dtype=torch.bool)).words
    around[:, 1:4] = pack(kept).words
    words = around[:, 1:4]
    outside = torch.tensor([NAN, INF, -INF])[torch.arange(n * k).view(n, k) % 3]
    weight = torch.where(kept, _whole_numbers(n, k), outside)
    x = _whole_numbers(m, n if by_rows else k)
    bias = None if by_rows else _whole_numbers(n)
    masked = mask_apply.forward(weight, words, F32)
    expected = x @ masked if by_rows else torch.addmm(bias, x, masked.t())
    for one, other in zip(_strided(x), _strided(weight), strict=True):
        assert torch.equal(masked_gemm(one, other, words, bias, by_rows=by_rows), expected)


@pytest.mark.parametrize("by_rows", [False, True], ids=["y", "dx"])
def test_a_split_sum_and_a_weight_of_another_dtype(by_rows, arch, monkeypatch):
    """Of a row the sum is split; a float32 weight is rounded to x's dtype before it is multiplied."""
    launched = record_launches(monkeypatch)
    n, k = (300, 40) if by_rows else (40, 300)
    kept = drawn_mask(n, k, 0.5)
    weight = torch.where(kept, _whole_numbers(n, k) + 2.0**-14, NAN)
    x = _whole_numbers(1, n if by_rows else k, dtype=F16)
    y = masked_gemm(x, weight, pack(kept).words, by_rows=by_rows)
    masked = torch.where(kept, weight, 0.0).to(F16)
    assert torch.equal(y, x @ (masked if by_rows else masked.t()))
    assert launched == ["mask_pack", "_masked_gemm", "splitk_reduce"]


@pytest.mark.usefixtures("tiny")
def test_gradients_of_a_weight_are_exact_over_many_tiles():
    """Dense and gathered, from any strides, with tiles that have no places and one that has more than a chunk."""
    m, n, k = 18, 36, 50
    kept = drawn_mask(n, k, 0.05)
    kept[16:32], kept[:16, 32:50] = False, True
    grad_y, x = _whole_numbers(m, n, dtype=F16), _whole_numbers(m, k, dtype=F16)
    expected = grad_y.float().t() @ x.float()
    places = positions(kept.flatten().nonzero().squeeze(1), (n, k))
    for one, other in zip(_strided(grad_y), _strided(x), strict=True):
        dense = masked_grad_weight(one, other, pack(kept).words, F32)
        assert torch.equal(dense, torch.where(kept, expected, 0.0))
        assert torch.equal(grad_at(one, other, places, F32), expected[kept])
    assert torch.equal(grad_at(grad_y, x, places, F16), expected[kept].to(F16))
    lone = positions(torch.tensor([3 * k + 7, n * k - 1]), (n, k))  # alone in their tiles
    assert torch.equal(grad_at(grad_y, x, lone, F32), torch.stack((expected[3, 7], expected[-1, -1])))


@pytest.mark.usefixtures("tiny")
def test_nothing_outside_the_mask_is_minus_0_or_nan():
    grad_y, x = torch.full((3, 20), -INF), torch.zeros(3, 40)
    kept = drawn_mask(20, 40, 0.5)
    with np.errstate(invalid="ignore"):
        grad = masked_grad_weight(grad_y, x, pack(kept).words, F32)
    assert grad[kept].isnan().all()
    assert grad[~kept].view(torch.int32).count_nonzero() == 0


def test_tiles_of_places_are_made_once_and_anew_when_written_to(monkeypatch):
    kept = drawn_mask(20, 40, 0.5)
    places = positions(kept.flatten().nonzero().squeeze(1), kept.shape)
    launched = record_launches(monkeypatch)
    first = tile_places(places, 16, 16)
    assert tile_places(places, 16, 16) is first
    assert tile_places(places._replace(flat=places.flat.clone()), 16, 16) is not first
    assert launched == ["_number"] * 2
    places.flat[:2] += 1
    assert not torch.equal(tile_places(places, 16, 16).numbers, first.numbers)


def test_tiles_of_places_in_a_captured_graph_are_its_own(monkeypatch):
    """Neither kept for later nor taken from before. A tensor that says that it is on a GPU stands for one that is."""
    kept = drawn_mask(20, 40, 0.5)
    places = positions(kept.flatten().nonzero().squeeze(1), kept.shape)
    before = tile_places(places, 16, 16)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tile_places(places, 16, 16) is before, "on a CPU nothing is captured"
    monkeypatch.setattr(_grad_at, "_captured", lambda flat, asked=_grad_at._captured: asked(_OnGpu()))
    captured = [tile_places(places, 16, 16), tile_places(places, 16, 32)]
    assert all(torch.equal(one, other) for one, other in zip(captured[0], before, strict=True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tile_places(places, 16, 16) is before
    assert tile_places(places, 16, 32) is not captured[1]
    assert tile_places(places, 16, 16).numbers.data_ptr() != captured[0].numbers.data_ptr()


class _OnGpu:
    is_cuda = True


@pytest.mark.parametrize("m", [0, 3])
def test_empty(m):
    nothing = pack(torch.zeros(0, 70, dtype=torch.bool))
    assert functional.masked_linear(torch.ones(m, 70), torch.ones(0, 70), nothing).shape == (m, 0)
    narrow = pack(torch.zeros(6, 0, dtype=torch.bool))
    y = functional.masked_linear(torch.ones(m, 0), torch.ones(6, 0), narrow, torch.ones(6))
    assert torch.equal(y, torch.ones(m, 6))
    grad = masked_grad_weight(torch.ones(0, 6), torch.ones(0, 70), pack(torch.ones(6, 70)).words, F32)
    assert torch.equal(grad, torch.zeros(6, 70))


def test_launches(monkeypatch):
    """One each for y, dx and dW; the bias's gradient is PyTorch's sum."""
    problem = MaskedProblem(m=8, k=40, n=24)
    launched = record_launches(monkeypatch)
    problem.run()
    kernels = [name for name in launched if name != "splitk_reduce"]
    assert kernels == ["_masked_gemm", "_masked_gemm", "_masked_grad_weight"]


def test_4_bits_are_declined():
    problem = MaskedProblem(m=4, k=64, n=64, nf4=True).dispatched()
    assert "4" in masked_linear.unsupported(problem)
