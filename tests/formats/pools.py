"""Small pools, adapters for them, what rows must compute, and all that a refused call must leave as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.pool import BASE_NAME, AdapterPool
from peft_kernels.functional import multi_lora_linear

SIZES = {"up": (24, 16), "down": (16, 24)}


class Drawn(NamedTuple):
    """An adapter and its scaling in every layer."""

    factors: dict[str, tuple[Tensor, Tensor]]
    scaling: float


def drawn(r: int, seed: int, layers: Sequence[str] = tuple(SIZES), sizes: Mapping = SIZES) -> Drawn:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in layers:
        n, k = sizes[layer]
        lora_A, lora_B = torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)
        factors[layer] = (lora_A / k**0.5, lora_B / r**0.5)
    return Drawn(factors, 0.5 + seed % 7)


def put(pool: AdapterPool, name: str, adapter: Drawn, **options: Any) -> Drawn:
    pool.load(name, adapter.factors, scaling=adapter.scaling, **options)
    return adapter


def run_bytes(adapter: Drawn, itemsize: int = 4) -> int:
    """What the adapter takes in a pool: pages of 8 ranks, each factor from a multiple of 256 bytes on."""
    sizes = [(-(-a.shape[0] // 8) * 8, a.shape[1], b.shape[0]) for a, b in adapter.factors.values()]
    return sum(-(-r * side * itemsize // 256) * 256 for r, k, n in sizes for side in (k, n))


def assert_rows(pool: AdapterPool, names: Sequence[str], adapters: Mapping[str, Drawn], ids: Tensor) -> None:
    """Each row of the op over each layer is what the adapter of its name gives by itself."""
    for layer, (n, k) in pool.sizes.items():
        generator = torch.Generator().manual_seed(len(names))
        x, weight = (torch.randn(size, k, generator=generator) for size in (len(names), n))
        y = multi_lora_linear(x, weight, pool.layer(layer), None, ids)
        expected = list(F.linear(x, weight))
        for row, name in enumerate(names):
            pair = None if name == BASE_NAME else adapters[name].factors.get(layer)
            if pair is not None:
                lora_A, lora_B = (factor.to(pool.dtype).float() for factor in pair)
                expected[row] = expected[row] + adapters[name].scaling * (lora_B @ (lora_A @ x[row]))
        error = (y - torch.stack(expected)).abs().amax(1)
        assert (error < 1e-4).all(), f"{layer}: rows of {names} are off by {error.tolist()}"


def state(pool: AdapterPool) -> tuple:
    """Everything that a refused call must leave alone: counts, memory, table, names and who would be evicted first."""
    inner = pool._state
    return (
        pool.stats(), pool._memory.arena.view(torch.uint8).numpy().tobytes(), pool._memory.rows.numpy().tobytes(),
        pool.names, list(inner.idle), list(inner.copies), inner.runs.free_runs, list(inner.widths), inner.idle_bytes,
    )  # fmt: skip


def audit(pool: AdapterPool) -> None:
    """Every account agrees with every other."""
    inner, runs = pool._state, pool._state.runs
    taken = {place.start: place.layout.nbytes for place in inner.at.values()}
    assert taken == runs._taken
    assert sum(taken.values()) + runs.free == runs.size == sum(taken.values()) + sum(size for _, size in runs.free_runs)
    slots = [place.slot for place in inner.at.values()]
    assert sorted(slots + inner.free_slots) == list(range(inner.slots))
    assert inner.idle_bytes == sum(known.place.layout.nbytes for known in inner.idle.values())
    for name, known in inner.known.items():
        idle = known.place is not None and not known.pinned and not known.place.holds
        assert known.name == name
        assert (name in inner.idle) == idle
        assert (known.copy is not None) == (name in inner.copies)
    assert inner.held == {place for place in inner.at.values() if place.holds}
    assert inner.host_bytes == sum(known.copy.blob.nbytes for known in inner.known.values() if known.copy)
    assert inner.pinned == sum(known.pinned for known in inner.known.values())
    for slot in inner.free_slots:
        assert not inner.memory.rows[slot].any()
