"""Device memory for many adapters: `AdapterPool`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from peft_kernels.formats.adapter_table import PoolAdapters


class AdapterPool:
    """Device memory for many adapters."""

    def adapters(self, layers: Sequence[PoolLayer]) -> PoolAdapters:
        """What the op takes: the adapters of these layers."""
        raise NotImplementedError


class PoolLayer(NamedTuple):
    """One layer of a pool, in the place of factors for `multi_lora_linear`. `position`: its place in the table."""

    pool: AdapterPool
    name: str
    position: int
