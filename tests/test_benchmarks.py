"""The benchmarks' own logic: no speed for a wrong result, honest ratios, stale marks, charts of what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import (
    block_memory,
    blocks,
    charts,
    compare,
    gate,
    memory,
    peers,
    provenance,
    report,
    rounds,
    timing,
)
from benchmarks.peers import AUTO, FROZEN, PEERS, PEFT
from benchmarks.problems import FORWARD, FORWARD_BACKWARD, Ceilings, Spec, block_specs, sweep_specs
from peft_kernels import dispatch
from peft_kernels._table import table

SMALL = Spec(24, 32, 40, 4)
DROPPING = Spec(24, 32, 40, 4, dropout_p=0.25)
MIXED = Spec(24, 32, 40, 4, torch.bfloat16, torch.float32)
ROOT = Path(__file__).resolve().parent.parent

runnable = [peer for peer in PEERS if peer.unavailable(SMALL) is None]


@pytest.fixture(autouse=True)
def _forget_what_was_checked():
    gate.check.cache_clear()
    yield
    gate.check.cache_clear()


def test_every_peer_is_runnable_or_says_why_not():
    assert {"frozen", "peft", "ours (auto)", "ours (composed)", "ours (reference)"} <= {peer.name for peer in runnable}
    for peer in PEERS:
        reason = peer.unavailable(SMALL)
        assert reason is None or len(reason) > 10, f"{peer.name}: {reason!r}"


@pytest.mark.parametrize("spec", [SMALL, DROPPING], ids=lambda spec: spec.label)
@pytest.mark.parametrize("peer", runnable, ids=lambda peer: peer.name)
def test_the_gate_lets_right_results_pass(peer, spec):
    assert gate.check(peer, spec) == "exact mask"


@pytest.mark.parametrize("name", ["peft", "peft autocast", "ours (composed)"])
def test_the_gate_with_16_bit_weights(name):
    assert gate.check(peers.by_name(name), MIXED) == "exact mask"


BLOCKS = [Spec(48, 64, 96, 12, op=op) for op in blocks.OPS]
BLOCKS += [Spec(48, 64, 96, 12, dropout_p=0.25, op=op) for op in blocks.OPS]
BLOCKS += [Spec(96, 64, 96, 8, torch.bfloat16, torch.float32, op=op) for op in blocks.OPS]


@pytest.mark.parametrize("spec", BLOCKS, ids=lambda spec: spec.label)
def test_the_gate_lets_right_blocks_pass(spec):
    """Whoever can run here is right; ours with the very dropout mask, others' masks are not known."""
    checked = {peer.name: gate.check(peer, spec) for peer in blocks.PEERS if peer.unavailable(spec) is None}
    assert {"frozen", "peft", "ours (auto)", "ours (composed)", "ours (reference)", "peft accelerated"} <= set(checked)
    assert checked["ours (auto)"] == checked["ours (composed)"] == "exact mask"
    assert checked["peft"] == ("at dropout 0" if spec.dropout_p else "exact mask")
    assert ("ours, one by one" in checked) == (spec.op != "dora_linear")


@pytest.mark.parametrize("op", blocks.OPS)
@pytest.mark.parametrize("spoiled", ["forward", "backward"])
def test_the_gate_refuses_a_wrong_block(monkeypatch, op, spoiled):
    """Any one result of ours is off by 1 %."""
    module = dispatch.implementation(op, "composed")
    right = getattr(module, spoiled)

    def wrong(*arguments):
        return spoil(right(*arguments))

    monkeypatch.setattr(module, spoiled, wrong)
    spec = Spec(48, 64, 96, 12, op=op)
    with pytest.raises(gate.WrongResult, match=r"ours \(composed\) is wrong.*not timed"):
        gate.check(block_peer("ours (composed)"), spec)
    gate.check(blocks.PEFT, spec)


def block_peer(name: str) -> peers.Peer:
    return next(peer for peer in blocks.PEERS if peer.name == name)


def spoil(results):
    """The first tensor of a nesting times 1.01."""
    if isinstance(results, torch.Tensor):
        return results * 1.01
    first, *others = results
    return (spoil(first), *others)


def test_another_mask_than_the_seed_s_is_refused(monkeypatch):
    module = dispatch.implementation("dora_linear", "composed")
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *a: forward(*a[:-1], a[-1] + 1))
    with pytest.raises(gate.WrongResult, match="not timed"):
        gate.check(block_peer("ours (composed)"), Spec(48, 64, 96, 12, dropout_p=0.25, op="dora_linear"))


def test_every_block_peer_is_runnable_or_says_why_not():
    for spec in (spec for op in blocks.OPS for spec in block_specs(op)):
        for peer in blocks.PEERS:
            reason = peer.unavailable(spec)
            assert reason is None or len(reason) > 10, f"{peer.name}: {reason!r}"


@pytest.mark.parametrize("spoiled", ["y", "lora_A", "lora_B", "x"])
def test_the_gate_refuses_a_wrong_backend(monkeypatch, spoiled):
    """One result of one implementation is off by 1 %: its peer raises, the others do not."""
    module = dispatch.implementation("lora_linear", "composed")
    forward, backward = module.forward, module.backward
    if spoiled == "y":

        def wrong(*arguments):
            y, s = forward(*arguments)
            return y * 1.01, s

        monkeypatch.setattr(module, "forward", wrong)
    else:
        position = ("x", "weight", "bias", "lora_A", "lora_B").index(spoiled)

        def wrong(*arguments):
            grads = list(backward(*arguments))
            grads[position] = grads[position] * 1.01
            return tuple(grads)

        monkeypatch.setattr(module, "backward", wrong)
    with pytest.raises(gate.WrongResult, match=rf"ours \(composed\) is wrong.*not timed: {spoiled}: "):
        gate.check(peers.by_name("ours (composed)"), SMALL)
    gate.check(peers.by_name("ours (reference)"), SMALL)
    gate.check(PEFT, SMALL)


def test_the_gate_refuses_a_mask_that_backward_does_not_share(monkeypatch):
    module = dispatch.implementation("lora_linear", "reference")
    backward = module.backward

    def another_seed(grad_y, x, s, weight, a, b, scaling, p, seed, needs):
        return backward(grad_y, x, s, weight, a, b, scaling, p, None if seed is None else seed + 1, needs)

    monkeypatch.setattr(module, "backward", another_seed)
    with pytest.raises(gate.WrongResult, match=r"not timed: (x|lora_A): "):
        gate.check(peers.by_name("ours (reference)"), DROPPING)


def test_a_wrong_result_gets_no_time(tmp_path):
    """The benchmark itself, run on a backend that is wrong: it fails, and the file has no row for it."""
    plugin = tmp_path / "spoil.py"
    plugin.write_text(
        "from peft_kernels.kernels.reference import lora_linear as m\n"
        "right = m.forward\n"
        "m.forward = lambda *a: tuple(t * 1.01 for t in right(*a))\n"
    )
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/bench_lora_linear.py",
        "-q",
        "-p",
        "spoil",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-k", "M4 and (reference or frozen) and not backward", f"--benchmark-json={out}"]
    environment = {"PYTHONPATH": f"{tmp_path}", "PATH": "", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ours (reference) is wrong" in done.stdout
    content = json.loads(out.read_text())
    assert [row["extra_info"]["peer"] for row in content["benchmarks"]] == ["frozen"]
    assert "node" not in content["machine_info"]
    assert "data" not in content["benchmarks"][0]["stats"]
    (row,) = report.load(out).rows
    assert row.info["percent_of_floor"] == pytest.approx(100 * row.info["floor_s"] / row.stats["median"], abs=0.1)


def test_bytes_kept_for_backward():
    """What the table says is kept is what the contract allows: x and S, nothing else; PEFT keeps more under dropout."""
    spec = Spec(64, 32, 48, 4, dropout_p=0.25)
    kept = {peer.name: _kept(peer, spec) for peer in (FROZEN, PEFT, AUTO)}
    x, s = 64 * 32 * 4, 64 * 4 * 4
    assert kept["frozen"] == 0
    assert kept["ours (auto)"] == x + s + 8
    assert kept["peft"] >= x + s + 64 * 32  # a mask or a dropped-out copy of x, in whatever form


def _kept(peer, spec) -> int:
    layer = peer.layer(spec)
    return memory.saved_bytes(layer, layer.parameters())


def test_a_layer_computes_the_formula():
    """The peers' common problem is the layer that users train, at the scaling that the problem names."""
    problem = SMALL.draw()
    t = problem.tensors
    y, grads = PEFT.build(problem).result()
    low_rank = F.linear(F.linear(t["x"], t["lora_A"]), t["lora_B"])
    torch.testing.assert_close(y, F.linear(t["x"], t["weight"]) + problem.scaling * low_rank)
    assert set(grads) == {"x", "lora_A", "lora_B"}


def test_floor():
    """The main shape's forward floor on an H200's measured ceilings, as in the design: 351 µs of arithmetic."""
    spec = Spec(8192, 4096, 4096, 16, torch.bfloat16, torch.bfloat16)
    ceilings = Ceilings(790e12, 4.3e12)
    assert spec.flop(FORWARD) == 2 * 8192 * (4096 * 4096 + 2 * 16 * 4096)
    assert spec.floor(FORWARD, ceilings) == pytest.approx(351e-6, rel=0.005)
    assert spec.floor(FORWARD_BACKWARD, ceilings) == pytest.approx((351 + 353) * 1e-6, rel=0.005)
    decode = Spec(1, 4096, 4096, 16, torch.bfloat16, torch.bfloat16)
    assert decode.floor(FORWARD, ceilings) == pytest.approx(decode.bytes(FORWARD) / 4.3e12)


def test_floor_of_blocks():
    """A group and an MLP need what their layers need, but x is read once."""
    layer, group, mlp = (Spec(64, 32, 48, 4, op=op) for op in ("lora_linear", "lora_linear_group", "lora_swiglu_mlp"))
    assert Spec(64, 32, 48, 4, op="dora_linear").flop(FORWARD) == layer.flop(FORWARD) == 2 * 64 * (32 * 48 + 4 * 80)
    assert group.layers == ((32, 48), (32, 12), (32, 12))
    assert group.flop(FORWARD) == sum(2 * 64 * (32 * n + 4 * (32 + n)) for n in (48, 12, 12))
    assert mlp.flop(FORWARD_BACKWARD) == 3 * (2 * 2 * 64 * 32 * 48 + 3 * 2 * 64 * 4 * 80)
    assert group.bytes(FORWARD) == 4 * (64 * 32 + 32 * 72 + 64 * 72 + 4 * (3 * 32 + 72))
    labels = [spec.label for spec in (layer, group, mlp, *sweep_specs())]
    assert len(set(labels)) == len(labels)
    for spec in (layer, group, mlp):
        assert rounds.peers_of(spec).AUTO.unavailable(spec) is None
        assert peers.chosen_backend(spec).op == spec.op


class Scripted:
    """A stopwatch that reads out what it was given, and notes when it was asked."""

    def __init__(self, name, readings, log):
        self.name, self.readings, self.log = name, iter(readings), log

    def sample(self):
        self.log.append(self.name)
        return next(self.readings)


def test_ratio_survives_a_machine_that_changes_speed():
    """The machine gets 10 times slower half-way. Pairs still say 0.8; two runs, one after the other, could say 8."""
    log: list[str] = []
    speed = [1.0] * 5 + [10.0] * 5
    a = Scripted("a", [0.8 * s for s in speed], log)
    b = Scripted("b", speed, log)
    result = compare.ratio(a, b, rounds=10)
    assert result.ratio == pytest.approx(0.8)
    assert result.best == pytest.approx(0.8)
    assert (result.low, result.high) == (pytest.approx(0.8), pytest.approx(0.8))
    assert log[:4] == ["a", "b", "b", "a"], "whoever goes first alternates"


def test_clock_shows_the_stopwatch_and_not_the_time():
    clock = timing.Clock()
    start = clock()
    clock.advance(0.25)
    assert clock() - start == 0.25
    calls = []
    watch = timing.HostStopwatch([lambda: calls.append(1)])
    assert watch.calls > 1
    assert 0 < watch.sample() < 1e-3


def test_digest_changes_with_the_sources(tmp_path):
    kernels = tmp_path / "peft_kernels" / "kernels" / "triton"
    for folder in (kernels, tmp_path / "peft_kernels" / "ops", tmp_path / "peft_kernels" / "tuning"):
        folder.mkdir(parents=True)
    (kernels / "lora_linear.py").write_text("one")
    before = provenance.digest("lora_linear", "triton", tmp_path)
    assert provenance.digest("lora_linear", "triton", tmp_path) == before
    (kernels / "nf4_linear.py").write_text("another op")
    assert provenance.digest("lora_linear", "triton", tmp_path) == before
    seen = {before}
    for name in (
        "kernels/triton/_shared.py",
        "ops/lora_linear.py",
        "tuning/sm_90.json",
        "kernels/triton/lora_linear.py",
    ):
        (tmp_path / "peft_kernels" / name).write_text("changed")
        seen.add(provenance.digest("lora_linear", "triton", tmp_path))
    assert len(seen) == 5, "each change gives another digest"


def test_every_backend_has_sources():
    for op, order in dispatch.ORDER.items():
        for backend in order:
            paths = {path.relative_to(ROOT).as_posix() for path in provenance.sources(op, backend)}
            assert {f"peft_kernels/ops/{op}.py", f"peft_kernels/kernels/{backend}/{op}.py"} <= paths


def recorded(tmp_path, **info) -> Path:
    """A result file of one row, as `make bench` writes it."""
    facts = {
        "op": "lora_linear", "problem": "P", "mode": FORWARD, "peer": "ours (composed)", "backend": "composed",
        "digest": provenance.digest("lora_linear", "composed"), "checked": "exact mask", "timer": "host",
        "saved_bytes": 2**20, "percent_of_floor": 50.0,
        "ratio_to_peft": {"ratio": 0.75}, "ratio_to_frozen": {"ratio": 1.2},
    } | info  # fmt: skip
    stats = {"median": 1e-3, "iqr": 1e-5}
    content = {
        "machine_info": {"device": "cpu", "versions": {"torch": "2.13.0"}, "cores": 2, "load_average": 1.5},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [{"stats": stats, "extra_info": facts}],
    }
    path = tmp_path / "bench_lora_linear.json"
    path.write_text(json.dumps(content))
    return path


def test_report_marks_what_has_changed_since(tmp_path, capsys):
    path = recorded(tmp_path)
    assert not report.load(path).rows[0].stale
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "stale" not in text
    assert "1000.0" in text
    assert "busy" not in text
    assert "0.75" in text
    path = recorded(tmp_path, digest="of another source")
    assert report.load(path).rows[0].stale
    assert report.main([str(path), "--output", str(tmp_path / "report.md")]) == 0
    assert "stale" in (tmp_path / "report.md").read_text()


def test_report_says_that_the_machine_was_busy(tmp_path, capsys):
    path = recorded(tmp_path)
    path.write_text(path.read_text().replace('"load_average": 1.5', '"load_average": 9.5'))
    assert report.main([str(path)]) == 0
    assert "The machine was busy" in capsys.readouterr().out


def test_foreign_peers_are_never_stale(tmp_path):
    content = json.loads(recorded(tmp_path).read_text())
    for key in ("digest", "backend"):
        del content["benchmarks"][0]["extra_info"][key]
    path = tmp_path / "bench_other.json"
    path.write_text(json.dumps(content))
    assert not report.load(path).rows[0].stale


def test_report_plots(tmp_path):
    target = report.plot(report.load(recorded(tmp_path)), tmp_path / "plots")
    assert target.read_bytes().startswith(b"\x89PNG")


def swept(tmp_path, name="bench_sweep.json") -> Path:
    """A result file over M at r = 16 and over r at M = 512; ours adds r % and PEFT 2 r %, the frozen layer nothing."""
    sizes = [(m, 16) for m in (1, 64, 512)] + [(512, r) for r in (4, 64)]
    content = json.loads(recorded(tmp_path).read_text())
    (row,) = content["benchmarks"]
    content["benchmarks"] = []
    for (m, r), (peer, factor) in ((s, p) for s in sizes for p in (("frozen", 0), ("peft", 2), ("ours (auto)", 1))):
        ratio = {"ratio": 1 + factor * r / 100, "low": 1.0, "high": 2.0, "best": 1.0}
        info = row["extra_info"] | {
            "peer": peer, "m": m, "k": 64, "n": 64, "r": r, "dropout_p": 0.0, "ratio_to_frozen": ratio,
        }  # fmt: skip
        content["benchmarks"].append({"stats": row["stats"], "extra_info": info})
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def test_charts_show_what_was_measured(tmp_path, monkeypatch):
    path, drawn = swept(tmp_path), {}

    def note(panel, peer, rows, axis):
        drawn[peer, axis] = [(row.info[axis], round(row.info["ratio_to_frozen"]["ratio"], 6)) for row in rows]
        line(panel, peer, rows, axis)

    line = charts._line
    monkeypatch.setattr(charts, "_line", note)
    assert charts.main([str(path), "--output", str(tmp_path / "images")]) == 0
    (image,) = (tmp_path / "images").iterdir()
    assert image.name == f"overhead-{tmp_path.name}.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    assert drawn == {
        ("peft", "m"): [(1, 1.32), (64, 1.32), (512, 1.32)],
        ("ours (auto)", "m"): [(1, 1.16), (64, 1.16), (512, 1.16)],
        ("peft", "r"): [(4, 1.08), (16, 1.32), (64, 2.28)],
        ("ours (auto)", "r"): [(4, 1.04), (16, 1.16), (64, 1.64)],
    }


def test_a_chart_needs_sizes(tmp_path, capsys):
    assert charts.main([str(recorded(tmp_path)), "--output", str(tmp_path)]) == 1
    assert "no row with sizes and a ratio to the frozen layer" in capsys.readouterr().err


def test_memory_of_blocks():
    """Two small blocks: with dropout PEFT keeps masks and copies of every x, ours neither; both peaks hold what is
    kept."""
    size = block_memory.Size(tokens=64, hidden=32, intermediate=64, heads=4, kv_heads=2, layers=2)
    records = block_memory.measure(size, "cpu", torch.float32)
    found = {(record.peer, record.dropout_p): record for record in records}
    inputs = 2 * 4 * 64 * (6 * 32 + 64)  # bytes of the inputs of seven layers in two blocks
    growth = found["peft", 0.05].kept_bytes - found["peft", 0.0].kept_bytes
    assert growth >= 1.25 * inputs, "a copy of each, and a mask of at least one byte an element"
    for peer in (block_memory.ACCELERATED, block_memory.OURS):
        assert found[peer, 0.05].kept_bytes - found[peer, 0.0].kept_bytes < 1000, "seeds"
        assert found[peer, 0.0].kept_bytes <= found["peft", 0.0].kept_bytes
        assert block_memory.missing(records, peer) < 0.1 * growth
    assert all(record.peak_bytes >= record.kept_bytes - 4 * 64 * 32 for record in records), "x was there before"


def test_memory_of_a_wrong_model_is_not_measured(monkeypatch):
    accelerate = block_memory.peft_kernels.accelerate

    def wrong(model):
        accelerate(model)
        next(p for n, p in model.named_parameters() if "lora_B" in n).data.mul_(1.01)

    monkeypatch.setattr(block_memory.peft_kernels, "accelerate", wrong)
    with pytest.raises(AssertionError, match="peft accelerated is wrong"):
        block_memory.measure(block_memory.Size(64, 32, 64, 4, 2, 2), "cpu", torch.float32)


def test_bytes_of_a_step():
    def step():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(1 << 20, dtype=torch.uint8)
        del a, b
        return torch.empty(1 << 19, dtype=torch.uint8)

    assert memory.peak_bytes(step, "cpu") == pytest.approx(2 << 20, rel=0.01)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": [{"stats": {}}]}'])
def test_report_names_a_file_that_is_none(tmp_path, capsys, content):
    path = tmp_path / "bench_broken.json"
    path.write_text(content)
    assert report.main([str(path)]) == 1
    assert "bench_broken.json: not a benchmark result" in capsys.readouterr().err


def test_committed_results_can_be_reported():
    paths = report.committed()
    assert paths, "no result set is committed"
    for path in paths:
        run = report.load(path)
        assert run.rows
        assert run.machine["device"] in report.render(run)


def test_table():
    text = table([("a", "1.5", None), ("bbbb", "-22", "x")], ("name", "time", "note"))
    assert text.splitlines() == ["name  time  note", "----  ----  ----", "a      1.5", "bbbb   -22  x"]
    markdown = table([("a", "1.5")], ("name", "time"), markdown=True)
    assert markdown.splitlines()[1] == "| ---- | ---: |"
    with pytest.raises(ValueError, match=r"argument 2 is longer|shorter"):
        table([("a",)], ("name", "time"))


def test_report_shows_bars(tmp_path, capsys):
    ratio = {"ratio": 0.6, "low": 0.5, "high": 0.8, "best": 0.7}
    bars = {"median_s": 12e-6, "ratio_to_vllm": 2 / 3, "ratio_to_punica": 2 / 3, "ratio_to_peft": 0.5}
    path = recorded(tmp_path, ratio_to_vllm=ratio, ratio_to_peft=ratio, bars=bars)
    assert report.main([str(path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "composed" in line)
    for text in ("0.60 x vllm", "bar 12 µs **missed**", "bar 0.67 x vllm met", "bar 0.67 x punica not compared",
                 "bar 0.50 x peft **missed**"):  # fmt: skip
        assert text in line
