"""Pruned weights (masks, compressed weights, chosen weights) against the dense layer and what users have (`pruned`).

On a GPU the weights of a measurement exceed the cache many times over, as those of a model's layers do.
"""

from __future__ import annotations

from benchmarks import rounds
from benchmarks.peers import Peer
from benchmarks.problems import FORWARD, FORWARD_BACKWARD
from benchmarks.pruned import PEERS, PrunedSpec, specs


@rounds.parametrized(specs(FORWARD), (FORWARD,), PEERS)
def test_pruned(benchmark, spec: PrunedSpec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)


@rounds.parametrized(specs(FORWARD_BACKWARD), (FORWARD_BACKWARD,), PEERS)
def test_pruned_in_training(benchmark, spec: PrunedSpec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)
