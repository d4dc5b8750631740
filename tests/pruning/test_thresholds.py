"""Exactly the k largest, against a stable sort in float64: ties, signs, denormals, infinities, NaN, several tensors."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.formats import nf4
from peft_kernels.pruning import _scores, keep_largest, keep_largest_by_row, kth_largest

INF, NAN = float("inf"), float("nan")
SHAPES = ((37, 45), (3, 260), (1, 5), (0, 4), (2, 0))


@pytest.fixture(autouse=True)
def _short_strips(monkeypatch):
    """Many strips and a rest, of matrices that are quick to sort."""
    monkeypatch.setattr(_scores, "_CPU_STRIP", 700)


def sorted_masks(tensors, k):
    """What the module promises: lowest places first among equal scores, earlier tensors first, NaN never."""
    flat = torch.cat([tensor.double().flatten() for tensor in tensors])
    order = torch.sort(flat.nan_to_num(nan=-INF, posinf=INF, neginf=-INF), descending=True, stable=True).indices
    order = order[~flat[order].isnan()]  # of -inf and NaN the numbers come first
    kept = torch.zeros(flat.shape, dtype=torch.bool)
    kept[order[:k]] = True
    parts = kept.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def drawn(kind: str, dtype: torch.dtype):
    scores = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    if kind == "ties":
        scores = [(2 * s).round() for s in scores]
    elif kind == "zeros":
        scores = [torch.where(s > 0, 0.0, -0.0) for s in scores]
    elif kind == "denormal":
        scores = [s * torch.finfo(dtype).tiny / 16 for s in scores]
    elif kind == "wild":
        odd = torch.tensor([INF, -INF, NAN, -NAN, 0.0, -0.0], dtype=torch.float64)
        scores = [torch.where(torch.rand_like(s) < 0.5, s, odd[torch.randint(6, s.shape)]) for s in scores]
    return [s.to(dtype) for s in scores]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, torch.float32) for kind in ("normal", "ties", "zeros", "denormal", "wild")]
    + [(kind, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64) for kind in ("denormal", "wild")],
)
def test_exactly_the_largest(kind, dtype):
    scores = drawn(kind, dtype)
    total = sum(s.numel() for s in scores)
    for k in (0, 1, total // 2, total):
        masks = keep_largest(scores, k)
        for mask, want in zip(masks, sorted_masks(scores, k), strict=True):
            assert torch.equal(mask.unpack(), want)
        if kind != "wild":
            assert sum(int(mask.kept()) for mask in masks) == k
            if k:
                flat = torch.cat([s.flatten() for s in scores])
                assert kth_largest(scores, k) == flat.topk(k).values[-1]
    rows = scores[0][:20]
    for k in (0, 22, 45):
        want = torch.cat([sorted_masks([row[None]], k)[0] for row in rows])
        assert torch.equal(keep_largest_by_row(rows, k).unpack(), want)


def test_float64_is_not_rounded():
    scores = 1 + torch.arange(64.0, dtype=torch.float64).view(8, 8).flip(0) * 2**-50
    assert torch.equal(keep_largest(scores, 9).unpack(), sorted_masks([scores], 9)[0])
    both = [torch.ones(2, 3), scores]  # together with float32
    assert torch.equal(keep_largest(both, 9)[1].unpack(), sorted_masks(both, 9)[1])


def test_strides_and_weights_of_4_bits():
    scores = torch.randn(40, 66)[:, ::2].t()
    assert torch.equal(keep_largest(scores, 100).unpack(), sorted_masks([scores], 100)[0])
    q = nf4.quantize(torch.randn(24, 64))
    assert torch.equal(keep_largest([q], 300)[0].unpack(), sorted_masks([q.dequantize(torch.float32)], 300)[0])


def test_kth_largest_of_any_shapes():
    tensors = [torch.randn(3, 4, 5), torch.randn(()), torch.randn(7)]
    want = torch.cat([t.flatten() for t in tensors]).sort(descending=True).values
    assert torch.equal(torch.stack([kth_largest(tensors, k) for k in range(1, 69)]), want)
    assert kth_largest(torch.tensor([1.0, NAN]), 2).isnan()


def test_refusals():
    scores = torch.randn(4, 5)
    for k in (-1, 21):
        with pytest.raises(ValueError, match=f"k is {k}; expected 0 <= k <= 20"):
            keep_largest(scores, k)
    with pytest.raises(TypeError, match=r"k is 2\.5; expected an integer"):
        keep_largest(scores, 2.5)
    with pytest.raises(ValueError, match="0 <= k <= 5"):
        keep_largest_by_row(scores, 6)
    with pytest.raises(ValueError, match="1 <= k <= 20"):
        kth_largest(scores, 0)
    with pytest.raises(TypeError, match=r"scores\[1\] is torch.int64"):
        keep_largest([scores, torch.ones(2, 2, dtype=torch.int64)], 1)
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        keep_largest([torch.randn(5)], 1)


def test_a_device_is_not_waited_for():
    """Tensors without memory: whatever asks for a number, or for a size that depends on one, raises."""
    scores = torch.empty(64, 96, device="meta", dtype=torch.bfloat16)
    masks = [*keep_largest([scores, scores.float()], 100), keep_largest_by_row(scores, 10)]
    assert all(mask.words.is_meta and mask.words.shape == (64, 3) for mask in masks)
    assert kth_largest([scores], 5).shape == ()
    with pytest.raises(RuntimeError, match="meta"):
        bool(kth_largest([scores], 5) > 0)


@pytest.mark.gpu
def test_on_a_gpu():
    scores = [s.cuda() for s in drawn("wild", torch.float32)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks, by_row = keep_largest(scores, 1000), keep_largest_by_row(scores[0], 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mask, want in zip(masks, sorted_masks([s.cpu() for s in scores], 1000), strict=True):
        assert torch.equal(mask.unpack().cpu(), want)
    assert torch.equal(by_row.unpack().cpu(), keep_largest_by_row(scores[0].cpu(), 20).unpack())
