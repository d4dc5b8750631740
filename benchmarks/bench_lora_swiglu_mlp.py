"""`lora_swiglu_mlp`: a SwiGLU block, against every peer that can run here (`blocks`)."""

from __future__ import annotations

from benchmarks import rounds
from benchmarks.blocks import PEERS
from benchmarks.peers import Peer
from benchmarks.problems import MODES, Spec, block_specs


@rounds.parametrized(block_specs("lora_swiglu_mlp"), MODES, PEERS)
def test_lora_swiglu_mlp(benchmark, spec: Spec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)
