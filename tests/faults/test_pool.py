"""What an `AdapterPool` refuses, with every byte, row and count as it was; and threads that meet in one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch

from peft_kernels import AdapterPool
from peft_kernels.formats.peft_adapter import write_adapter
from peft_kernels.formats.pool import AdapterInUseError, PoolError, PoolFullError, UnknownAdapterError
from peft_kernels.functional import multi_lora_linear
from tests.adapter_files import (
    SPOILED,
    WEIGHTS,
    Spoiled,
    base_model,
    good_config,
    good_tensors,
    write_folder,
)
from tests.formats.pools import SIZES, assert_rows, audit, drawn, put, run_bytes, state

SMALL = run_bytes(drawn(8, 0))


def file_pool(tmp_path) -> AdapterPool:
    """For the layers of the good adapter, which it holds under its name, beside one that may be evicted."""
    pool = AdapterPool.for_model(base_model(), budget=2048)
    pool.load("idle", {"first": (torch.ones(1, 6), torch.ones(5, 1))}, scaling=1.0)
    pool.load("good", write_folder(tmp_path / "good"))
    return pool


@pytest.mark.parametrize("case", SPOILED, ids=lambda case: case.id)
def test_spoiled_files(tmp_path, case: Spoiled):
    """Each way to spoil a folder, loaded as a new adapter and in place of a good one."""
    pool = file_pool(tmp_path)
    before = state(pool)
    folder = write_folder(tmp_path / "bad")
    case.spoil(folder)
    for name in ("new", "good"):
        with pytest.raises(case.error) as caught:
            pool.load(name, folder)
        assert type(caught.value) is case.error
        assert state(pool) == before


def lora(n: int, k: int, r: int = 2) -> dict[str, torch.Tensor]:
    return {"lora_A": torch.ones(r, k), "lora_B": torch.ones(n, r)}


class Folder(NamedTuple):
    """A sound folder that does not fit the pool."""

    id: str
    layers: dict[str, dict[str, torch.Tensor]]
    mentions: str
    config: dict[str, Any] | None = None


FOLDERS = [
    Folder("unknown layer", {"third": lora(5, 6)}, r"the pool has no layer 'third'; its layers are 'first', 'second'"),
    Folder("wide", {"first": lora(5, 7)}, r"'first' has lora_A of shape \(2, 7\).*\(5, 6\); expected \(2, 6\)"),
    Folder("tall", {"first": lora(6, 6)}, r"'first' has lora_B of shape \(6, 2\).*\(5, 6\); expected \(5, 2\)"),
    Folder(
        "rank", {"first": lora(5, 6, 20)}, r"'first' has rank 20; expected at most the pool's max_rank, 16", {"r": 20}
    ),
    Folder("DoRA", {"first": {**lora(5, 6), "lora_magnitude_vector": torch.ones(5)}}, "DoRA", {"use_dora": True}),
    Folder("bias", {"first": {**lora(5, 6), "lora_bias": torch.ones(5)}}, "lora_bias", {"lora_bias": True}),
    Folder("trained bias", {"first": {**lora(5, 6), "bias": torch.ones(5)}}, "trained bias", {"bias": "lora_only"}),
    Folder(
        "embedding",
        {"first": {"lora_embedding_A": torch.ones(2, 6), "lora_embedding_B": torch.ones(5, 2)}},
        "embedding",
    ),
]


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case.id)
def test_folders_that_do_not_fit(tmp_path, case: Folder):
    pool = AdapterPool({"first": (5, 6), "second": (4, 5)}, budget=4096, max_rank=16)
    pool.load("good", write_folder(tmp_path / "good"))
    before = state(pool)
    config = good_config(target_modules=list(case.layers), **(case.config or {}))
    write_adapter(tmp_path / "bad", config, case.layers)
    with pytest.raises(ValueError, match=case.mentions) as caught:
        pool.load("good", tmp_path / "bad")
    assert WEIGHTS in str(caught.value)
    assert state(pool) == before


A, B = torch.ones(2, 16), torch.ones(24, 2)
TENSORS: list[tuple[str, type[Exception], Any, dict[str, Any], str]] = [
    ("no layers", ValueError, {}, {"scaling": 1.0}, "holds no layers"),
    ("unknown layer", ValueError, {"left": (A, B)}, {"scaling": 1.0}, "no layer 'left'; its layers are 'up', 'down'"),
    ("wide", ValueError, {"up": (torch.ones(2, 17), B)}, {"scaling": 1.0}, r"\(2, 17\).*16 input features"),
    ("tall", ValueError, {"up": (A, torch.ones(23, 2))}, {"scaling": 1.0}, r"\(23, 2\).*24 output features"),
    ("two ranks", ValueError, {"up": (A, torch.ones(24, 3))}, {"scaling": 1.0}, "rank 2"),
    ("rank 0", ValueError, {"up": (A[:0], B[:, :0])}, {"scaling": 1.0}, "1 <= r <= 512"),
    ("rank over max_rank", ValueError, {"up": (torch.ones(9, 16), torch.ones(24, 9))}, {"scaling": 1.0}, "rank 9.* 8"),
    ("integers", TypeError, {"up": (A.int(), B.int())}, {"scaling": 1.0}, "torch.int32"),
    ("two dtypes", TypeError, {"up": (A, B.half())}, {"scaling": 1.0}, "expected the same"),
    ("no pair", TypeError, {"up": A}, {"scaling": 1.0}, r"expected \(A, B\)"),
    ("no tensors", TypeError, {"up": (1, 2)}, {"scaling": 1.0}, "torch.Tensor"),
    ("meta", ValueError, {"up": (A.to("meta"), B.to("meta"))}, {"scaling": 1.0}, "no values"),
    ("NaN", ValueError, {"up": (A * float("nan"), B)}, {"scaling": 1.0}, "A of 'up' holds non-finite"),
    ("infinite", ValueError, {"up": (A, B * float("inf"))}, {"scaling": 1.0}, "B of 'up' holds non-finite"),
    (
        "too large",
        ValueError,
        {"up": (A, B * 1e5)},
        {"scaling": 1.0},
        "B of 'up'.*too large for the pool's torch.float16",
    ),
    ("no scaling", TypeError, {"up": (A, B)}, {}, "either scaling or lora_alpha"),
    ("both", TypeError, {"up": (A, B)}, {"scaling": 1.0, "lora_alpha": 2}, "either scaling or lora_alpha"),
    ("scaling NaN", ValueError, {"up": (A, B)}, {"scaling": float("nan")}, "scaling is nan"),
    ("scaling huge", ValueError, {"up": (A, B)}, {"scaling": 1e39}, "expected one of float32"),
    ("scaling text", TypeError, {"up": (A, B)}, {"lora_alpha": "16"}, "expected a number"),
    ("other layers", ValueError, {"up": (A, B)}, {"scaling": {"down": 1.0}}, "name different layers"),
    ("a list", TypeError, [(A, B)], {"scaling": 1.0}, "expected a folder or"),
    ("folder with scaling", TypeError, "folder", {"scaling": 1.0}, "a folder has its own"),
]


@pytest.mark.parametrize(
    ("error", "source", "options", "mentions"), [c[1:] for c in TENSORS], ids=[c[0] for c in TENSORS]
)
def test_tensors_that_do_not_fit(error, source, options, mentions):
    pool = AdapterPool(SIZES, budget=2 * SMALL, dtype=torch.float16, max_rank=8)
    put(pool, "one", drawn(4, 1))
    before = state(pool)
    for name in ("one", "new"):
        with pytest.raises(error, match=mentions):
            pool.load(name, source, **options)
    assert state(pool) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_value_anywhere_that_is_not_finite(dtype, value):
    pool = AdapterPool(SIZES, budget=4 * SMALL, dtype=dtype)
    for i in range(24):
        adapter = drawn(9, i)
        adapter.factors["down"][i % 2].view(-1)[37 * i % 140] = value
        with pytest.raises(ValueError, match=f"{'AB'[i % 2]} of 'down' holds non-finite"):
            put(pool, "a", adapter)
    assert len(pool) == 0


class TestRoom:
    def pool(self, **options) -> AdapterPool:
        pool = AdapterPool(SIZES, budget=3 * SMALL, **options)
        for i, name in enumerate("abc"):
            put(pool, name, drawn(4, i))
        return pool

    def test_budget_too_small_for_one(self):
        """Says what is needed and what there is, and evicts nobody for it."""
        pool = self.pool()
        before, wide = state(pool), drawn(32, 1)
        for name in ("a", "new"):
            with pytest.raises(PoolFullError, match=rf"needs {run_bytes(wide):,} bytes.*budget is {3 * SMALL:,} bytes"):
                put(pool, name, wide)
        assert state(pool) == before

    def test_all_pinned_or_in_use(self):
        pool = self.pool()
        pool.pin("a")
        pool.pin("b")
        with pool.use(["c"]):
            before = state(pool)
            with pytest.raises(PoolFullError, match="3 adapters are pinned or in use: 'a', 'b', 'c'"):
                put(pool, "new", drawn(4, 4))
            with pytest.raises(PoolFullError, match="in use"):
                put(pool, "c", drawn(4, 4))
            assert state(pool) == before
        put(pool, "new", drawn(4, 4))

    def test_all_slots_taken(self):
        """With bytes to spare. A slot that can be had by evicting is."""
        pool = AdapterPool(SIZES, budget=9 * SMALL, slots=2)
        for i, name in enumerate("abc"):
            put(pool, name, drawn(4, i))
        assert pool.stats().evictions == 1
        pool.pin("c")
        with pool.use(["b"]):
            before = state(pool)
            with pytest.raises(PoolFullError, match=r"1 of the 2 slots; .* bytes and 0 slots are free"):
                put(pool, "d", drawn(4, 1))
            assert state(pool) == before

    def test_more_at_once_than_there_is_room_for(self):
        pool = self.pool()
        put(pool, "d", drawn(4, 4))
        before = state(pool)
        with pytest.raises(PoolFullError, match=r"AdapterPool.ids: needs 2,560 bytes"):
            pool.ids(["d", "c", "b", "a"])  # nor does who was used last change
        assert state(pool) == before
        assert pool.ids(["a", "b", "c"]).unique().numel() == 3

    @pytest.mark.parametrize("method", ["evict", "remove"])
    def test_eviction_of_what_is_needed(self, method):
        pool = self.pool()
        pool.pin("a")
        with pool.use(["b"]), pool.use(["b"]):
            before = state(pool)
            with pytest.raises(AdapterInUseError, match="'a' is pinned; unpin it first"):
                getattr(pool, method)("a")
            with pytest.raises(AdapterInUseError, match="'b' is in use by 2 open blocks"):
                getattr(pool, method)("b")
            assert state(pool) == before
        getattr(pool, method)("b")

    def test_a_block_that_raises_lets_go(self):
        pool = self.pool()
        with pytest.raises(KeyError), pool.use(["a"]):
            raise KeyError
        assert pool.stats().in_use == 0
        assert pool.active_ids is None
        pool.evict("a")


class TestNames:
    @pytest.mark.parametrize("method", ["ids", "prefetch", "use", "evict", "remove", "pin", "unpin"])
    def test_unknown(self, method):
        """F50: an unknown name is no other user's adapter. Nothing is brought back for the others."""
        pool = AdapterPool(SIZES, budget=9 * SMALL)
        for i in range(8):
            put(pool, f"n{i}", drawn(1, i))
        pool.evict("n0")
        before = state(pool)
        names: Any = "ghost" if method in ("evict", "remove", "pin", "unpin") else ["n0", "ghost"]
        call = pool.use(names).__enter__ if method == "use" else lambda: getattr(pool, method)(names)
        with pytest.raises(UnknownAdapterError, match=rf"{method}.*'ghost'; .*'n0', .*'n4' and 3 more"):
            call()
        assert state(pool) == before

    def test_of_no_adapter(self):
        pool = AdapterPool(SIZES, budget=SMALL)
        for name in ("", "__base__"):
            with pytest.raises(PoolError, match="expected one that is neither empty nor"):
                put(pool, name, drawn(1, 1))
        with pytest.raises(TypeError, match="expected a string"):
            put(pool, 3, drawn(1, 1))
        with pytest.raises(TypeError, match="expected a sequence of names"):
            pool.ids("abc")
        with pytest.raises(UnknownAdapterError, match="it has no adapters"):
            pool.ids([None])
        with pytest.raises(PoolError, match="no layer 'left'; its layers are 'up', 'down'"):
            pool.layer("left")

    def test_ids_of_an_evicted_adapter_run_the_base(self):
        """F50: until the slot is given to another, which `use` prevents."""
        pool = AdapterPool(SIZES, budget=2 * SMALL)
        put(pool, "a", drawn(4, 1))
        ids = pool.ids(["a"])
        pool.evict("a")
        assert_rows(pool, ["__base__"], {}, ids)


@pytest.mark.parametrize(
    ("changes", "error", "mentions"),
    [
        ({"layers": {}}, ValueError, "layers is empty"),
        ({"layers": [3]}, TypeError, "layers is list"),
        ({"layers": {"a": (3, 0)}}, ValueError, r"'a': \(3, 0\)"),
        ({"layers": {"a": 3}}, ValueError, "'a': 3"),
        ({"budget": 100}, ValueError, "budget is 100; expected at least 256"),
        ({"budget": 1e9}, TypeError, "budget is 1000000000.0; expected an integer"),
        ({"slots": 0}, ValueError, "slots is 0; expected at least 1"),
        ({"host_budget": -1}, ValueError, "host_budget is -1"),
        ({"dtype": torch.int8}, ValueError, "dtype is torch.int8"),
        ({"device": "meta"}, ValueError, "device is meta"),
        ({"max_rank": 513}, ValueError, "max_rank is 513"),
    ],
    ids=str,
)
def test_pools_that_cannot_be(changes, error, mentions):
    arguments = {"layers": SIZES, "budget": 1024, **changes}
    with pytest.raises(error, match=mentions):
        AdapterPool(arguments.pop("layers"), **arguments)


class TestThreads:
    """Each thread does what it would do alone."""

    def run(self, *jobs: Callable[[], object]) -> None:
        with ThreadPoolExecutor(len(jobs)) as executor:
            for future in [executor.submit(job) for job in jobs]:
                future.result(timeout=120)

    def test_two_load_at_once(self, tmp_path):
        """From files and from tensors, into a pool that is too small for all of them."""
        pool = AdapterPool.for_model(base_model(), budget=8 * 1024, host_budget=30 * 1024)
        scale = {i: {key: tensor * i for key, tensor in good_tensors().items()} for i in range(1, 5)}
        folders = {i: write_folder(tmp_path / str(i), tensors=tensors) for i, tensors in scale.items()}

        def load(worker: int) -> None:
            for step in range(60):
                i = 1 + (step + worker) % 4
                pool.load(f"{worker} {step % 9}", folders[i])
                with pool.use([f"{worker} {step % 9}", "shared"]) as ids:
                    factors = pool.adapters([pool.layer("second")]).factors(0, int(ids[0]))
                    assert torch.equal(factors.A, scale[i]["base_model.model.second.lora_A.weight"])
                pool.load("shared", folders[i])

        pool.load("shared", folders[1])
        self.run(*(lambda worker=worker: load(worker) for worker in range(3)))
        assert pool.stats().loads == 361
        audit(pool)

    def test_one_loads_while_others_run(self):
        """Adapters in use are neither moved, overwritten nor mixed with those that replace them."""
        pool = AdapterPool(SIZES, budget=12 * SMALL, slots=10)
        # Whatever version of an adapter a block finds, it finds it in all layers and until its end: B = version · 1.
        weight = {layer: torch.zeros(n, k) for layer, (n, k) in SIZES.items()}
        done = threading.Event()

        def version(number: int, r: int) -> dict:
            return {
                name: (torch.full((r, k), 1 / r), torch.full((n, r), float(number))) for name, (n, k) in SIZES.items()
            }

        def load() -> None:
            for number in range(1, 400):
                pool.load(f"n{number % 7}", version(number * 7 + number % 7, 1 + number % 20), scaling=1.0)
            done.set()

        def compute() -> None:
            rounds = 0
            while not done.is_set() or rounds < 20:
                name = rounds % 7
                with pool.use([f"n{name}"]) as ids:
                    seen = set()
                    for layer, (_, k) in SIZES.items():
                        for _ in range(3):
                            y = multi_lora_linear(torch.ones(1, k) / k, weight[layer], pool.layer(layer), None, ids)
                            seen |= {round(value, 3) for value in y.flatten().tolist()}
                    assert len(seen) == 1, seen
                    assert int(seen.pop()) % 7 == name
                rounds += 1

        for i in range(7):
            pool.load(f"n{i}", version(i, 2), scaling=1.0)
        self.run(load, compute, compute)
        audit(pool)
        assert pool.stats().in_use == 0
