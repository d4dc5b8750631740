"""Operands as the CUDA kernels over compressed weights read them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from peft_kernels.kernels.cuda.nf4_linear import aligned_rows

_X_COLUMNS = 8  # that the kernels load at once


def padded_rows(x: Tensor) -> Tensor:
    """x, or a copy, in rows that begin at multiples of 16 bytes and end with zeros at a multiple of 8 columns."""
    missing = -x.shape[1] % _X_COLUMNS
    return aligned_rows(F.pad(x, (0, missing)) if missing else x)


def aligned(tensor: Tensor) -> Tensor:
    """Itself, or a copy that is contiguous and begins at a multiple of 16 bytes (a view of a file may not)."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
