"""`lora_linear` over M and over r: what LoRA adds to the frozen layer, ours and PEFT, for the charts of the report."""

from __future__ import annotations

from benchmarks import rounds
from benchmarks.peers import AUTO, FROZEN, PEFT, Peer, by_name
from benchmarks.problems import FORWARD_BACKWARD, Spec, sweep_specs


@rounds.parametrized(sweep_specs(), (FORWARD_BACKWARD,), (FROZEN, PEFT, AUTO, by_name("ours (composed)")))
def test_sweep(benchmark, spec: Spec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)
