"""csrc/multi_lora_linear.cu on the host: the function that the device compiles, all threads of a cluster of blocks.

Sums of small integers are exact in float32 in any order, so that y is known to the last bit. Copies and messages
between blocks arrive early or as late as they may, memory between rows is NaN, and memory that no argument names is not
read."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from peft_kernels.formats.adapter_table import AdapterLists
from peft_kernels.kernels.cuda import multi_lora_linear
from peft_kernels.ops.multi_lora_linear import Problem
from tests.csrc import multi_lora_lanes
from tests.csrc.multi_lora_lanes import Lanes

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    if multi_lora_lanes.COMPILER is None:
        pytest.skip("no C++ compiler")
    return Lanes(tmp_path_factory.mktemp("multi_lora_lanes"))


class Case:
    """x, y, ids and adapters of small integers. `ranks`: of each adapter, None where it has nothing; `spare`: elements
    of NaN behind each row of A, B and x, `shift`: before the first."""

    def __init__(
        self, m, k, ns, ranks, *, dtype=BF16, adapter_dtype=None, per_row=1, ids=None, spare=(0, 0, 0), shift=0, seed=1
    ) -> None:  # fmt: skip
        self.draw = torch.Generator().manual_seed(seed)
        adapter_dtype = adapter_dtype or dtype
        count = len(ranks)
        drawn = torch.randint(-2, count + 2, (m, per_row), generator=self.draw)
        self.ids = drawn if ids is None else torch.tensor(ids).view(m, per_row)
        self.mix = None
        if per_row > 1:
            self.mix = torch.tensor([0.5, 1.0, -2.0])[torch.randint(0, 3, (m, per_row), generator=self.draw)]
        self.x = self.rows(m, k, 2, dtype, spare[2], shift)
        self.ys = [self.rows(m, n, 60, dtype, 0, 0) for n in ns]
        present = [(a, r, j, n) for a, r in enumerate(ranks) if r is not None for j, n in enumerate(ns)]
        self.adapters = AdapterLists(
            [self.rows(r, k, 1, adapter_dtype, spare[0], shift) for _, r, _, _ in present],
            [self.rows(n, r, 1, adapter_dtype, spare[1], shift) for _, r, _, n in present],
            [j for *_, j, _ in present], [a for a, *_ in present],
            [(0.5, 1.0, 2.0, -1.0)[a % 4] for a, *_ in present],
            [max(r or 1 for r in ranks)] * len(ns), count,
        )  # fmt: skip

    def rows(self, rows: int, columns: int, most: int, dtype: torch.dtype, spare: int, shift: int) -> torch.Tensor:
        storage = torch.full((rows * (columns + spare) + shift,), float("nan"), dtype=dtype)
        view = storage[shift:].view(rows, columns + spare)[:, :columns]
        return view.copy_(torch.randint(-most, most + 1, (rows, columns), generator=self.draw))

    def expected(self) -> list[torch.Tensor]:
        results = []
        for j, y in enumerate(self.ys):
            total = y.double()
            for row, choice in ((self.ids == self.ids).nonzero()).tolist():
                adapter = int(self.ids[row, choice])
                factors = self.adapters.factors(j, adapter) if 0 <= adapter < self.adapters.count else None
                if factors is not None:
                    weight = factors.scaling * (1.0 if self.mix is None else float(self.mix[row, choice]))
                    s = factors.A.double() @ self.x[row].double()
                    total[row] += weight * (factors.B.double() @ s)
            results.append(total.to(y.dtype))
        return results

    def run(self, lanes: Lanes, rows: slice = slice(None), **options) -> list[torch.Tensor]:
        ys = [y[rows].clone() for y in self.ys]
        mix = None if self.mix is None else self.mix[rows]
        lanes.add_updates(ys, self.x[rows], self.adapters, self.ids[rows], mix, **options)
        return ys


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


CASES = {
    # As models have them: three projections of different widths; adapters without a rank, ids that are none.
    "group": lambda: Case(9, 520, (264, 88, 88), (16, 8, None, 12)),
    "float32": lambda: Case(6, 264, (136, 40), (16, 4, 7), adapter_dtype=F32),
    "float16": lambda: Case(6, 384, (136,), (16, 1), dtype=F16),
    "odd": lambda: Case(5, 137, (71, 9), (16, 5, 3), adapter_dtype=F32, spare=(3, 1, 5), shift=1),
    "padded": lambda: Case(5, 136, (72,), (5, 12, 16), spare=(8, 3, 8)),
    "partial": lambda: Case(4, 64, (24,), (5, 13), spare=(0, 11, 0)),
    "tiny": lambda: Case(9, 1, (1,), (1, 2), ids=[0, 1, -1] * 3),
    "rank 32": lambda: Case(5, 264, (136,), (32, 17, 3)),
    "rank 64": lambda: Case(4, 264, (136,), (64, 40, 16, 1), ids=(0, 1, 2, 3)),
    "rank 64 float32": lambda: Case(2, 264, (72,), (64, 33), adapter_dtype=F32, ids=(0, 1)),
    "rank 300": lambda: Case(2, 136, (72,), (300, 16), ids=(0, 1)),
    "several": lambda: Case(4, 136, (72, 24), (16, 7, None, 3), per_row=3),
    "several, high ranks": lambda: Case(2, 136, (72,), (100, 16, 70), per_row=3, ids=(0, 1, 2, 2, -1, 0)),
    "tiles": lambda: Case(2, 40, (4096 + 520,), (16, 3), ids=(0, 1)),
    "tiles, several": lambda: Case(1, 40, (4096 + 8,), (16, 9), per_row=2, ids=(1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("name", CASES)
def test_a_cluster(lanes, name, late):
    case = CASES[name]()
    expected = case.expected()
    assert not same(expected, case.ys)
    assert same(case.run(lanes, late=late), expected)


@pytest.mark.parametrize("team", [1, 3])
@pytest.mark.parametrize("name", ["group", "odd", "rank 64", "several, high ranks", "tiles, several"])
def test_without_clusters(lanes, name, team):
    case = CASES[name]()
    assert same(case.run(lanes, team=team), case.expected())


def test_ranks_in_small_buckets(lanes):
    """A rank above what the launch was told: a pool may have taken a larger adapter since a graph was captured."""
    case = CASES["rank 64"]()
    for rank in (1, 20):
        assert same(case.run(lanes, rank=rank), case.expected())


@pytest.mark.parametrize(
    ("name", "team"), [("group", 0), ("odd", 0), ("rank 64", 0), ("rank 300", 0), ("tiles", 0), ("group", 3)]
)
def test_each_element_is_read_once(lanes, name, team):
    """Of A and B of each token, and of a team without clusters A once by each block; what lies between rows never. The
    warp that has an adapter's last rank reads it again for ranks that are not there: not with multiples of 4."""
    case = CASES[name]()
    case.ids.clamp_(-1, case.adapters.count - 1)
    factors = [*case.adapters.lora_As, *case.adapters.lora_Bs]
    counts = lanes.add_updates(
        [y.clone() for y in case.ys], case.x, case.adapters, case.ids, factors=factors, team=team
    )  # fmt: skip
    pairs = len(case.adapters.outputs)
    for i, (factor, count) in enumerate(zip(factors, counts, strict=True)):
        tokens = int((case.ids == case.adapters.adapters[i % pairs]).sum())
        times = tokens * (max(1, team) if i < pairs else 1)
        inside = torch.zeros(count.numel(), dtype=torch.bool)
        inside.as_strided(factor.shape, factor.stride())[:] = True
        if i < pairs and factor.shape[0] % 4:
            again = count.as_strided(factor.shape, factor.stride())[-1]
            assert again.max() <= 4 * times
            again.clamp_(max=times)
        assert (count[inside] == times).all()
        assert (count[~inside] == 0).all()


def spread(case: Case) -> Case:
    """The case with numbers whose sums round: whatever changes their order changes bits."""
    draw = torch.Generator().manual_seed(7)
    for t in (case.x, *case.adapters.lora_As, *case.adapters.lora_Bs):
        t.copy_(torch.randn(t.shape, generator=draw))
    return case


def test_bits_do_not_depend_on_anything_else(lanes):
    """Not on the rows beside, on the ranks of other adapters, on how blocks and messages meet."""
    case = spread(Case(5, 1160, (200, 72), (16, 7, 12), per_row=2))
    whole = case.run(lanes)
    for rows in (slice(0, 1), slice(3, 5)):
        assert same(case.run(lanes, rows), [y[rows] for y in whole])
    for options in ({"rank": 20}, {"rank": 64}, {"seed": 2}, {"late": False, "seed": 3}):
        assert same(case.run(lanes, **options), whole), options
    plain = case.run(lanes, team=1)
    assert same(case.run(lanes, team=4), plain)
    assert all(torch.allclose(a.float(), b.float(), rtol=2**-6, atol=0.1) for a, b in zip(plain, whole, strict=True))


def test_bits_do_not_depend_on_alignment(lanes):
    whole = spread(Case(3, 1160, (200,), (16, 8, 12)))
    moved = spread(Case(3, 1160, (200,), (16, 8, 12), spare=(1, 1, 1), shift=1))
    assert same(moved.run(lanes), whole.run(lanes))


def test_many_tokens_share_an_adapter(lanes):
    case = Case(20, 64, (40,), (8, 8), ids=[0, 1, -1, 1] * 5)
    assert same(case.run(lanes), case.expected())


def wanted(**changed) -> Problem:
    values = {
        "device": "cuda", "device_index": 0, "dtype": BF16, "adapter_dtype": F32, "m": 4, "ns": (64, 64), "k": 64,
        "adapters": 4, "widths": (16, 16), "per_row": 1, "mixed": False, "dropout": False, "train": False,
        "pool": True,
    }  # fmt: skip
    return Problem(**{**values, **changed})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "cpu"}, "for CUDA tensors"), ({"train": True}, "does not keep S"), ({"dropout": True}, "nor drop"),
        ({"dtype": F32}, "not in torch.float32"), ({"adapter_dtype": torch.float64}, "not in torch.float64"),
        ({"m": 512}, "at most 256 rows"), ({"per_row": 9}, "at most 8 adapters"), ({"ns": (64, 0)}, "nothing"),
        ({"k": 2**31}, "a side of a weight"), ({"widths": (16, 513)}, "ranks up to 512"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_it_says_what_it_cannot_compute(changed, reason):
    assert reason in multi_lora_linear.unsupported(wanted(**changed))


def test_the_launch_takes_the_arguments_that_it_is_given(cuda, monkeypatch):
    """As far as the driver: a device that does not exist. Ten projections are two launches."""
    case, calls = Case(3, 40, (8,) * 10, (4, 2), per_row=2), []
    native = SimpleNamespace(multi_lora_linear=lambda _, *rest: calls.append(rest))
    monkeypatch.setattr(multi_lora_linear._native, "load", lambda part: native)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    multi_lora_linear.add_updates(case.ys, case.x, case.adapters, case.ids, case.mix)
    assert [len(call[-1]) for call in calls] == [8, 2]
    assert [layer for call in calls for _, layer, _ in call[-1]] == list(range(10))
    for arguments in calls:
        with pytest.raises(RuntimeError, match=r"CUDA error (35|101)"):
            cuda.multi_lora_linear(10_000, *arguments)
    with pytest.raises(RuntimeError, match="CUDA error 1:"):
        cuda.multi_lora_linear(10_000, *calls[0][:-1], [])
    with pytest.raises(ValueError, match="too many layers"):
        cuda.multi_lora_linear(10_000, *calls[0][:-1], [(0, 0, 1)] * 9)
