"""The decode kernels of `multi_lora_linear` by themselves: what they add to base products, in either form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.formats.adapter_table import AdapterLists, Table
from peft_kernels.kernels.triton import _launch
from tests.helpers import assert_within_rounding
from tests.problems import MultiLoraProblem
from tests.triton.launches import record_launches

pytest.importorskip("triton", reason="triton is not installed")

if _launch.INTERPRETED:
    from peft_kernels.kernels.triton._multi_decode import multi_decode

F16, F32 = torch.float16, torch.float32
ONE, TWO = ["_multi_decode"], ["_multi_shrink", "_multi_expand"]


@pytest.fixture(params=[ONE, TWO], ids=["one launch", "two launches"])
def form(request, monkeypatch) -> list[str]:
    """The form in force, in tiles small enough for several of them."""
    monkeypatch.setattr(tuning, "config", _tiles(rows=1000 if request.param is ONE else 0, block_n=32, block_k=32))
    return request.param


def _tiles(**fields: int):
    config = tuning.config
    return lambda *question, **sizes: replace(config(*question, **sizes), ranks=1000, **fields)


def _group(ns: Sequence[int], **options) -> list[MultiLoraProblem]:
    """A problem for each projection: one x, the same ids and weights."""
    problems = [MultiLoraProblem(n=n, **options) for n in ns]
    for problem in problems[1:]:
        if problem.mixed:
            problem.tensors["adapter_weights"] = problems[0].tensors["adapter_weights"]
        assert torch.equal(problem.tensors["x"], problems[0].tensors["x"])
    return problems


def _adapters(problems: Sequence[MultiLoraProblem]) -> AdapterLists:
    found: list[tuple] = []
    for j, problem in enumerate(problems):
        factors = zip(*(problem.factors(problem.tensors, name) for name in ("lora_As", "lora_Bs")), strict=True)
        found += [
            (a.detach(), b.detach(), j, i, scaling)
            for i, ((a, b), scaling) in enumerate(zip(factors, problem.scalings, strict=True))
            if a is not None
        ]
    widths = [max([a.shape[0] for a, _, output, *_ in found if output == j], default=0) for j in range(len(problems))]
    return AdapterLists(*(list(column) for column in zip(*found, strict=True)), widths, len(problems[0].ranks))


def _add(problems: Sequence[MultiLoraProblem], ys: Sequence[Tensor], rows=slice(None), **changes) -> Sequence[Tensor]:
    """ys, with the updates of these rows added by the kernels."""
    adapters = changes.get("adapters") or _adapters(problems)
    x, mix = (changes.get(name, problems[0].tensors.get(name)) for name in ("x", "adapter_weights"))
    multi_decode(
        x.detach()[rows], ys, adapters.table(x.device), adapters.widths, problems[0].choices[rows],
        None if mix is None else mix.detach()[rows], adapters.dtype,
    )  # fmt: skip
    return ys


def _bases(problems: Sequence[MultiLoraProblem]) -> list[Tensor]:
    with torch.no_grad():
        return [F.linear(*(problem.tensors[name] for name in ("x", "weight", "bias"))) for problem in problems]


def _check(problems: Sequence[MultiLoraProblem]) -> None:
    for problem, y in zip(problems, _add(problems, _bases(problems)), strict=True):
        assert_within_rounding(problem, (y, {}))


@pytest.mark.parametrize(
    ("m", "k", "n", "ranks", "dtype"),
    [
        (3, 40, 48, (8, 1, None, 16, 3), F32),
        (3, 67, 41, (24, 64, None, 8), F16),  # sizes that divide nothing, chunks of ranks not full
        (1, 1, 1, (1, 1), F16),
        (2, 33, 31, (None, 40, 2), F32),
    ],
    ids=str,
)
def test_ranks_beside_one_another(form, m, k, n, ranks, dtype, monkeypatch):
    launched = record_launches(monkeypatch)
    problem = MultiLoraProblem(m, k, n, ranks, dtype=dtype)
    problem.choices[:1] = 0 if ranks[0] else 1
    _check([problem])
    assert launched == form


def test_float32_adapters_over_a_float16_layer(form):
    _check([MultiLoraProblem(5, 72, 40, (8, 16, 4, 8), dtype=F16, adapter_dtype=F32)])


def test_one_rounding(form):
    """2048 + 1.0002 is nearer to 2050 than to 2048; rounded to float16 first, 1.0002 is 1, and a tie goes to 2048."""
    a, b = torch.tensor([[1.0002]]), torch.ones(1, 1)
    adapters, y = AdapterLists([a], [b], [0], [0], [1.0], [1], 1), torch.full((1, 1), 2048.0, dtype=F16)
    table, ids = adapters.table(y.device), torch.zeros(1, 1, dtype=torch.int64)
    multi_decode(torch.ones(1, 1, dtype=F16), [y], table, [1], ids, None, F32)
    assert y.item() == 2050.0


def test_large_rank(form):
    _check([MultiLoraProblem(1, 24, 24, (512, 8), ids=[0], dtype=F16)])


def test_three_widths_in_one_call(form, monkeypatch):
    """q, k and v with grouped queries, several weighted adapters a row, an adapter twice, one that k has not."""
    launched = record_launches(monkeypatch)
    ids = [[0, 2, 1], [3, 3, -1], [-1, -1, 9]]
    problems = _group((40, 16, 33), m=3, k=40, ranks=(16, 5, 24, 8), ids=ids, mixed=True, dtype=F16)
    del problems[1].tensors["lora_As.2"], problems[1].tensors["lora_Bs.2"]
    problems[1].ranks = (16, 5, None, 8)
    _check(problems)
    assert launched == form


def test_a_projection_without_adapters_and_calls_without_work(form, monkeypatch):
    problems = _group((20, 33), m=3, k=40, ranks=(4, 8), ids=[0, 1, 0])
    problems[0].ranks = (None, None)
    for name in [name for name in problems[0].tensors if name.startswith("lora_")]:
        del problems[0].tensors[name]
    _check(problems)
    launched = record_launches(monkeypatch)
    adapters, x = _adapters(problems), torch.randn(3, 40)
    table, nobody = adapters.table(x.device), torch.zeros(3, 0, dtype=torch.int64)
    none = Table(table.rows[:0], table.layers)
    ys = [torch.zeros(3, 20), torch.zeros(3, 33)]
    multi_decode(x[:0], [y[:0] for y in ys], table, adapters.widths, nobody[:0, :1], None, F32)
    multi_decode(x, ys, table, adapters.widths, nobody, None, F32)
    multi_decode(x, ys, none, adapters.widths, problems[0].choices, None, F32)
    multi_decode(x[:, :0], ys, table, adapters.widths, problems[0].choices, None, F32)
    multi_decode(x, ys, table, [0, 0], problems[0].choices, None, F32)
    assert launched == []


def test_rows_without_an_adapter_keep_their_bits(form):
    """Whatever the id: below -1, at or above the number of adapters, or of an adapter that has nothing here."""
    ids = torch.tensor([-1, 0, 3, 2**62, 2, -(2**62), 0])
    problem = MultiLoraProblem(7, 40, 48, (4, 8, None), ids=ids, dtype=F16)
    ys = _bases([problem])
    ys[0][0] = -0.0
    before = ys[0].clone()
    (y,) = _add([problem], ys)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(y[others].view(torch.int16), before[others].view(torch.int16))
    assert not torch.equal(y[[1, 6]], before[[1, 6]])


def _in_poison(factor: Tensor, columns: int, poison: str) -> Tensor:
    """The same values in the middle of a buffer of `poison`, rows padded too."""
    r, size = factor.shape
    buffer = torch.full((r + 2, 16 + size + columns), float(poison), dtype=factor.dtype)
    buffer[1:-1, 16 : 16 + size] = factor
    return buffer[1:-1, 16 : 16 + size]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("padding", [lambda size: 7 - size % 8, lambda size: -size % 8],
                         ids=["odd rows", "rows of 16 bytes"])  # fmt: skip
def test_nothing_beyond_factors_and_results(form, padding):
    """Factors in the middle of others, x with strides, y between rows that must stay. Infinity beside A would make the
    sums that end in no result NaN, of which NumPy warns; B's rows may be read up to 16 bytes."""
    problem = MultiLoraProblem(5, 40, 33, (5, 24, 17, 1, 3), ids=[0, 1, 2, 3, 0], dtype=F16)
    (expected,) = _add([problem], _bases([problem]))
    adapters = _adapters([problem])
    for factors, poison in (adapters.lora_As, "inf"), (adapters.lora_Bs, "nan"):
        factors[:] = [_in_poison(factor, 16 + padding(factor.shape[1]), poison) for factor in factors]
    x = torch.full((10, 80), float("nan"), dtype=F16)
    x[::2, ::2] = problem.tensors["x"].detach()
    guarded = torch.full((7, 33), 7.0, dtype=F16)
    guarded[1:-1] = _bases([problem])[0]
    (y,) = _add([problem], [guarded[1:-1]], x=x[::2, ::2], adapters=adapters)
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)
    assert guarded[[0, -1]].eq(7.0).all()


def test_ranks_beyond_the_widths_are_left_out(form):
    """An adapter of a captured call may be replaced by a larger one: partial sums have room for `widths` alone."""
    problem = MultiLoraProblem(2, 40, 33, (40, 8), ids=[0, 1])
    adapters = _adapters([problem])
    adapters.widths = [9]
    (y,) = _add([problem], _bases([problem]), adapters=adapters)
    for name, keep in (("lora_As.0", (slice(16),)), ("lora_Bs.0", (slice(None), slice(16)))):
        problem.tensors[name] = problem.tensors[name].detach()[keep]
    assert_within_rounding(problem, (y, {}))


@pytest.fixture(scope="module")
def batch() -> list[MultiLoraProblem]:
    ids = [[0, -1], [1, -1], [4, 2], [2, -1], [3, 0]]
    return _group((24,), m=5, k=40, ranks=(1, 8, 16, 24, 64), ids=ids, mixed=True, adapter_dtype=F16)


def test_a_row_has_the_same_bits_in_any_batch(batch, monkeypatch):
    """Alone, with four others, in another order, beside rows of NaN, in one launch or two, and beside adapters of
    smaller ranks."""
    config, results = _tiles(block_n=32, block_k=32), []
    for rows in (1000, 0):
        limited = lambda *question, rows=rows, **sizes: replace(config(*question, **sizes), rows=rows)  # noqa: E731
        monkeypatch.setattr(tuning, "config", limited)
        results.append(_add(batch, _bases(batch)))
        turned = [4, 2, 0, 1, 3]
        results.append([y[[2, 3, 1, 4, 0]] for y in _add(batch, [y[turned] for y in _bases(batch)], turned)])
        for m in (0, 2):
            (y,) = _add(batch, [y[[m]] for y in _bases(batch)], [m])
            assert torch.equal(y[0], results[0][0][m])
        x = batch[0].tensors["x"].detach().clone()
        x[:2] = float("nan")
        beside_nan = _add(batch, _bases(batch), x=x)
        for y, expected in zip(beside_nan, results[0], strict=True):
            assert y[:2].isnan().any()
            assert torch.equal(y[2:], expected[2:])
    for one, other in pairwise(results):
        assert all(map(torch.equal, one, other))
    adapters = _adapters(batch)
    kept = [i for i, a in enumerate(adapters.lora_As) if a.shape[0] <= 16]
    few = AdapterLists(
        *([values[i] for i in kept] for values in (adapters.lora_As, adapters.lora_Bs, adapters.outputs,
          adapters.adapters, adapters.scalings)), [16], 5,
    )  # fmt: skip
    for y, expected in zip(_add(batch, _bases(batch), adapters=few), results[0], strict=True):
        assert torch.equal(y[[1, 3]], expected[[1, 3]])


@pytest.mark.parametrize(("m", "r", "launches"), [(16, 8, ONE), (17, 8, TWO), (2, 32, ONE), (2, 33, TWO)])
def test_the_form_that_tuning_chooses(m, r, launches, monkeypatch):
    launched = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, *_, **options: launched.append(kernel.__name__))
    problem = MultiLoraProblem(m, 8, 8, (r, 4), dtype=F16)
    _add([problem], _bases([problem]))
    assert launched == launches


def test_tiles_of_tuning(monkeypatch):
    """As they are: several steps of K and blocks of columns, and rows in either form with the same bits."""
    config = tuning.config
    problem = MultiLoraProblem(2, 1100, 520, (8, 24), ids=[0, 1], adapter_dtype=F16)
    _check([problem])
    (one,) = _add([problem], _bases([problem]))
    monkeypatch.setattr(tuning, "config", lambda *question, **sizes: replace(config(*question, **sizes), rows=1))
    (two,) = _add([problem], _bases([problem]))
    assert torch.equal(one, two)
