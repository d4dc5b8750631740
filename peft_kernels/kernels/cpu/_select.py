"""Radix selection in csrc/select.cpp, for `pruning.thresholds`: digits of float32 scores counted, what is kept packed.

1024 x 4096 scores, half of them kept, beside `torch.kthvalue` alone (which sorts out no ties and packs nothing): 0.2 to
0.3 of its CPU time on one thread of a busy AVX2 server; by PyTorch's own passes more than twice as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _native
from peft_kernels.formats.mask import words_of


def is_available() -> bool:
    return _native.why_not("_cpu") is None


def count(scores: Tensor, top: int, low: int, prefix: int, counts: Tensor) -> None:
    """counts += how often each value of the bits [low, top), at most 11, follows the digits `prefix`.

    Args:
        scores: float32, any shape.
        top: 32 where nothing is to be followed.
        counts: int64 [2^(top - low)], contiguous.
    """
    scores = scores.contiguous()
    _native.load("_cpu").select_count(
        scores.data_ptr(), scores.numel(), top, low, prefix, counts.data_ptr(), torch.get_num_threads()
    )


def kept_words(scores: Tensor, last: int, wanted: int) -> tuple[Tensor, int]:
    """(the words of a mask [rows, columns] of the keys above `last` and of the first `wanted` that equal it, how many
    equal it)."""
    scores, (rows, columns) = scores.contiguous(), scores.shape
    words = torch.empty(rows, words_of(columns), dtype=torch.int32)
    ties = _native.load("_cpu").select_keep(
        scores.data_ptr(), rows, columns, last, wanted, words.data_ptr(), torch.get_num_threads()
    )
    return words, ties
