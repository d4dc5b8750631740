"""`philox_dropout`: dropout whose mask can be recomputed from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_floating, check_probability, check_seed


def philox_dropout(x: Tensor, p: float, seed: int | Tensor | None = None) -> Tensor:
    """Dropout whose mask is a pure function of (seed, element), the same bits in every implementation.

    y[m, k] = x[m, k] / (1 - p) where lane(seed, m, k) >= round(65536 p), else 0, with the 16-bit lanes of Philox
    4x32-10 (Salmon et al., SC 2011; layout in `kernels/reference/philox_dropout.py`). Backward keeps only the seed.

    Args:
        x: [..., K]; m counts the rows of x flattened to two dimensions.
        p: probability, in [0, 1], that an element is zeroed.
        seed: integer, int64 tensor [1] on x's device, or None to draw one from torch's generator.

    Returns:
        A new contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: p is outside [0, 1], x has no dimension, or the seed's shape or device does not fit.
        TypeError: x is not a floating-point tensor or the seed is not an integer.
    """
    check_floating("philox_dropout", "x", x)
    if x.ndim == 0:
        raise ValueError("philox_dropout: x has no dimensions; expected (..., K)")
    check_probability("philox_dropout", "p", p)
    return ops.philox_dropout.philox_dropout(x, float(p), seed_tensor("philox_dropout", seed, x.device))


def seed_tensor(op: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    """int64 [1] on the device: a new seed for None. Raises for what is no integer, and for a tensor elsewhere."""
    if seed is None:
        return ops.philox_dropout.new_seed(device)
    check_seed(op, seed, device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=device)
