"""csrc/select.cpp at every vector width: exactly the largest, ties by place, whatever cuts and threads there are. What
it keeps of special numbers is in tests/pruning/test_thresholds.py."""

from __future__ import annotations

import pytest
import torch

from peft_kernels.kernels.cpu import _select as select
from peft_kernels.pruning import keep_largest, thresholds

INF, NAN = float("inf"), float("nan")


def scores_with_ties(n: int, k: int) -> torch.Tensor:
    scores = (3 * torch.randn(n, k, generator=torch.Generator().manual_seed(n))).round() / 3
    scores[0, :6] = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0])
    return scores


@pytest.mark.parametrize(("n", "k"), [(3, 7), (5, 32), (9, 101), (300, 259)])
def test_the_same_masks_as_pytorch_s_passes(width, monkeypatch, n, k):
    """Rows that are no whole words, pieces of 256 that are not full, shares of several threads."""
    scores = scores_with_ties(n, k)
    wanted = (0, 1, n * k // 3, n * k - 2, n * k)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        masks = [keep_largest(scores, count) for count in wanted]
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(select, "is_available", lambda: False)
    for count, mask in zip(wanted, masks, strict=True):
        expected = keep_largest(scores, count)
        assert int(expected.kept()) == min(count, n * k - 2)
        assert torch.equal(mask.words, expected.words)


def test_digits_are_counted_once(width):
    """Of all keys the top digit, of those that follow a prefix the next one."""
    scores = scores_with_ties(300, 259)
    keys = thresholds._keys(scores).flatten()
    counts = torch.zeros(2048, dtype=torch.int64)
    select.count(scores, 32, 21, 0, counts)
    assert torch.equal(counts, torch.bincount((keys >> 21) + 1024, minlength=2048))
    prefix = int(keys[7]) >> 21
    following = keys[(keys >> 21) == prefix]
    assert len(following) > 100
    counts.zero_()
    select.count(scores, 21, 10, prefix, counts)
    assert torch.equal(counts, torch.bincount((following >> 10) & 2047, minlength=2048))
