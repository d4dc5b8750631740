"""`lora_linear`, forward and forward + backward, against every peer that can run here.

    python -m pytest benchmarks/bench_lora_linear.py --benchmark-json=out.json

A peer's result is compared with float64 first (`gate`); a wrong one fails and has no time. Every round also times PEFT
and the frozen layer, so that the ratios hold while the machine's speed changes.
"""

from __future__ import annotations

from benchmarks import rounds
from benchmarks.peers import PEERS, Peer
from benchmarks.problems import MODES, Spec, specs


@rounds.parametrized(specs(), MODES, PEERS)
def test_lora_linear(benchmark, spec: Spec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)
