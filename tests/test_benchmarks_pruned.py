"""The benchmarks of pruned weights: no speed for a wrong result, bars that are met or told, charts of the files."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import (
    block_sparse_time,
    compare,
    csr_time,
    delta_time,
    density_charts,
    gate,
    masked_time,
    peers,
    pruned,
)
from benchmarks.problems import FORWARD, MODES
from peft_kernels import dispatch
from tests.test_benchmarks import spoil

RATIO = compare.Ratio._fields


def test_blocks_agree_with_float64_before_they_are_timed(monkeypatch):
    problem = block_sparse_time.Problem(6, 64, 96, 32, 0.5)
    problem.check()
    shapes = {pair.against: pair.theirs().shape for pair in problem.pairs() if pair.step == "forward"}
    assert set(shapes.values()) == {torch.Size((6, 64))}
    for pair in problem.pairs():
        if pair.step == "training":
            ours, theirs = pair.ours(), pair.theirs()
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
            blocks = theirs[1][problem.mask.bool()]
            torch.testing.assert_close(ours[1].sum(), blocks.sum(), rtol=1e-3, atol=1e-3)
    correct = block_sparse_time.functional.sparse_linear
    monkeypatch.setattr(block_sparse_time.functional, "sparse_linear", lambda *t: correct(*t) * 1.001)
    with pytest.raises(AssertionError, match=r"density 0\.5"):
        problem.check()


def test_kept_weights_agree_with_float64_before_they_are_timed(monkeypatch):
    problem = csr_time.Problem((1, 9), 40, 56, 0.3)
    problem.check()
    for pair in problem.pairs():
        ours, theirs = (([r] if isinstance(r, torch.Tensor) else r) for r in (pair.ours(), pair.theirs()))
        torch.testing.assert_close(list(ours), list(theirs), rtol=1e-4, atol=1e-5)
    assert {pair.step for pair in problem.pairs()} == {"forward, M=1", "forward, M=9", "forward and dx, M=9"}
    correct = csr_time.functional.sparse_linear
    monkeypatch.setattr(csr_time.functional, "sparse_linear", lambda *t: correct(*t) * 1.001)
    with pytest.raises(AssertionError, match=r"density 0\.3, y"):
        problem.check()


def test_chosen_weights_agree_with_peft_before_they_are_timed(monkeypatch):
    pytest.importorskip("peft")
    layers = delta_time.Layers(delta_time.Sizes(9, 40, 56), 1)
    layers.check()
    with torch.no_grad():
        layers.their_values[0] += 0.1
    with pytest.raises(AssertionError, match="y: PEFT's error"):
        layers.check()
    layers.their_values.data.copy_(layers.ours.values)
    correct = delta_time.SparseDeltaLinear.forward
    monkeypatch.setattr(delta_time.SparseDeltaLinear, "forward", lambda layer, x: correct(layer, x) * 1.001)
    with pytest.raises(AssertionError, match="y: error"):
        layers.check()


def test_masked_layers_agree_with_what_users_write(monkeypatch):
    monkeypatch.setattr(masked_time, "N", 40)
    monkeypatch.setattr(masked_time, "K", 72)
    made = masked_time.pairs(masked_time.Problem(9, torch.float32))
    for pair in made:
        masked_time.check(pair)
    assert {pair.against for pair in made if pair.bar} == {"torch.nn.utils.prune"}
    wrong = made[0]._replace(ours=lambda: [made[0].ours()[0] * 1.001])
    with pytest.raises(AssertionError, match="forward against"):
        masked_time.check(wrong)


@pytest.mark.parametrize(("ratio", "extra", "missed"), [(1.2, 0.05, False), (1.0, 0.05, True), (1.2, 0.2, True)])
def test_a_missed_bar_is_told(ratio, extra, missed):
    record = {"dtype": "float32", "bar": 1.08, "our_extra": extra, **dict.fromkeys(RATIO, ratio)}
    assert masked_time.misses(record) == missed


def test_density_charts_show_what_was_measured(tmp_path):
    """Another way's time over the base is the quotient of its ratio to ours and of the base's."""
    times = {"dense": 2.0, "mask": 3.0}
    records = [
        {"density": density, "step": step, "against": against, "ratio": r * density, "low": r * density - 0.1,
         "high": r * density + 0.1}
        for density in (0.1, 0.5) for step in ("forward", "training") for against, r in times.items()
    ]  # fmt: skip
    lines = density_charts.relative_to("dense", [record for record in records if record["step"] == "forward"])
    assert [(density, round(time, 3)) for density, time, *_ in lines["mask"]] == [(0.1, 1.5), (0.5, 1.5)]
    assert [(density, round(time, 3)) for density, time, *_ in lines["peft_kernels"]] == [(0.1, 5.0), (0.5, 1.0)]
    told = {"sizes": {"m": 6, "n": 64, "k": 96}, "block": 32, "threads": 2, "records": records}
    (tmp_path / "block_sparse_time.json").write_text(json.dumps(told))
    arguments = ["--results", str(tmp_path), "--output", str(tmp_path / "images")]
    assert density_charts.main(arguments) == 1  # files are missing
    kept = [{**record, "step": step} for record in records if record["step"] == "forward" for step in ("1", "2", "3")]
    (tmp_path / "csr_time.json").write_text(json.dumps({"records": kept}))
    deltas = [{**record, "against": "two matmuls"} for record in records if record["step"] == "forward"]
    (tmp_path / "delta_time.json").write_text(json.dumps(deltas))
    assert density_charts.main(arguments) == 0
    assert (tmp_path / "images" / f"density-{tmp_path.name}.png").stat().st_size > 10_000


SPECS = [
    pruned.PrunedSpec(48, 96, 80, 0),
    pruned.PrunedSpec(48, 96, 80, 0, clean=True),
    pruned.PrunedSpec(48, 96, 160, 0, op=pruned.SPARSE, layout="block", density=0.3),
    pruned.PrunedSpec(5, 96, 80, 0, op=pruned.SPARSE, layout="bitmap", density=0.3),
    pruned.PrunedSpec(5, 96, 80, 0, op=pruned.SPARSE, layout="csr", density=0.3),
    pruned.PrunedSpec(48, 96, 80, 0, op=pruned.DELTA, density=0.05),
]


@pytest.fixture
def _forget_what_was_checked():
    gate.check.cache_clear()
    yield
    gate.check.cache_clear()


@pytest.mark.usefixtures("_forget_what_was_checked")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_the_gate_lets_right_layers_pass_and_refuses_a_wrong_one(monkeypatch, spec):
    checked = {peer.name for peer in pruned.PEERS if peer.unavailable(spec) is None and gate.check(peer, spec)}
    assert {"frozen", "ours (auto)", "ours (composed)", "ours (reference)"} <= checked
    assert ("mask in each call" in checked) == (spec.op == pruned.MASKED)
    assert ("peft" in checked) == (spec.op == pruned.DELTA)
    module = dispatch.implementation(spec.op, "composed")
    right = module.backward
    monkeypatch.setattr(module, "backward", lambda *arguments: spoil(right(*arguments)))
    gate.check.cache_clear()
    composed = next(peer for peer in pruned.PEERS if peer.backend == "composed")
    with pytest.raises(gate.WrongResult, match=r"ours \(composed\) is wrong.*not timed"):
        gate.check(composed, spec)


def test_every_peer_of_pruned_weights_is_runnable_or_says_why_not():
    for mode in MODES:
        specs = pruned.specs(mode)
        assert len({spec.label for spec in specs}) == len(specs)
        for spec in specs:
            assert all((peer.unavailable(spec) or "runs here") for peer in pruned.PEERS)
            assert peers.chosen_backend(spec).op == spec.op


def test_work_and_bars_of_pruned_layers():
    """4 rows, 8 x 16 weights of 4 bytes, a quarter kept: by hand."""
    block = pruned.PrunedSpec(4, 16, 8, 0, op=pruned.SPARSE, layout="block", density=0.25)
    assert block.flop(FORWARD) == 256
    assert block.flop(MODES[1]) == 768
    x, y, kept = 256, 128, 128
    assert block.bytes(FORWARD) == x + kept + y
    assert block.bytes(MODES[1]) == (x + kept + y) + (y + kept + 2 * x + kept)
    bitmap = pruned.PrunedSpec(4, 16, 8, 0, op=pruned.SPARSE, layout="bitmap", density=0.25)
    assert bitmap.bytes(FORWARD) == x + kept + 16 + y
    masked = pruned.PrunedSpec(4, 16, 8, 0)
    assert masked.bytes(FORWARD) == x + 512 + 16 + y
    assert pruned.bars(pruned.PrunedSpec(256, 4096, 1024, 0), MODES[1]) == {"ratio_to_mask in each call": 0.92}
    assert pruned.bars(pruned.PrunedSpec(256, 4096, 1024, 0), FORWARD) == {}
