"""The problems that `peft-kernels tune` measures when none are named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

import torch

from peft_kernels.problems import Shape


class Sizes(NamedTuple):
    """M rows, N out_features, K in_features, rank r."""

    m: int
    n: int
    k: int
    r: int


# The most important first: time may be up after any of them.
SMALL = (
    Sizes(8192, 4096, 4096, 16),
    Sizes(2048, 4096, 4096, 16),
    Sizes(512, 4096, 4096, 16),
    Sizes(64, 4096, 4096, 16),
    Sizes(8192, 14336, 4096, 16),
    Sizes(8192, 4096, 14336, 16),
    Sizes(8192, 4096, 4096, 64),
    Sizes(16, 4096, 4096, 16),
)
_ROWS = (8192, 4096, 2048, 16384, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
_LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (1024, 1024))
_RANKS = (16, 64, 32, 128, 256)
PRESETS: dict[str, tuple[Sizes, ...]] = {
    "small": SMALL,
    "full": tuple(dict.fromkeys((*SMALL, *(Sizes(m, n, k, r) for r, (n, k), m in product(_RANKS, _LAYERS, _ROWS))))),
}


def shapes(
    sizes: Iterable[Sizes],
    dtypes: Iterable[torch.dtype],
    adapter_dtypes: Iterable[torch.dtype | None],
    dropout_ps: Iterable[float],
) -> Iterator[Shape]:
    """Every combination once, sizes slowest; an adapter dtype of None is the layer's."""
    variants = list(product(dtypes, adapter_dtypes, dropout_ps))
    found = (
        Shape((m,), n, k, r, dtype, adapter_dtype or dtype, p)
        for m, n, k, r in sizes
        for dtype, adapter_dtype, p in variants
    )
    yield from dict.fromkeys(found)
