"""Sparse deltas: from dense differences and PEFT's SHiRA, put into a weight and taken out bit for bit, and in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft_kernels.formats.sparse_delta import (
    SparseDelta,
    carried,
    from_dense_difference,
    from_shira,
    prepare,
    shira_indices,
    sparse_delta,
)
from peft_kernels.formats.sparse_delta_file import load_deltas, save_deltas

SHAPE = (9, 70)


def drawn(seed: int = 0, dtype=torch.float32, shape=SHAPE, count: int = 40) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(shape[0] * shape[1], generator=generator)[:count]
    return sparse_delta(flat, torch.randn(count, generator=generator).to(dtype), shape)


def test_values_follow_their_places():
    """Drawn in any order; each value stands where it was said to."""
    flat = torch.tensor([65, 3, 600, 70])
    delta = sparse_delta(flat, torch.tensor([1.0, 2.0, 3.0, 4.0]), SHAPE)
    assert delta.positions.flat.tolist() == [3, 65, 70, 600]
    expected = torch.zeros(SHAPE).flatten()
    expected[flat] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(delta.dense(), expected.view(SHAPE))
    assert delta.density() == 4 / 630
    assert delta.nbytes == 4 * (4 + 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_apply_and_remove(dtype):
    """Added in float32 and rounded once; taken out to the last bit, which subtraction does not do; any strides."""
    delta = drawn()
    weight = torch.randn(70, 9).to(dtype).t()
    before = weight.clone()
    overwritten = delta.apply_(weight)
    assert torch.equal(weight, (before.float() + delta.dense()).to(dtype))
    assert not torch.equal(weight, before)
    assert not torch.equal((weight.float() - delta.dense()).to(dtype), before)
    delta.remove_(weight, overwritten)
    assert torch.equal(weight, before)
    with pytest.raises(ValueError, match="weight has shape"):
        delta.apply_(weight.t())
    with pytest.raises(ValueError, match="what apply_ returned"):
        delta.remove_(weight, overwritten[1:])


def test_from_dense_difference():
    base, change = torch.randn(SHAPE, dtype=torch.float64), drawn().dense().double()
    tuned = base + change
    found = from_dense_difference(tuned, base)
    assert torch.equal(found.dense(), tuned - base)
    size = (tuned - base).abs().flatten()
    assert torch.equal(
        from_dense_difference(tuned, base, tolerance=0.5).positions.flat.long(), (size > 0.5).nonzero()[:, 0]
    )
    top = from_dense_difference(tuned, base, keep=7).positions.flat.long()
    assert top.numel() == 7
    assert size[top].min() == size.sort(descending=True).values[6]
    assert from_dense_difference(tuned, base, keep=7 / 630).positions.flat.tolist() == top.tolist()
    with pytest.raises(ValueError, match="not finite"):
        from_dense_difference(tuned.clone().fill_(float("inf")), base)
    with pytest.raises(ValueError, match=r"keep is 1\.5"):
        from_dense_difference(tuned, base, keep=1.5)


def test_peft_shira():
    """A layer of PEFT's: the same Δ from its tensors, and from the seed alone the places that its files do not have."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(70, 9))
    model = peft.get_peft_model(base, peft.ShiraConfig(r=2, random_seed=5, target_modules=["0"], init_weights=False))
    layer = model.base_model.model[0]
    weight, indices = layer.shira_weight["default"], layer.shira_indices["default"]
    delta = from_shira(weight, indices, SHAPE, scaling=0.5)
    layer.scaling["default"] = 0.5
    assert torch.equal(delta.dense(), layer.get_delta_weight("default").to_dense())
    assert delta.dense().any()
    again = from_shira(weight, shira_indices(SHAPE, 2, 5), SHAPE)
    assert torch.equal(again.positions.flat, delta.positions.flat)
    with pytest.raises(ValueError, match="too few weights"):
        shira_indices(SHAPE, 8, 5)


def test_numbers_carried_to_other_places():
    old, new = prepare(torch.tensor([2, 5, 9, 600]), SHAPE)[0], prepare(torch.tensor([0, 5, 600, 629]), SHAPE)[0]
    assert carried(torch.tensor([1.0, 2.0, 3.0, 4.0]), old, new).tolist() == [0.0, 2.0, 4.0, 0.0]
    none = prepare(torch.empty(0, dtype=torch.int64), SHAPE)[0]
    assert carried(torch.empty(0), none, new).tolist() == [0.0] * 4
    assert carried(torch.ones(4), old, none).shape == (0,)


DELTAS = {
    "b.layer": drawn(),
    "a": drawn(1, torch.bfloat16),
    "none": drawn(count=0),
    "empty": drawn(count=0, shape=(0, 4)),
}


@pytest.fixture
def file(tmp_path) -> Path:
    return save_deltas(tmp_path / "new" / "deltas.safetensors", DELTAS)


def test_round_trip(file):
    loaded = load_deltas(str(file))
    assert list(loaded) == sorted(DELTAS)
    for name, delta in DELTAS.items():
        assert loaded[name].shape == delta.shape
        assert torch.equal(loaded[name].positions.flat, delta.positions.flat)
        assert torch.equal(loaded[name].positions.order, delta.positions.order)
        assert torch.equal(loaded[name].values, delta.values)
        assert loaded[name].values.dtype == delta.values.dtype
    assert file.stat().st_size < sum(delta.nbytes for delta in DELTAS.values()) + 12 * 120
    assert os.listdir(file.parent) == [file.name]


def with_tensors(change):
    def rewrite(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return rewrite


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "truncated"),
        (with_tensors(lambda t: t.pop("a.shape")), "no 'a.shape'"),
        (with_tensors(lambda t: t.update(x=torch.zeros(2))), "unexpected tensor 'x'"),
        (with_tensors(lambda t: t["a.indices"].fill_(3)), "each place once"),
        (with_tensors(lambda t: t["a.indices"][-1:].fill_(630)), r"expected places in \[0, 630\)"),
        (with_tensors(lambda t: t.update({"a.indices": t["a.indices"].flip(0).contiguous()})), "in order"),
        (with_tensors(lambda t: t.update({"a.values": t["a.values"][1:].clone()})), "40 indices and 39 values"),
        (with_tensors(lambda t: t.update({"a.indices": t["a.values"].clone()})), "a vector of int32 or int64"),
        (with_tensors(lambda t: t["a.values"].fill_(float("nan"))), "'a.values' holds non-finite"),
        (with_tensors(lambda t: t.update({"a.shape": torch.tensor([-1, 9])})), "no negative number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_spoilt_file(file, spoil, message):
    spoil(file)
    with pytest.raises(ValueError, match=message):
        load_deltas(file)


def test_nothing_is_written_of_what_is_no_delta(file):
    before = file.read_bytes()
    bad = SparseDelta(drawn().positions, torch.full((40,), float("inf")))
    for deltas, error in (
        ({"a": drawn(), "b": bad}, ValueError),
        ({"a": torch.zeros(3)}, TypeError),
        ({1: drawn()}, TypeError),
    ):
        with pytest.raises(error):
            save_deltas(file, deltas)
    assert file.read_bytes() == before
