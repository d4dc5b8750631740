"""N:M masks: n of every m consecutive weights of a row. 2:4 is what tensor cores skip zeros of."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.checks import shape_text
from peft_kernels.formats.mask import PackedMask, words_of
from peft_kernels.functional import mask_pack
from peft_kernels.pruning._scores import Scores, scores_of


def keep_n_of_m(scores: Any, n: int, m: int) -> PackedMask:
    """The mask of the n largest scores of every m consecutive ones of a row (Mishra et al. 2021, "Accelerating Sparse
    Deep Neural Networks", https://arxiv.org/abs/2104.08378).

    Each score is compared with the others of its group: no sort, no wait for the device. Of equal scores the earlier
    are kept; NaN never is. A last group of fewer than m keeps n of what it has.

    Args:
        scores: [out_features, in_features], floating-point, any strides.
        n: how many are kept, 0 <= n <= m.
        m: size of a group, 1 <= m <= 64.

    Returns:
        A `PackedMask` on the device of the scores.

    Raises:
        ValueError: no such n or m, or scores without two dimensions.
        TypeError: no floating-point tensor.
    """
    part = scores_of(scores)
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= m <= 64 and 0 <= n <= m):
        raise ValueError(f"keep_n_of_m: {n} of {m}; expected whole numbers, 1 <= m <= 64 and 0 <= n <= m")
    columns = part.shape[1]
    return _packed(part, lambda strip: _largest_of_groups(strip, n, m)[:, :columns], m * columns)


def _largest_of_groups(strip: Tensor, n: int, m: int) -> Tensor:
    groups = F.pad(strip, (0, -strip.shape[1] % m), value=float("nan")).unflatten(1, (-1, m))
    one, other = groups.unsqueeze(3), groups.unsqueeze(2)
    earlier = torch.ones(m, m, dtype=torch.bool, device=strip.device).tril(-1)
    before = (other > one) | ((other == one) & earlier)
    return ((before.sum(3) < n) & ~groups.isnan()).flatten(1)


def keep_transposable_2_of_4(scores: Any) -> PackedMask:
    """The 2:4 mask of both W and Wᵀ with the largest sum of scores: each 4 x 4 block keeps two weights in every row and
    in every column, the best of the 90 ways (Hubara et al. 2021, "Accelerated Sparse Neural Training",
    https://arxiv.org/abs/2102.08124). With it forward and dx can both skip zeros.

    Sums are in float32 (float64 of float64 scores); of equally good ways the first in lexicographic order is taken. NaN
    counts as the lowest finite number / 32, infinities as ± the highest / 32.

    Args:
        scores: [out_features, in_features], both multiples of 4, floating-point, any strides.

    Returns:
        A `PackedMask` on the device of the scores, of density 1/2.

    Raises:
        ValueError: the shape is not of whole blocks.
        TypeError: no floating-point tensor.
    """
    part = scores_of(scores)
    if part.shape[0] % 4 or part.shape[1] % 4:
        raise ValueError(
            f"keep_transposable_2_of_4: scores has shape {shape_text(part.shape)}; expected multiples of 4"
        )
    return _packed(part, _best_ways, 90 * part.shape[1] // 4, multiple=4)


def _best_ways(strip: Tensor) -> Tensor:
    """bool [rows, columns] of as many scores."""
    highest = torch.finfo(strip.dtype).max / 32
    bounded = strip.nan_to_num(-highest).clamp(-highest, highest)
    blocks = bounded.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(2)
    ways = _ways(strip.device)
    # Sixteen terms at a time, no product of 16-bit or TF32 numbers: a way is as good on every device.
    sums = (blocks.unsqueeze(2) * ways.to(strip.dtype)).sum(3)
    best = ways[sums.argmax(2)]
    return best.unflatten(2, (4, 4)).transpose(1, 2).reshape(strip.shape)


@functools.cache
def _ways(device: torch.device) -> Tensor:
    """bool [90, 16]: 4 x 4 blocks with two in every row and column. Shared: not to be written to."""
    rows = [row for row in itertools.product((0, 1), repeat=4) if sum(row) == 2]
    blocks = [block for block in itertools.product(rows, repeat=4) if set(map(sum, zip(*block, strict=True))) == {2}]
    return torch.tensor([sum(block, ()) for block in blocks], dtype=torch.bool, device=device)


def _packed(part: Scores, kept: Callable[[Tensor], Tensor], row_cost: int, multiple: int = 1) -> PackedMask:
    words = torch.empty(part.shape[0], words_of(part.shape[1]), dtype=torch.int32, device=part.device)
    for rows, strip in part.strips(row_cost, multiple):
        words[rows] = mask_pack(kept(strip)).words
    return PackedMask(words, part.shape)
