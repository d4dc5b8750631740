"""`dora_linear`: a DoRA layer, against every peer that can run here (`blocks`)."""

from __future__ import annotations

from benchmarks import rounds
from benchmarks.blocks import PEERS
from benchmarks.peers import Peer
from benchmarks.problems import MODES, Spec, block_specs


@rounds.parametrized(block_specs("dora_linear"), MODES, PEERS)
def test_dora_linear(benchmark, spec: Spec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)
