"""csrc/multi_lora_linear.cu on a GPU: exact sums, rows that do not depend on their batch, graphs, streams."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import _native, functional, use_backend
from peft_kernels.formats.adapter_table import ROW, AdapterLists, Table, row
from peft_kernels.kernels.cuda import multi_lora_linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_native.why_not("_cuda") is not None, reason=str(_native.why_not("_cuda"))),
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [(x, a) for x in (BF16, F16) for a in (F32, BF16, F16)]
# K, rows of B of each projection, ranks: as models have them, odd, more rows than a tile, ranks of more than one round.
SHAPES = (
    (4096, (4096, 1024, 1024), (16, 8, None, 12)),
    (4096, (14336, 14336), (16, 16)),
    (14336, (4096,), (32, 16, 24)),
    (4096, (4096,), (64, 40, 8, 3)),
    (137, (71, 9), (16, 5, 3)),
    (1, (1,), (1, 2)),
    (520, (4616,), (300, 17, 512)),
)


def integers(rows: int, columns: int, most: int, dtype: torch.dtype, draw: torch.Generator) -> torch.Tensor:
    return torch.randint(-most, most + 1, (rows, columns), device="cuda", generator=draw).to(dtype)


def adapters_of(k, ns, ranks, dtype: torch.dtype, seed: int = 1, *, normal: bool = False) -> AdapterLists:
    draw = torch.Generator("cuda").manual_seed(seed)
    present = [(a, r, j, n) for a, r in enumerate(ranks) if r is not None for j, n in enumerate(ns)]

    def factor(rows, columns):
        if normal:
            return (torch.randn(rows, columns, device="cuda", generator=draw) / 16).to(dtype)
        return integers(rows, columns, 1, dtype, draw)

    return AdapterLists(
        [factor(r, k) for _, r, _, _ in present], [factor(n, r) for _, r, _, n in present],
        [j for *_, j, _ in present], [a for a, *_ in present], [(0.5, 1.0, 2.0, -1.0)[a % 4] for a, *_ in present],
        [max(r or 1 for r in ranks)] * len(ns), len(ranks),
    )  # fmt: skip


def expected(ys, x, adapters, ids, mix) -> list[torch.Tensor]:
    results = []
    for j, y in enumerate(ys):
        total = y.double()
        for adapter in range(adapters.count):
            factors = adapters.factors(j, adapter)
            if factors is None:
                continue
            weight = (ids == adapter) * (1.0 if mix is None else mix.double())
            update = (x.double() @ factors.A.double().t()) @ factors.B.double().t()
            total += factors.scaling * weight.double().sum(1, keepdim=True) * update
        results.append(total.to(y.dtype))
    return results


def updated(ys, x, adapters, ids, mix=None) -> list[torch.Tensor]:
    ys = [y.clone() for y in ys]
    multi_lora_linear.add_updates(ys, x, adapters, ids, mix)
    return ys


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("per_row", [1, 3])
@pytest.mark.parametrize("m", [1, 7, 64, 256])
def test_exact_sums(m, per_row, dtypes):
    """Sums of small integers are exact in float32 in any order; x is mostly zeros, so that they stay small."""
    for k, ns, ranks in SHAPES:
        draw = torch.Generator("cuda").manual_seed(m)
        adapters = adapters_of(k, ns, ranks, dtypes[1])
        x = integers(m, k, 2, dtypes[0], draw) * (torch.rand(m, k, device="cuda", generator=draw) < 16 / k)
        ys = [integers(m, n, 60, dtypes[0], draw) for n in ns]
        ids = torch.randint(-2, len(ranks) + 2, (m, per_row), device="cuda", generator=draw)
        choices = torch.tensor([0.5, 1.0, -2.0], device="cuda")
        mix = choices[torch.randint(0, 3, ids.shape, device="cuda", generator=draw)] if per_row > 1 else None
        assert same(updated(ys, x, adapters, ids, mix), expected(ys, x, adapters, ids, mix)), (k, ns, ranks)


def spread(m=256, k=4096, ns=(4096, 1024), ranks=(16,) * 50, dtype=BF16):
    draw = torch.Generator("cuda").manual_seed(3)
    adapters = adapters_of(k, ns, ranks, dtype, normal=True)
    x = torch.randn(m, k, device="cuda", generator=draw).to(dtype)
    ys = [torch.randn(m, n, device="cuda", generator=draw).to(dtype) for n in ns]
    return ys, x, adapters, torch.randint(-1, len(ranks), (m, 1), device="cuda", generator=draw)


def test_a_row_does_not_depend_on_its_batch():
    ys, x, adapters, ids = spread()
    whole = updated(ys, x, adapters, ids)
    for rows in (slice(0, 1), slice(5, 7), slice(100, 164)):
        alone = updated([y[rows] for y in ys], x[rows], adapters, ids[rows])
        assert same(alone, [y[rows] for y in whole])


def test_the_same_bits_every_time():
    """Another kernel runs beside it; a block that read sums too early would differ at some time."""
    ys, x, adapters, ids = spread()
    first, noise, side = updated(ys, x, adapters, ids), torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(side):
            torch.mm(noise, noise)
        assert same(updated(ys, x, adapters, ids), first)


@pytest.mark.parametrize("layout", ["rows", "columns", "offset", "expanded"])
def test_strides_of_x(layout):
    draw = torch.Generator("cuda").manual_seed(4)
    x = {
        "rows": integers(16, 96, 2, BF16, draw)[::2],
        "columns": integers(96, 8, 2, BF16, draw).t(),
        "offset": integers(8, 101, 2, BF16, draw)[:, 3:99],
        "expanded": integers(1, 96, 2, BF16, draw).expand(8, 96),
    }[layout]
    adapters, ids = (
        adapters_of(96, (72,), (8, 5), BF16),
        torch.tensor([0, 1, -1, 1, 0, 0, 1, 5], device="cuda")[:, None],
    )
    ys = [integers(8, 72, 60, BF16, draw)]
    assert same(updated(ys, x, adapters, ids), expected(ys, x, adapters, ids, None))


def test_replays_of_a_graph_with_other_ids_and_another_adapter(no_host_sync):
    """What the launch reads on the device may change between replays: ids, and a row of the table."""
    k, n, ranks = 1024, 512, (16, 8, 64, 4)
    adapters, other = adapters_of(k, (n,), ranks, BF16), adapters_of(k, (n,), (40,) * 4, BF16, seed=9)
    draw = torch.Generator("cuda").manual_seed(5)
    x = integers(8, k, 2, BF16, draw) * (torch.rand(8, k, device="cuda", generator=draw) < 0.02)
    base, y = [integers(8, n, 60, BF16, draw)], torch.empty(8, n, dtype=BF16, device="cuda")
    ids = torch.randint(-1, 4, (8, 1), device="cuda", generator=draw)
    table = adapters.table(x.device)
    held = _Held(adapters, table)
    replaced = bytearray(ROW.size)
    ROW.pack_into(replaced, 0, *row(other.lora_As[1], other.lora_Bs[1], 2.0))
    replacement = torch.frombuffer(replaced, dtype=torch.int64).cuda()

    def call() -> None:
        y.copy_(base[0])
        multi_lora_linear.add_updates([y], x, held, ids, None)

    call()
    torch.cuda.synchronize()
    no_host_sync()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    torch.cuda.set_sync_debug_mode(0)
    graph.replay()
    assert same([y], expected(base, x, adapters, ids, None))
    ids.copy_(torch.tensor([1, 1, 3, -1, 2, 0, 1, 3], device="cuda")[:, None])
    graph.replay()
    assert same([y], expected(base, x, adapters, ids, None))
    table.rows[1, 0] = replacement
    adapters.lora_As[1], adapters.lora_Bs[1], adapters.scalings[1] = other.lora_As[1], other.lora_Bs[1], 2.0
    graph.replay()
    assert same([y], expected(base, x, adapters, ids, None))


class _Held:
    """Adapters whose table is one tensor, as a pool's is."""

    def __init__(self, adapters: AdapterLists, table: Table) -> None:
        self.count, self.dtype, self.widths, self._table = adapters.count, adapters.dtype, adapters.widths, table

    def table(self, device: torch.device) -> Table:
        return self._table


def test_streams():
    """Launches go to the current stream: work that is queued behind a long sleep sees what that stream wrote."""
    ys, x, adapters, ids = spread(m=4, k=512, ns=(256,), ranks=(16,) * 3)
    later, stream = torch.zeros_like(x), torch.cuda.Stream()
    wanted = updated(ys, x, adapters, ids)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        later.copy_(x)
        got = updated(ys, later, adapters, ids)
    torch.cuda.synchronize()
    assert same(got, wanted)


@pytest.mark.parametrize("m", [1, 33])
def test_through_the_public_function(m):
    draw = torch.Generator("cuda").manual_seed(6)
    k, n, ranks = 1024, 776, (16, 8, 64)
    adapters = adapters_of(k, (n,), ranks, F32, normal=True)
    x = torch.randn(m, k, device="cuda", generator=draw).to(BF16)
    weight = (torch.randn(n, k, device="cuda", generator=draw) / 32).to(BF16)
    ids = torch.randint(-1, 3, (m,), device="cuda", generator=draw)
    arguments = (x, weight, adapters.lora_As, adapters.lora_Bs, ids)
    with use_backend("cuda"), torch.no_grad():
        y = functional.multi_lora_linear(*arguments, scalings=adapters.scalings)
    truth = [x.double() @ weight.double().t()]
    for adapter in range(3):
        factors = adapters.factors(0, adapter)
        update = (x.double() @ factors.A.double().t()) @ factors.B.double().t()
        truth[0] += factors.scaling * (ids == adapter)[:, None] * update
    assert ((y.double() - truth[0]).norm() / truth[0].norm()) < 2**-8


def test_what_it_cannot_launch_raises():
    ys, x, adapters, _ = spread(m=4, k=512, ns=(256,), ranks=(16,) * 3)
    with pytest.raises(RuntimeError, match="CUDA error"):
        multi_lora_linear.add_updates(ys, x, adapters, torch.zeros(4, 9, dtype=torch.int64, device="cuda"), None)
    assert updated(ys, x, adapters, torch.zeros(4, 8, dtype=torch.int64, device="cuda"))[0].isfinite().all()
