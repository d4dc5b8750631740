"""The benchmarks of layers in 4 bits: what is compared, refused and reported."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import (
    gate,
    peers,
    quantised,
    report,
    rounds,
)
from benchmarks.problems import FORWARD, FORWARD_BACKWARD, Ceilings, Spec, nf4_specs
from peft_kernels import dispatch
from tests.test_benchmarks import _forget_what_was_checked, recorded, spoil  # noqa: F401

QUANTISED = [Spec(48, 128, 96, r, dtype, op=op) for op, r in (("nf4_linear", 0), ("nf4_lora_linear", 12))
             for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("spec", QUANTISED, ids=lambda spec: spec.label)
def test_the_gate_lets_right_quantised_layers_pass(spec):
    checked = {peer.name: gate.check(peer, spec) for peer in quantised.PEERS if peer.unavailable(spec) is None}
    assert {"frozen", "dequantised", "ours (auto)", "ours (composed)", "ours (reference)"} <= set(checked)
    assert set(checked) & {"peft", "bitsandbytes"} == {"peft" if spec.r else "bitsandbytes"}
    assert ("nf4_linear" in checked) == ("peft accelerated" in checked) == (spec.op == "nf4_lora_linear")


@pytest.mark.parametrize("op", quantised.OPS)
@pytest.mark.parametrize("spoiled", ["forward", "backward"])
def test_the_gate_refuses_a_wrong_quantised_layer(monkeypatch, op, spoiled):
    """One decoded weight of the specification is another's: its peers raise, others do not."""
    module = dispatch.implementation(op, "reference")
    right = getattr(module, spoiled)
    monkeypatch.setattr(module, spoiled, lambda *arguments: spoil_any(right(*arguments)))
    spec = Spec(48, 96, 96, 12 * (op == "nf4_lora_linear"), op=op)
    with pytest.raises(gate.WrongResult, match=r"ours \(reference\) is wrong.*not timed"):
        gate.check(next(peer for peer in quantised.PEERS if peer.name == "ours (reference)"), spec)
    gate.check(quantised.FROZEN, spec)


def spoil_any(results):
    return results * 1.01 if isinstance(results, torch.Tensor) else spoil(results)


def test_every_quantised_peer_is_runnable_or_says_why_not():
    for op in quantised.OPS:
        for mode in (FORWARD, FORWARD_BACKWARD):
            for spec in nf4_specs(op, mode):
                for peer in quantised.PEERS:
                    reason = peer.unavailable(spec)
                    assert reason is None or len(reason) > 10, f"{peer.name}: {reason!r}"
                assert peers.chosen_backend(spec).op == op


def test_floor_of_quantised_layers():
    """The figures of one row on an H200's 4.3 TB/s: 2.0 µs for 4096 x 4096, 7.1 for 14336 x 4096."""
    ceilings = Ceilings(790e12, 4.3e12)
    for n, expected in ((4096, 2.02e-6), (14336, 7.05e-6)):
        spec = Spec(1, 4096, n, 0, torch.bfloat16, torch.bfloat16, op="nf4_linear")
        assert spec.floor(FORWARD, ceilings) == pytest.approx(expected, rel=0.01)


def test_facts_of_a_quantised_layer():
    spec = Spec(4, 64, 64, 0, op="nf4_linear", threads=1)
    assert [peer.name for peer in rounds.peers_of(spec).BASELINES if peer.unavailable(spec) is None] == [
        "bitsandbytes", "frozen",
    ]  # fmt: skip
    facts = rounds.facts(quantised.AUTO, spec, FORWARD, "exact mask", rounds.stopwatch(quantised.AUTO, spec, FORWARD))
    assert facts["saved_bytes"] == 0, "the weight is a parameter, and nothing else is kept"
    assert facts["backend"] in dispatch.ORDER["nf4_linear"]


def test_report_compares_quantised_layers_with_bitsandbytes(tmp_path, capsys):
    path = recorded(tmp_path, ratio_to_bitsandbytes={"ratio": 0.4})
    content = json.loads(path.read_text())
    del content["benchmarks"][0]["extra_info"]["ratio_to_peft"]
    path.write_text(json.dumps(content))
    assert report.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "x bnb" in text
    assert "x PEFT" not in text
    assert "0.40" in text
