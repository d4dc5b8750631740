"""`nf4_lora_linear`: QLoRA's layer, against every peer that can run here (`quantised`)."""

from __future__ import annotations

from benchmarks import rounds
from benchmarks.peers import Peer
from benchmarks.problems import FORWARD, FORWARD_BACKWARD, Spec, nf4_specs
from benchmarks.quantised import PEERS


@rounds.parametrized(nf4_specs("nf4_lora_linear", FORWARD), (FORWARD,), PEERS)
def test_nf4_lora_linear(benchmark, spec: Spec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)


@rounds.parametrized(nf4_specs("nf4_lora_linear", FORWARD_BACKWARD), (FORWARD_BACKWARD,), PEERS)
def test_nf4_lora_linear_in_training(benchmark, spec: Spec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)
