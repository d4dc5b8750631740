"""Specification of the library's dropout: Philox 4x32-10 keyed by (seed, element), one call for 8 neighbours of a row.

For x [M, K] the element (m, k) belongs to the 64-bit counter c = m * ceil(K / 8) + k // 8. The call's key is the
64-bit seed, its counter words are (c low, c high, 0, 0). Its four 32-bit outputs hold eight 16-bit lanes: word
k % 8 // 2, low half first. The element is kept where its lane >= round(65536 * p), and scaled by 1 / (1 - p).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (constants and round function).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
LANES = 8
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF


def unsupported(problem) -> str | None:
    return None


def threshold(p: float) -> int:
    """The smallest 16-bit lane that is kept."""
    return round(65536 * p)


def scale(p: float) -> float:
    """What kept elements are multiplied by. At p = 1 nothing is kept, and 0 avoids infinity times a mask of zeros."""
    return 0.0 if p == 1 else 1.0 / (1.0 - p)


def _high_low(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a * multiplier, for a < 2^32 held in int64, without overflow."""
    low_half, high_half = a & 0xFFFF, a >> 16
    low_product = low_half * multiplier
    high_product = high_half * multiplier + (low_product >> 16)
    return high_product >> 16, ((high_product & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox4x32(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 of int64 counters under the 64-bit key `seed`; four int64 tensors with values below 2^32."""
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    c0, c1 = counter & MASK32, (counter >> 32) & MASK32
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(ROUNDS):
        high0, low0 = _high_low(c0, MULTIPLIERS[0])
        high1, low1 = _high_low(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def keep_mask(rows: int, columns: int, p: float, seed: Tensor, row_offset: int = 0) -> Tensor:
    """The boolean mask [rows, columns] of the elements that dropout keeps, on the seed's device."""
    groups = -(-columns // LANES)
    first = row_offset * groups
    counter = torch.arange(first, first + rows * groups, device=seed.device, dtype=torch.int64)
    words = torch.stack(philox4x32(seed.reshape(()), counter), dim=-1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return lanes.view(rows, groups * LANES)[:, :columns] >= threshold(p)


def forward(x: Tensor, p: float, seed: Tensor, row_offset: int = 0) -> Tensor:
    keep = keep_mask(x.shape[0], x.shape[1], p, seed, row_offset)
    return torch.where(keep, x * scale(p), torch.zeros((), dtype=x.dtype, device=x.device))
