"""`lora_linear_group`: q, k and v of grouped-query attention, against every peer that can run here (`blocks`)."""

from __future__ import annotations

from benchmarks import rounds
from benchmarks.blocks import PEERS
from benchmarks.peers import Peer
from benchmarks.problems import MODES, Spec, block_specs


@rounds.parametrized(block_specs("lora_linear_group"), MODES, PEERS)
def test_lora_linear_group(benchmark, spec: Spec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)
