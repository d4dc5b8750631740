"""`multi_lora_linear`: samples that each run their own adapter, against every peer that can run here (`many`).

On a CPU layers that serve 8 and 64 adapters; on a GPU prefill and the update of decoding by itself, the adapters of a
measurement exceeding the cache. Then a training step, against one with a single adapter on the same rows.
"""

from __future__ import annotations

from benchmarks import rounds
from benchmarks.many import PEERS, ManySpec, layer_specs, training_specs
from benchmarks.peers import Peer
from benchmarks.problems import FORWARD, FORWARD_BACKWARD


@rounds.parametrized(training_specs(), (FORWARD_BACKWARD,), PEERS)
def test_multi_lora_linear_in_training(benchmark, spec: ManySpec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)


@rounds.parametrized(layer_specs(), (FORWARD,), PEERS)
def test_multi_lora_linear(benchmark, spec: ManySpec, mode: str, peer: Peer) -> None:
    rounds.run(benchmark, spec, mode, peer)
