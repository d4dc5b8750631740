"""`AdapterPool` on a GPU: nothing waits for it, a captured graph sees replacements, and bytes are overwritten only when
the kernels that read them are done."""

from __future__ import annotations

import threading

import pytest
import torch

from peft_kernels import AdapterPool
from peft_kernels.functional import multi_lora_linear
from tests.formats.pools import SIZES, audit, drawn, put, run_bytes
from tests.gpu.conftest import on_gpu

pytestmark = pytest.mark.gpu
DELAY = 200_000_000  # GPU clock cycles, about 0.1 s: longer than any host code below
# What reads the ids on the host waits for the GPU by itself.
EVERY = pytest.mark.parametrize(
    "backend",
    [p for p in on_gpu("multi_lora_linear") if p.values[0].name not in ("composed", "reference")]
    or on_gpu("multi_lora_linear"),
    indirect=True,
)
K, N = SIZES["up"][1], SIZES["up"][0]


def pool_of(adapters: int, **options) -> AdapterPool:
    """A pool with room for so many adapters of rank 1 to 8, in bfloat16."""
    return AdapterPool(
        SIZES, budget=adapters * run_bytes(drawn(8, 0), 2), dtype=torch.bfloat16, device="cuda", max_rank=32, **options
    )


def filled(pool: AdapterPool, names: str, r: int = 8) -> dict:
    return {name: put(pool, name, drawn(r, i)) for i, name in enumerate(names)}


def expected(adapter, x, weight):
    lora_A, lora_B = (factor.to("cuda", torch.bfloat16).float() for factor in adapter.factors["up"])
    return x.float() @ (weight.float() + adapter.scaling * lora_B @ lora_A).t()


def inputs(rows: int):
    generator = torch.Generator("cuda").manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return draw(rows, K), draw(N, K) / K**0.5


def run(pool, x, weight, ids):
    return multi_lora_linear(x, weight, pool.layer("up"), None, ids)


def assert_near(y, *rows):
    torch.testing.assert_close(y.float(), torch.stack(rows), atol=5e-2, rtol=5e-2)


@EVERY
def test_rows(backend):
    pool = pool_of(6)
    adapters = filled(pool, "abc")
    adapters["wide"] = put(pool, "wide", drawn(20, 5))
    x, weight = inputs(4)
    names = ["wide", "a", "c", "b"]
    y = run(pool, x, weight, pool.ids(names))
    assert_near(y, *(expected(adapters[name], x[i], weight) for i, name in enumerate(names)))
    assert torch.equal(pool._memory.rows.cpu(), pool._memory.host_rows)
    torch.cuda.synchronize()
    audit(pool)


def test_never_waits(no_host_sync):
    """Load, eviction, return, replacement, compaction and prefetch. The first load makes the pinned memory."""
    pool = pool_of(3)
    adapters = {name: drawn(8, i) for i, name in enumerate("abcd")}
    for name, adapter in adapters.items():
        put(pool, name, adapter)
    torch.cuda.synchronize()
    no_host_sync()
    for name, adapter in adapters.items():
        put(pool, name, adapter)
    put(pool, "wide", drawn(16, 7))
    pool.prefetch(["a"])
    pool.ids(["a", "wide"])
    pool.evict("a")


@EVERY
def test_replacement_under_a_captured_graph(backend):
    """The graph reads the table at every replay: an adapter that is loaded anew, with another rank, is in the next."""
    pool = pool_of(6)
    adapters = filled(pool, "ab", r=8)
    x, weight = inputs(2)
    ids = pool.ids(["a", "b"])
    run(pool, x, weight, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(pool, x, weight, ids)
    for r, seed in ((8, 11), (32, 12), (1, 13)):
        graph.replay()
        before = y.clone()
        new = put(pool, "a", drawn(r, seed))
        assert torch.equal(pool.ids(["a", "b"]), ids)
        graph.replay()
        assert_near(before, expected(adapters["a"], x[0], weight), expected(adapters["b"], x[1], weight))
        adapters["a"] = new
        assert_near(y, expected(adapters["a"], x[0], weight), expected(adapters["b"], x[1], weight))


def test_refused_while_a_graph_is_captured():
    pool = pool_of(3)
    filled(pool, "a")
    torch.cuda.synchronize()
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(RuntimeError, match="graph is being captured"):
            pool.ids(["a"])
        with pytest.raises(RuntimeError, match="graph is being captured"):
            pool.evict("a")


@EVERY
def test_replacement_waits_for_kernels_that_read(backend):
    """The stream is busy: kernels that were given to it before the load see the old adapter, later ones the new."""
    pool = pool_of(1)  # the new one lies where the old one does
    old = filled(pool, "a")["a"]
    x, weight = inputs(1)
    ids = pool.ids(["a"])
    run(pool, x, weight, ids)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    torch.cuda._sleep(DELAY)
    before = run(pool, x, weight, ids)
    with torch.cuda.stream(other):  # loaded elsewhere, which has nothing to do
        new = put(pool, "a", drawn(8, 9))
    after = run(pool, x, weight, ids)
    assert_near(before, expected(old, x[0], weight))
    assert_near(after, expected(new, x[0], weight))


@pytest.mark.parametrize("bring", ["prefetch", "ids", "load"])
@EVERY
def test_eviction_while_kernels_run(backend, bring):
    """What takes the place of an evicted adapter is written after the kernels that read that one."""
    pool = pool_of(1)
    adapters = {name: put(pool, name, drawn(8, i)) for i, name in enumerate("ba")}
    x, weight = inputs(1)
    ids = pool.ids(["a"])
    run(pool, x, weight, ids)
    torch.cuda.synchronize()
    torch.cuda._sleep(DELAY)
    before = run(pool, x, weight, ids)
    with torch.cuda.stream(torch.cuda.Stream()):
        if bring == "load":
            adapters["b"] = put(pool, "b", drawn(8, 8))
        else:
            getattr(pool, bring)(["b"])
    after = run(pool, x, weight, pool.ids(["b"]))
    assert_near(before, expected(adapters["a"], x[0], weight))
    assert_near(after, expected(adapters["b"], x[0], weight))


def test_prefetch_runs_beside_a_busy_stream():
    """Into memory that was free before, the transfer does not wait for what the current stream computes."""
    pool = pool_of(4)
    filled(pool, "ab")
    pool.evict("b")
    pool.ids(["a"])
    torch.cuda.synchronize()
    torch.cuda._sleep(DELAY)
    busy = torch.cuda.current_stream().record_event()
    pool.prefetch(["b"])
    pool._state.known["b"].place.ready.synchronize()
    assert not busy.query(), "the prefetch waited for the stream that computes"


@EVERY
def test_ids_wait_for_a_prefetch(backend):
    """The transfer is late, behind other work of the side stream; rows that ask for the adapter come after it."""
    pool = pool_of(4)
    adapters = filled(pool, "ab")
    x, weight = inputs(1)
    run(pool, x, weight, pool.ids(["a"]))
    pool.evict("b")
    pool._memory.arena.view(torch.int16)[run_bytes(adapters["a"], 2) // 2 :].fill_(-1)  # NaN
    torch.cuda.synchronize()
    with torch.cuda.stream(pool._memory._side):
        torch.cuda._sleep(DELAY)
    pool.prefetch(["b"])
    y = run(pool, x, weight, pool.ids(["b"]))
    assert_near(y, expected(adapters["b"], x[0], weight))


@EVERY
def test_compaction_while_kernels_run(backend):
    """An adapter that a busy stream reads is moved over itself: before, it is where it was, after, where it is."""
    pool = pool_of(6)
    put(pool, "first", drawn(8, 1))
    adapters = {"large": put(pool, "large", drawn(32, 2))}
    x, weight = inputs(2)
    ids = pool.ids(["large"])
    run(pool, x[:1], weight, ids)
    torch.cuda.synchronize()
    torch.cuda._sleep(DELAY)
    before = run(pool, x[:1], weight, ids)
    pool.remove("first")
    with torch.cuda.stream(torch.cuda.Stream()):
        adapters["wide"] = put(pool, "wide", drawn(16, 3))
    assert pool.stats().compactions == 1
    assert torch.equal(pool.ids(["large"]), ids)
    after = run(pool, x, weight, pool.ids(["large", "wide"]))
    assert_near(before, expected(adapters["large"], x[0], weight))
    assert_near(after, expected(adapters["large"], x[0], weight), expected(adapters["wide"], x[1], weight))


@EVERY
def test_threads_with_streams_of_their_own(backend):
    """Two threads bring in and run what does not fit together but for two at a time."""
    pool = pool_of(2)
    adapters = filled(pool, "abcdef")
    x, weight = inputs(1)
    truths = {name: expected(adapter, x[0], weight) for name, adapter in adapters.items()}
    torch.cuda.synchronize()
    failures = []

    def work(names: str) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                results = []
                for i in range(150):
                    name = names[i % 3]
                    with pool.use([name]) as ids:
                        results.append((name, run(pool, x, weight, ids)))
                for name, y in results:
                    assert_near(y, truths[name])
        except BaseException as error:  # told in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(names,)) for names in ("abc", "def")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    audit(pool)
