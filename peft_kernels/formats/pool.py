"""Device memory for many adapters: `AdapterPool`."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.checks import FLOATS, MAX_RANK, check_rank
from peft_kernels.formats import _pool_files
from peft_kernels.formats._open_ids import BASE_NAME, OpenIds
from peft_kernels.formats._pool_device import Memory
from peft_kernels.formats._pool_files import ALIGN, Packed, Scalings, Sizes, some
from peft_kernels.formats._pool_memory import Runs
from peft_kernels.formats._pool_residency import (
    AdapterInUseError,
    Known,
    Place,
    PoolError,
    PoolFullError,
    PoolStats,
    Residency,
    UnknownAdapterError,
    place_of,
    unfinished,
)
from peft_kernels.formats.adapter_table import BASE, PoolAdapters
from peft_kernels.formats.strict_json import short

__all__ = [
    "BASE_NAME",
    "AdapterInUseError",
    "AdapterPool",
    "PoolError",
    "PoolFullError",
    "PoolLayer",
    "PoolStats",
    "UnknownAdapterError",
]


class PoolLayer(NamedTuple):
    """One layer of a pool, in the place of factors for `multi_lora_linear`. `position`: its place in the table."""

    pool: AdapterPool
    name: str
    position: int


class AdapterPool:
    """Adapters of any ranks for the layers of one model, in device memory of a fixed size.

    Adapters have names. Those that were used last are in device memory, the others as copies on the host, from which
    `ids` brings them back; whose copy is gone too is read again from its folder, if it came from one. Room is made by
    evicting the adapter that nobody used for longest, and by moving others together where the free bytes are scattered.
    An adapter is one run of memory in pages of 8 ranks, and its rows of the table that kernels read are written by one
    copy: on a stream a kernel sees all of an adapter or nothing of it, a captured CUDA graph included, which reads the
    table at every replay.

        pool = AdapterPool.for_model(model, budget=4 * 2**30)
        pool.load("anna", "adapters/anna")
        with pool.use(["anna", "__base__", "ben"]) as adapter_ids:
            y = multi_lora_linear(x, weight, pool.layer("model.layers.0.self_attn.q_proj"), None, adapter_ids)

    Every method may be called from several threads; files are read outside the lock. Ids that `ids` returned are valid
    until the pool has to make room, those of `use` as long as the block is open: a thread that computes while others
    load needs `use`. An adapter that is loaded anew under its name keeps its id; only blocks that are open go on with
    the old one, under the id they have.

    On a GPU, work goes to the current stream of the calling thread, nothing waits for the GPU, and `prefetch` uses a
    stream of its own. Ids are for the stream that was current when they were asked for; other streams that read the
    pool must be joined with it (`wait_stream`) before the block ends. On a stream that captures a graph, methods that
    bring in or evict adapters raise RuntimeError, and other threads must leave the pool alone meanwhile. A graph is for
    ids that stay: of pinned adapters, which a replacement reaches, or of a `use` block around the replays, which it
    does not. On a CPU everything is synchronous, `prefetch` too.

    A pool that is loaded or evicted between a forward and its backward makes the backward raise, as any tensor does
    that is written to in place. `copy.deepcopy` of a model that uses a pool shares the pool; pickling one is refused.

    Args:
        layers: {name: (out_features, in_features)}, named as in the model (PEFT's names without "base_model.model.").
        budget: bytes of device memory for adapters; taken at once. The table takes slots x layers x 32 bytes besides,
            and moving overlapping bytes up to 4 MiB for a moment.
        slots: the most adapters in device memory at a time.
        dtype: what adapters are held in; float32 is PEFT's default, also over a model of 16 bits.
        device: of the model's weights.
        host_budget: bytes for copies on the host (beside a pool on a CPU too), the least recently used being dropped
            first; None for no limit. An adapter given as tensors whose copy is dropped is unknown once it is evicted.
        max_rank: the largest rank that is accepted. Given, it is also the rank that kernels are launched for, so that a
            captured graph is right for every adapter that is loaded later; None is the largest rank loaded so far.

    Raises:
        ValueError: no layers, a size, rank, dtype or number out of range.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        layers: Sizes,
        *,
        budget: int,
        slots: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        host_budget: int | None = None,
        max_rank: int | None = None,
    ) -> None:
        self.sizes = _checked_sizes(layers)
        _check_count("budget", budget, ALIGN)
        _check_count("slots", slots, 1)
        if host_budget is not None:
            _check_count("host_budget", host_budget, 0)
        if max_rank is not None:
            check_rank("AdapterPool", "max_rank", max_rank)
        if dtype not in FLOATS:
            raise ValueError(f"AdapterPool: dtype is {dtype}; expected float32, float16, bfloat16 or float64")
        self.dtype, self.device, self.budget, self.host_budget = dtype, _checked_device(device), budget, host_budget
        self.max_rank = MAX_RANK if max_rank is None else max_rank
        self._positions = {name: i for i, name in enumerate(self.sizes)}
        self._size_list = list(self.sizes.values())
        runs = Runs(budget // ALIGN * ALIGN)
        self._memory = Memory(runs.size, slots, len(self.sizes), dtype, self.device)
        widths = [1 if max_rank is None else max_rank] * len(self.sizes)
        self._state = Residency(runs, self._memory, slots, host_budget, widths, max_rank is not None)
        self._lock = threading.RLock()
        self._open = OpenIds()

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        budget: int,
        target_modules: Iterable[str] | str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> AdapterPool:
        """A pool for the linear layers of a model: dense, in 4 bits, or adapted by this library or by PEFT.

        Args:
            model: plain, quantised, adapted, wrapped by DDP or compiled.
            budget: as for the class.
            target_modules: which layers, as in `add_lora`; None for all of them. Layers that no adapter uses cost 32
                bytes a slot.
            dtype: as for the class; None for that of the weights (of those that 4-bit weights were quantised from).
            device: as for the class; None for that of the weights.
            options: slots, host_budget, max_rank.

        Raises:
            ValueError: no layer is meant, or weights are on several devices or of several dtypes and `device` or
                `dtype` do not say which.
            TypeError: `model` is no module.
        """
        from peft_kernels.nn._pool_sites import pool_sites  # modules are above this layer

        layers = pool_sites(model, target_modules)
        where = "AdapterPool.for_model"
        dtype = _only(where, "dtype", {site.dtype for site in layers.values()}) if dtype is None else dtype
        device = _only(where, "device", {site.device for site in layers.values()}) if device is None else device
        sizes = {name: site.size for name, site in layers.items()}
        return cls(sizes, budget=budget, dtype=dtype, device=device, **options)

    def load(
        self,
        name: str,
        source: str | os.PathLike | Mapping[str, tuple[Tensor, Tensor]],
        *,
        lora_alpha: Scalings | None = None,
        scaling: Scalings | None = None,
        pin: bool = False,
    ) -> None:
        """Loads an adapter into device memory, evicting others where there is no room.

        A name that is there is replaced, in one piece, once the new adapter is complete; its id stays, unless a `use`
        block that is open holds it. Everything is checked before anything changes.

        Args:
            name: what `ids` knows it by; not "__base__".
            source: a folder that PEFT or `save_adapter` wrote (safetensors only); or {layer: (A [r, in_features],
                B [out_features, r])}, in any floating dtype and on any device. Layers that it lacks get no update.
            lora_alpha: with tensors, scaling = lora_alpha / r; one for all layers or {layer: lora_alpha}.
            scaling: with tensors, in place of lora_alpha.
            pin: keep it in device memory; see `pin`.

        Raises:
            FileNotFoundError: a file is missing.
            PoolFullError: there is no room for it.
            ValueError: a file is wrong, holds more than plain LoRA on linear layers (DoRA, biases, embeddings), or a
                layer, shape, rank or value does not fit.
            TypeError: an argument of the wrong type.
        """
        where = f"AdapterPool.load: {_checked_name(name)}"
        folder = None
        if isinstance(source, (str, os.PathLike)):
            if lora_alpha is not None or scaling is not None:
                raise TypeError(f"{where}: scaling and lora_alpha go with tensors; a folder has its own")
            folder = os.path.abspath(source)
            packed = self._read(folder)
        elif isinstance(source, Mapping):
            factors = _pool_files.from_tensors(where, source, scaling, lora_alpha, self.sizes, self.max_rank)
            packed = _pool_files.pack(where, factors, self.sizes, self.dtype, self._memory.on_gpu)
        else:
            raise TypeError(f"{where}: got {type(source).__name__}; expected a folder or {{layer: (A, B)}}")
        with self._lock:
            self._memory.check_not_capturing("AdapterPool.load")
            self._state.replace(where, Known(name, folder, pinned=pin), packed)

    def ids(self, names: Sequence[str]) -> Tensor:
        """The adapter ids of these names, bringing back those that were evicted.

        Args:
            names: one for each row or sample; "__base__" for no adapter.

        Returns:
            int64 [len(names)] on the pool's device, -1 for "__base__". Valid until the pool has to make room: see
            `use`.

        Raises:
            UnknownAdapterError: a name that the pool does not know; nothing is brought back then.
            PoolFullError: they do not fit at once, beside what is pinned or in use.
            FileNotFoundError, ValueError: a folder that is read again is gone or wrong.
        """
        held, ids = self._hold("ids", names, keep=False)
        self._release(held)
        return ids

    @contextlib.contextmanager
    def use(self, names: Sequence[str]) -> Iterator[Tensor]:
        """A block in which these adapters stay where they are, with the ids of `ids`, which modules find as
        `active_ids`.

        Args, yields and raises as `ids`.
        """
        held, ids = self._hold("use", names)
        try:
            with self._open.opened(ids):
                yield ids
        finally:
            self._release(held)

    @property
    def active_ids(self) -> Tensor | None:
        """The ids of the innermost `use` block that this thread has open, or None."""
        return self._open.active

    def prefetch(self, names: Sequence[str]) -> None:
        """Brings evicted adapters back, on a GPU on a stream of its own while the current one computes.

        Args and raises as `ids`. Names that are in device memory already count as used.
        """
        held, _ = self._hold("prefetch", names, side=True)
        self._release(held)

    def evict(self, name: str) -> None:
        """Takes an adapter out of device memory; one that is not there is left alone. It stays known as long as it has
        a copy on the host or a folder.

        Raises:
            UnknownAdapterError: the pool does not know it.
            AdapterInUseError: it is pinned or in use.
        """
        with self._lock:
            self._state.evict(self._free_to_go("evict", name))

    def remove(self, name: str) -> None:
        """Evicts an adapter and forgets it, with its copy on the host.

        Raises:
            UnknownAdapterError, AdapterInUseError: as `evict`.
        """
        with self._lock:
            self._state.remove(self._free_to_go("remove", name))

    def pin(self, name: str) -> None:
        """Keeps an adapter in device memory, bringing it back if need be, until `unpin`. Pinning twice is as once.

        Raises:
            As `ids`.
        """
        held, _ = self._hold("pin", [name])
        with self._lock:
            for place in held:
                self._state.set_pinned(place.known, True)
            self._state.release(held)

    def unpin(self, name: str) -> None:
        """Lets go of an adapter that `pin`, or `load` with pin=True, keeps. One that is not pinned is left alone.

        Raises:
            UnknownAdapterError: the pool does not know it.
        """
        with self._lock:
            self._state.set_pinned(self._find("unpin", name), False)

    def layer(self, name: str) -> PoolLayer:
        """One layer, as `multi_lora_linear` takes it for `lora_As`.

        Raises:
            PoolError: the pool has no such layer.
        """
        position = self._positions.get(name)
        if position is None:
            raise PoolError(f"AdapterPool.layer: no layer {short(name)}; {some(self.sizes, 'layer')}")
        return PoolLayer(self, name, position)

    def adapters(self, layers: Sequence[PoolLayer]) -> PoolAdapters:
        """What the op takes: the adapters of these layers."""
        positions = [layer.position for layer in layers]
        sizes, widths, memory = self._size_list, self._state.widths, self._memory
        return PoolAdapters(
            memory.arena, memory.rows, memory.host_rows, positions, [sizes[p] for p in positions],
            [widths[p] for p in positions],
        )  # fmt: skip

    @property
    def names(self) -> list[str]:
        """Of all adapters that the pool knows, in device memory or not, in the order in which they were first
        loaded."""
        with self._lock:
            return list(self._state.known)

    def __len__(self) -> int:
        return len(self._state.known)

    def __contains__(self, name: object) -> bool:
        return name in self._state.known

    def stats(self) -> PoolStats:
        """What is where, and what was done so far."""
        with self._lock:
            return self._state.stats()

    def __repr__(self) -> str:
        s = self.stats()
        return (
            f"AdapterPool({len(self.sizes)} layers, {s.resident} of {s.adapters} adapters in device memory, "
            f"{s.bytes_used:,} of {s.budget:,} bytes, {self.dtype}, {self.device})"
        )

    def __copy__(self) -> AdapterPool:
        return self

    def __deepcopy__(self, memo: dict) -> AdapterPool:
        return self

    def __reduce__(self):
        raise TypeError(
            "an AdapterPool cannot be pickled: it stands for device memory of this process; make one where the model "
            "is loaded, and load the adapters there"
        )

    def _read(self, folder: str) -> Packed:
        factors = _pool_files.from_folder(folder, self.sizes, self.max_rank)
        return _pool_files.pack(folder, factors, self.sizes, self.dtype, self._memory.on_gpu)

    def _find(self, method: str, name: str) -> Known:
        known = self._state.known.get(name) if isinstance(name, str) else None
        if known is None:
            where = f"AdapterPool.{method}"
            raise UnknownAdapterError(f"{where}: no adapter {short(name)}; {some(self._state.known, 'adapter')}")
        return known

    def _free_to_go(self, method: str, name: str) -> Known:
        self._memory.check_not_capturing(f"AdapterPool.{method}")
        known = self._find(method, name)
        if known.pinned:
            raise AdapterInUseError(f"AdapterPool.{method}: {short(name)} is pinned; unpin it first")
        if known.place is not None and known.place.holds:
            holds = known.place.holds
            raise AdapterInUseError(
                f"AdapterPool.{method}: {short(name)} is in use by {holds} open block{'s' * (holds != 1)} of `use`"
            )
        return known

    def _hold(
        self, method: str, names: Sequence[str], *, side: bool = False, keep: bool = True
    ) -> tuple[list[Place], Tensor]:
        """Brings what is missing into device memory and keeps all of it there until it is released. Without `keep`
        nothing need be kept where nothing was missing."""
        if isinstance(names, str):
            raise TypeError(f"AdapterPool.{method}: names is {short(names)}; expected a sequence of names")
        read: dict[Known, Packed] = {}
        while True:
            with self._lock:
                self._memory.check_not_capturing(f"AdapterPool.{method}")
                wanted = {name: self._find(method, name) for name in names if name != BASE_NAME}
                sources = {k: k.copy or read.get(k) for k in wanted.values() if k.place is None}
                unread = [known for known, packed in sources.items() if packed is None]
                if not unread:
                    return self._hold_found(method, names, wanted, sources, side, keep)
            for known in unread:  # outside the lock: others compute meanwhile
                assert known.folder is not None
                read[known] = self._read(known.folder)

    def _hold_found(self, method, names, wanted, sources, side, keep) -> tuple[list[Place], Tensor]:
        state, found = self._state, list(wanted.values())
        held: list[Place] = []
        if keep or sources:
            held = state.hold_all(f"AdapterPool.{method}", found, sources, side)
        else:
            state.touch(found)
        if side:
            state.counts["prefetches"] += len(sources)
        else:
            state.counts["misses"] += len(sources)
            state.counts["hits"] += len(wanted) - len(sources)
            self._memory.reading(unfinished([place_of(known) for known in found]))
        slots = [BASE if name == BASE_NAME else place_of(wanted[name]).slot for name in names]
        return held, self._memory.ids(slots)

    def _release(self, held: list[Place]) -> None:
        if held:
            with self._lock:
                self._state.release(held)


def _checked_sizes(layers: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(layers, Mapping):
        raise TypeError(
            f"AdapterPool: layers is {type(layers).__name__}; expected {{name: (out_features, in_features)}}"
        )
    if not layers:
        raise ValueError("AdapterPool: layers is empty; expected {name: (out_features, in_features)}")
    sizes = {}
    for name, size in layers.items():
        whole = isinstance(size, Sequence) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)
        if not isinstance(name, str) or not name or not whole:
            raise ValueError(
                f"AdapterPool: layers has {short(name)}: {short(size)}; expected a name and (out_features, in_features)"
            )
        sizes[name] = (size[0], size[1])
    return sizes


def _check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"AdapterPool: {name} is {short(value)}; expected an integer")
    if value < least:
        raise ValueError(f"AdapterPool: {name} is {value}; expected at least {least}")


def _checked_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"AdapterPool: device is {device}; expected a CPU or a CUDA device")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _checked_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"AdapterPool.load: name is {short(name)}; expected a string")
    if not name or name == BASE_NAME:
        raise PoolError(
            f"AdapterPool.load: name is {short(name)}; expected one that is neither empty nor {BASE_NAME!r}"
        )
    return short(name)


def _only(where: str, what: str, found: set) -> Any:
    if len(found) > 1:
        named = ", ".join(sorted(map(str, found)))
        raise ValueError(f"{where}: the weights have {what}s {named}; say {what}")
    return found.pop()
