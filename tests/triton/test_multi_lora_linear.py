"""`multi_lora_linear` in the Triton kernels for prefill and training: as accurate as PyTorch's own composition, whoever
chose which adapter."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from peft_kernels import explain, functional, use_backend
from peft_kernels.formats.adapter_table import AdapterLists
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.formats.pool import AdapterPool
from peft_kernels.kernels.reference import nf4_dequantize
from peft_kernels.kernels.triton import _launch, multi_lora_linear
from peft_kernels.ops.multi_lora_linear import Problem as Dispatched
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.problems import MultiLoraProblem, Problem
from tests.problems.nf4 import part_of
from tests.triton.launches import record_launches

triton = pytest.importorskip("triton", reason="triton is not installed")

F16, F32 = torch.float16, torch.float32
MIXED = (1, 8, 64, 96)


@pytest.fixture(autouse=True)
def _gemms_take_the_step_along(monkeypatch) -> None:
    """With however few rows."""
    monkeypatch.setattr(multi_lora_linear, "LEAST_FUSED", 0)


@pytest.fixture
def sm_90(monkeypatch) -> None:
    """The configurations of that architecture, where those of sm_80 serve otherwise."""
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")


# What is computed.

CASES = {
    "mixed ranks": {"ranks": MIXED, "m": 40, "adapter_dtype": F32},
    "one adapter": {"ranks": (6,), "ids": [0] * 40, "m": 40},
    "nobody": {"ranks": (3, 4), "ids": [-1] * 21, "m": 21},
    "one row": {"ranks": (3, 4), "ids": [1], "m": 1, "k": 9, "n": 7},
    "no row": {"ranks": (3, 4), "ids": torch.zeros(0, dtype=torch.int64), "m": 0},
    "many": {"ranks": tuple(1 + a % 9 for a in range(20)), "m": 9, "k": 17, "n": 19},
    "nothing in this layer": {"ranks": (None, None), "m": 9},
    "dropout of each": {"dropout_p": (0.0, 0.3, 0.5, 0.1, 0.0), "m": (3, 23)},
    "weighted": {"mixed": True, "dropout_p": 0.3},
    "two choices": {"per_row": 2, "dropout_p": 0.3, "ranks": (1, 8, 24), "m": 20},
    "the same twice": {"ids": [[1, 1], [0, 0], [-1, 2], [2, -1], [0, 1]], "ranks": (3, 17, 5), "m": 5},
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, F16) for case in CASES), ("dropout of each", F32)],
    ids=str,
)
def test_within_rounding(case, dtype):
    problem = MultiLoraProblem(**{"adapter_dtype": dtype, **CASES[case], "dtype": dtype})
    y, grads = problem.run()
    assert_within_rounding(problem, (y, grads))
    for name, grad in grads.items():
        assert grad.dtype == problem.tensors[name].dtype


@pytest.mark.parametrize("per_row", [1, 2])
def test_as_accurate_as_eager(sm_90, per_row):
    """Several tiles and splits, one adapter without rows."""
    problem = MultiLoraProblem(
        100, 72, 72, (16, 8, 40, 5), dtype=F16, adapter_dtype=F32, dropout_p=0.2, per_row=per_row
    )
    assert_as_accurate_as_eager(problem, problem.run())


def test_large_rank():
    problem = MultiLoraProblem(12, 16, 24, (512, 160, 3), dtype=F16, dropout_p=0.2, ids=[0, 1, -1] * 4)
    assert_as_accurate_as_eager(problem, problem.run())


@dataclass
class FourBits(MultiLoraProblem):
    """Over an `NF4Weight`."""

    q: NF4Weight = field(init=False, repr=False)
    weight: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        del self.tensors["weight"]
        self.q = part_of("whole", self.n, self.k, dtype=self.dtype)
        self.weight = nf4_dequantize.dense(self.q).double()

    def arguments(self, t):
        return super().arguments({**t, "weight": self.q})

    def compose(self, t):
        return super().compose({**t, "weight": self.weight.to(t["x"].dtype)})

    def absolute(self) -> FourBits:
        twin = super().absolute()
        twin.weight = self.weight.abs()
        return twin


def test_over_four_bits(monkeypatch):
    launched = record_launches(monkeypatch)
    problem = FourBits(40, 64, 40, (3, 16, 8), dtype=F16, dropout_p=0.3)
    assert_within_rounding(problem, problem.run())
    assert launched.count("_multi_update") == 2
    assert "_multi_gemm" not in launched


@pytest.mark.parametrize("fused", [True, False], ids=["gemm", "update"])
def test_a_pool_gives_the_bits_of_lists(fused, monkeypatch):
    """Adapters of ranks that fill no page, a slot that is empty; gradients of x alone."""
    monkeypatch.setattr(multi_lora_linear, "LEAST_FUSED", 0 if fused else 1 << 30)
    problem = MultiLoraProblem(25, 40, 24, (5, 8, 3), dtype=F16, dropout_p=0.3)
    problem.freeze_all_but("x")
    y, grads = problem.run()
    pool = AdapterPool({"q": (24, 40)}, budget=1 << 20, slots=4, dtype=F16)
    names = ["a", "b", "c"]
    for adapter, name in enumerate(names):
        factors = tuple(problem.tensors[f"lora_{side}s.{adapter}"].detach() for side in "AB")
        pool.load(name, {"q": factors}, scaling=problem.scalings[adapter])
    ids = pool.ids([(*names, "__base__")[a] for a in problem.choices.flatten().tolist()])
    t = problem.tensors
    pooled = functional.multi_lora_linear(
        t["x"], t["weight"], pool.layer("q"), None, ids, bias=t["bias"], dropout_p=0.3, seed=problem.seed
    )
    assert torch.equal(pooled, y)
    assert torch.equal(torch.autograd.grad(pooled, t["x"], problem.grad_y)[0], grads["x"])


class GroupProblem(Problem):
    """Layers of several widths and ranks over one x: `parts` hold theirs, each with the seed of its mask."""

    op = "multi_lora_linear_group"

    def __init__(self, ns, ranks, dtype, dropout_p=0.0, **options) -> None:
        self.parts = [
            MultiLoraProblem(n=n, ranks=of_layer, dtype=dtype, dropout_p=dropout_p, seed=1234 + j, **options)
            for j, (n, of_layer) in enumerate(zip(ns, ranks, strict=True))
        ]
        self.dtype, self.x = dtype, self.parts[0].tensors["x"]
        self.tensors = {"x": self.x}
        for j, part in enumerate(self.parts):
            self.tensors |= {f"{j}.{name}": t for name, t in part.tensors.items() if t is not None and name != "x"}
        self.grad_y = tuple(part.grad_y for part in self.parts)

    @property
    def length(self) -> int:
        return sum(part.length for part in self.parts)

    def of(self, t, j: int) -> dict:
        own = {name.partition(".")[2]: value for name, value in t.items() if name.startswith(f"{j}.")}
        return {"adapter_weights": None, **own, "x": t["x"]}

    def arguments(self, t):
        calls = [part.arguments(self.of(t, j)) for j, part in enumerate(self.parts)]
        _, weights, lora_As, lora_Bs, ids = zip(*(args for args, _ in calls), strict=True)
        options = calls[0][1]
        return (t["x"], weights, lora_As, lora_Bs, ids[0]), {
            "scalings": [each["scalings"] for _, each in calls],
            "biases": [each["bias"] for _, each in calls],
            "dropout_p": options["dropout_p"],
            "seed": options["seed"],
        }

    def compose(self, t):
        return tuple(part.compose(self.of(t, j)) for j, part in enumerate(self.parts))

    def absolute(self) -> GroupProblem:
        twin = super().absolute()
        twin.parts = [part.absolute() for part in self.parts]
        return twin


@pytest.mark.parametrize(("dtype", "unused"), [(F16, 0), (F32, None)], ids=str)
def test_groups_of_unequal_widths(dtype, unused):
    """q/k/v: an adapter that has nothing in v, a layer without any."""
    ranks = ((5, 8, 3), (None, None, None), (16, None, 2))
    problem = GroupProblem((40, 24, 17), ranks, dtype, 0.3, m=20, ids=[0, -1, 1, 2, 1] * 4)
    if unused is not None:
        problem.grad_y = tuple(None if j == unused else grad for j, grad in enumerate(problem.grad_y))
        problem.freeze_all_but("x", "1", "2")
    assert_within_rounding(problem, problem.run())


# Which rows are whose.


def _listed(ids: list[int], count: int, block: int) -> tuple[list[list[int]], list[int], list[int]]:
    """(tiles, first tiles, order) as a loop over the adapters finds them."""
    tiles, firsts, order = [], [], []
    for adapter in range(count + 1):
        own = [m for m, i in enumerate(ids) if (i if 0 <= i < count else count) == adapter]
        firsts.append(len(tiles))
        start, end = len(order), len(order) + len(own)
        tiles += [[adapter, at, min(at + block, end)] for at in range(start, end, block)]
        order += own
    return tiles, [*firsts, len(tiles)], order


@pytest.mark.parametrize("block", [256, 2], ids=["blocks of 256", "blocks of 2"])
def test_tile_table(block, monkeypatch):
    """24 random cases in all: adapters without rows, ids out of range, fewer rows than adapters, none at all."""
    from peft_kernels.kernels.triton import _multi_rows

    monkeypatch.setattr(_multi_rows, "_BLOCK", block)
    chance = random.Random(block)
    for _ in range(12):
        count, m, block_m = chance.choice((1, 2, 5, 9)), chance.choice((0, 1, 7, 20, 33)), chance.choice((2, 5, 16))
        chosen = chance.sample(range(-1, count), chance.randint(1, min(count + 1, 4)))
        ids = [chance.choice((*chosen, chosen[0], -7, count, 1 << 40)) for _ in range(m)]
        places = _multi_rows.SortedPlaces(torch.tensor(ids, dtype=torch.int64).view(m, 1), count)
        tiles, firsts, order = _listed(ids, count, block_m)
        found = places.tiles(block_m)
        assert found.shape == (-(-m // block_m) + min(m, count), 3)
        assert found[: len(tiles)].tolist() == tiles, (ids, count, block_m)
        assert found[len(tiles) :, 0].eq(-1).all()
        assert places.first_tiles(block_m).tolist() == firsts
        assert places.order.tolist() == order


def test_ids_out_of_range_are_no_adapter():
    """On a GPU nobody checks them: the row gets the base product, and nothing else is read."""
    problem = MultiLoraProblem(20, ids=[0, 7, -5, 1] * 5, ranks=(3, 4))
    adapters = _lists(problem)
    x, ids = problem.tensors["x"].detach(), problem.choices
    weight, bias = problem.tensors["weight"].detach(), problem.tensors["bias"].detach()
    (y,), (s,) = multi_lora_linear.forward(x, [weight], [bias], adapters, ids, None, [], None, True)
    inside = ids.where((ids >= 0) & (ids < 2), torch.tensor(-1))
    (expected,), (s_expected,) = multi_lora_linear.forward(x, [weight], [bias], adapters, inside, None, [], None, True)
    assert torch.equal(y, expected)
    assert torch.equal(s, s_expected)
    assert s[ids.squeeze(1) > 1].eq(0).all()


@pytest.mark.parametrize(("k", "dtype", "wide"), [(40, F16, True), (36, F16, False), (36, F32, True)], ids=str)
def test_which_factors_are_read_16_bytes_at_a_time(k, dtype, wide):
    """All of a layer, or none: every row begins at 16 bytes, and for B ranks fill 8, or a pool's page."""
    from peft_kernels.kernels.triton._multi_table import factors

    pool = AdapterPool({"q": (24, k)}, budget=1 << 20, slots=2, dtype=dtype)
    pool.load("a", {"q": (torch.randn(5, k), torch.randn(24, 5))}, scaling=1.0)
    pooled = pool.adapters([pool.layer("q")])
    for lora_b in (False, True):
        assert factors(pooled, pooled.table(torch.device("cpu")), 0, lora_b=lora_b).wide == (lora_b or wide)
    whole = torch.zeros(16 * k + 1, dtype=dtype)
    shifted = [whole[:-1].view(16, k), whole[1:].view(16, k)]
    for lora_As, ranks, expected in ((shifted[:1], (16,), (wide, True)), (shifted, (16, 16), (False, True)),
                                     ([shifted[0][:5]], (5,), (wide, False))):  # fmt: skip
        lora_Bs = [torch.zeros(24, r, dtype=dtype) for r in ranks]
        count = len(ranks)
        lists = AdapterLists(lora_As, lora_Bs, [0] * count, list(range(count)), [1.0] * count, [max(ranks)], count)
        table = lists.table(torch.device("cpu"))
        assert tuple(factors(lists, table, 0, lora_b=lora_b).wide for lora_b in (False, True)) == expected


def _lists(problem: MultiLoraProblem) -> AdapterLists:
    lora_As, lora_Bs = ([t.detach() for t in problem.factors(problem.tensors, name)] for name in ("lora_As", "lora_Bs"))
    count = len(lora_As)
    widths = [max(problem.ranks)]
    return AdapterLists(lora_As, lora_Bs, [0] * count, list(range(count)), list(problem.scalings), widths, count)


# What the passes promise.


@pytest.mark.parametrize("per_row", [1, 2])
def test_number_of_launches(per_row, monkeypatch):
    """Without those that list tiles and add partial sums: 2 forward, 4 backward, whatever the number of adapters."""
    launched: list[str] = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, *_, **options: launched.append(kernel.__name__))
    problem = MultiLoraProblem(120, 40, 72, (8,) * 12, dtype=F16, per_row=per_row)
    problem.freeze_all_but("x", "lora_As", "lora_Bs")
    problem.run()
    expand = "_multi_gemm" if per_row == 1 else "_multi_update"
    assert [name for name in launched if name not in ("_list_tiles", "splitk_reduce", "_add_planes")] == [
        "_multi_down_projection", expand, "_multi_down_projection", expand, *["_multi_sum_over_rows"] * 2
    ]  # fmt: skip
    assert launched.count("_add_planes") == 2


def test_few_rows_of_each_adapter_leave_the_base_product_alone(monkeypatch):
    monkeypatch.setattr(multi_lora_linear, "LEAST_FUSED", 16)
    for rows, expand in ((18, "_multi_gemm"), (16, "_multi_update")):
        problem = MultiLoraProblem(rows, 40, 24, (3, 8), dtype=F16, dropout_p=0.3)
        launched = record_launches(monkeypatch)
        assert_within_rounding(problem, problem.run())
        assert launched.count(expand) == 2


def test_a_few_rows_without_gradients_are_not_sorted(monkeypatch):
    launched = record_launches(monkeypatch)
    problem = MultiLoraProblem(16, ranks=MIXED)
    with torch.no_grad():
        y = problem.call()
    assert "_list_tiles" not in launched
    launched.clear()
    monkeypatch.setattr(multi_lora_linear, "MOST_DECODED", 15)
    with torch.no_grad():
        torch.testing.assert_close(problem.call(), y)
    assert "_list_tiles" in launched


def test_the_same_bits_run_to_run():
    problem = MultiLoraProblem(40, 24, 24, (3, 8, 5), dtype=F16, dropout_p=0.2, per_row=2)
    first, second = named(problem.run()), named(problem.run())
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("per_row", [1, 2])
def test_the_gradients_of_an_adapter_depend_on_its_own_rows_alone(per_row, monkeypatch):
    """Not a bit of them, nor of its rows of y and dX, changes when the others' factors, rows and choices do; segments
    are cut in several planes."""
    from peft_kernels.kernels.triton import _multi_sum_over_rows

    monkeypatch.setattr(_multi_sum_over_rows, "PLACES_PER_PLANE", 16)
    problem = MultiLoraProblem(
        60 if per_row == 1 else 40, 24, 20, (8, 5, 3, 4), dtype=F16, dropout_p=0.3, per_row=per_row
    )
    y, grads = problem.run()
    own = (problem.choices == 1).any(1)
    assert own.sum() > 16
    changes = {
        name: t.detach().where(own.unsqueeze(1), t + 1) if name == "x" else t.detach() * 2
        for name, t in problem.tensors.items()
        if name in ("x", "lora_As.0", "lora_Bs.0", "lora_As.2", "lora_Bs.2")
    }
    others = torch.randint(0, 3, problem.choices.shape) * 2 - 1  # -1, 1 and 3; 1 is for the adapter's own rows only
    others = others.where(others != 1, 0)
    problem.choices = problem.choices.where(own.unsqueeze(1), others)
    problem.ids = problem.choices.view_as(problem.ids)
    problem.grad_y = problem.grad_y.where(own.unsqueeze(1), problem.grad_y * 3)
    y_changed, grads_changed = problem.run(**{name: t.requires_grad_() for name, t in changes.items()})
    assert not torch.equal(grads_changed["lora_As.0"], grads["lora_As.0"])
    for name in ("lora_As.1", "lora_Bs.1"):
        assert torch.equal(grads_changed[name], grads[name]), name
    if per_row == 1:  # with several, its rows have other adapters too
        assert torch.equal(y_changed[own], y[own])
        assert torch.equal(grads_changed["x"][own], grads["x"][own])


def test_planes_are_cut_by_an_adapters_own_rows(monkeypatch):
    """Beside others that have no, few or many rows, and alone."""
    from peft_kernels.kernels.triton import _multi_sum_over_rows
    from peft_kernels.kernels.triton._multi_rows import SortedPlaces
    from peft_kernels.kernels.triton._multi_table import factors

    monkeypatch.setattr(_multi_sum_over_rows, "PLACES_PER_PLANE", 32)
    problem = MultiLoraProblem(1, 24, 40, (8, 8, 8), dtype=F16, adapter_dtype=F32)
    adapters = _lists(problem)
    of_a = factors(adapters, adapters.table(torch.device("cpu")), 0, lora_b=False)
    x, low = torch.randn(300, 24, dtype=F16), torch.randn(300, 1, 8, dtype=F16)
    own = torch.randperm(300)[:75].sort().values
    found = []
    for others in (torch.tensor([-1]), torch.tensor([0, 2]), torch.tensor([0])):
        ids = others[torch.randint(0, len(others), (300, 1))]
        ids[own] = 1
        places = SortedPlaces(ids, 3)
        found.append(_multi_sum_over_rows.multi_sum_over_rows(low, x, of_a, 24, places)[8 * 24 : 16 * 24])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    alone = torch.zeros(75, 1, dtype=torch.int64) + 1
    places = SortedPlaces(alone, 3)
    result = _multi_sum_over_rows.multi_sum_over_rows(low[own].contiguous(), x[own], of_a, 24, places)
    assert torch.equal(found[0], result[8 * 24 : 16 * 24])
    truth = (low[own, 0].double().t() @ x[own].double()).flatten() * problem.scalings[1]
    torch.testing.assert_close(found[0].double(), truth, rtol=2e-3, atol=2e-2)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("per_row", [1, 2])
def test_an_adapter_that_is_broken_stays_alone(per_row):
    """NaN and infinity in one adapter's factors and rows, and in the weights of choices of none, reach nobody else."""
    ids = torch.tensor([[0, 2], [1, 0], [-1, 0], [2, -1]]).repeat(9, 1)[:, :per_row]
    problem = MultiLoraProblem(36, 40, 24, (5, 8, 3), dtype=F16, ids=ids, mixed=True)
    y, grads = problem.run()
    own = (problem.choices == 1).any(1)
    broken = {name: t.detach().clone() for name, t in problem.tensors.items() if name != "bias"}
    broken["x"][own] = float("nan")
    broken["lora_As.1"][:] = broken["lora_Bs.1"][:] = float("inf")
    broken["adapter_weights"][problem.choices == -1] = float("nan")
    problem.grad_y[own] = float("nan")
    y_broken, grads_broken = problem.run(**{name: t.requires_grad_() for name, t in broken.items()})
    assert torch.equal(y_broken[~own], y[~own])
    assert torch.equal(grads_broken["x"][~own], grads["x"][~own])
    assert torch.equal(grads_broken["adapter_weights"][~own], grads["adapter_weights"][~own])
    for name in ("lora_As.2", "lora_Bs.2", *(("lora_As.0", "lora_Bs.0") if per_row == 1 else ())):
        assert torch.equal(grads_broken[name], grads[name]), name


def _in_poison(tensor: Tensor) -> Tensor:
    """The same values in the middle of a buffer of NaN, at odd places."""
    rows, columns = tensor.shape
    buffer = torch.full((rows + 2, columns + 25), float("nan"), dtype=tensor.dtype)
    buffer[1:-1, 9 : 9 + columns] = tensor
    return buffer[1:-1, 9 : 9 + columns]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


@pytest.mark.parametrize(("place", "per_row"), [(_transposed, 1), (_in_poison, 1), (_in_poison, 2)])
def test_layouts(place, per_row):
    """Every matrix laid out otherwise; nothing beyond the tails is read."""
    problem = MultiLoraProblem(22, 40, 24, (5, 8, 3), dtype=F16, dropout_p=0.3, per_row=per_row)
    problem.freeze_all_but("x", "lora_As", "lora_Bs")
    expected = named(problem.run())
    problem.grad_y = place(problem.grad_y)
    matrices = {name: problem.tensors[name] for name in (*list(expected)[1:], "weight")}
    changes = {name: place(t.detach()).requires_grad_(name != "weight") for name, t in matrices.items()}
    for name, value in named(problem.run(**changes)).items():
        if per_row == 1 or name.startswith("lora"):
            assert torch.equal(value, expected[name]), name
        else:  # PyTorch's base product may sum in another order
            torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-3)


def test_expanded_grad():
    """`.sum().backward()` sends gradients with strides (0, 0)."""
    problem = MultiLoraProblem(64, 33, 26, (5, 8, 3), dtype=F16)
    problem.grad_y = torch.ones(1, 1, dtype=F16).expand(64, 26)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("per_row", [1, 2])
def test_nothing_beyond_the_results_is_written(per_row, monkeypatch):
    guarded = []

    def empty(shape, dtype, device):
        fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        buffer = torch.full((math.prod(shape) + 4096,), fill, dtype=dtype, device=device)
        guarded.append((buffer[math.prod(shape) :], fill))
        return buffer[: math.prod(shape)].view(shape)

    problem = MultiLoraProblem(35, 35, 37, (3, 9, 1), dropout_p=0.3, per_row=per_row, dtype=F16)
    monkeypatch.setattr(torch, "empty", empty)
    result = named(problem.run())
    assert len(guarded) >= 12
    assert all((guard.isnan() if fill != fill else guard == fill).all() for guard, fill in guarded)
    assert not any(value.isnan().any() for value in result.values())


def test_only_what_is_wanted_is_computed():
    problem = MultiLoraProblem(9, 17, 19, (6, None, 3), dropout_p=0.3, mixed=True, dtype=F16)
    _, everything = problem.run()
    for wanted in ("x", "lora_As", "lora_Bs", "adapter_weights", "weight", "bias"):
        problem.freeze_all_but(wanted)
        _, grads = problem.run()
        assert grads
        for name, grad in grads.items():
            assert name.partition(".")[0] == wanted
            assert torch.equal(grad, everything[name]), name


def test_gradients_of_adapters_have_no_gaps():
    """They are views of one memory for each projection and side, which holds nothing else."""
    problem = MultiLoraProblem(30, 24, 16, (2, 9, None, 4))
    _, grads = problem.run()
    for side, per_rank in (("lora_As", 24), ("lora_Bs", 16)):
        of_side = [grad for name, grad in grads.items() if name.startswith(side)]
        assert {grad.untyped_storage().data_ptr() for grad in of_side} == {of_side[0].untyped_storage().data_ptr()}
        assert of_side[0].untyped_storage().nbytes() == 15 * per_rank * 4
        assert all(grad.is_contiguous() for grad in of_side)


# Where it does not run.


def _dispatched(**changes) -> Dispatched:
    problem = Dispatched("cpu", None, F16, F16, 64, (8,), 8, 4, (4,), 1, False, False, True, False)
    return problem._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"widths": (4, 513)}, "rank 513 is above 512"),
        ({"m": 1 << 30, "per_row": 2}, "2\\^31 or more choices"),
        ({"dtype": torch.bfloat16}, "interpreter rounds to bfloat16 wrongly"),
        ({"adapter_dtype": torch.float64}, "float64 runs in PyTorch"),
        ({"adapter_dtype": None, "widths": (0,)}, None),
    ],
)
def test_unsupported_says_why(changes, reason):
    found = multi_lora_linear.unsupported(_dispatched(**changes))
    assert found is None if reason is None else reason.replace("\\", "") in found


def test_the_interpreter_is_never_chosen_by_itself():
    problem = MultiLoraProblem(4, ranks=(3,))
    args, options = problem.arguments(problem.tensors)
    with use_backend(None):
        assert ("triton", _launch.INTERPRETER_IS_FOR_TESTS) in explain("multi_lora_linear", *args, **options).rejected
