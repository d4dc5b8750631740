"""`lora_linear`, forward and forward + backward, against every peer that can run here.

    python -m pytest benchmarks/bench_lora_linear.py --benchmark-json=out.json

A peer's result is compared with float64 first (`gate`); a wrong one fails and has no time. Every round also times PEFT
and the frozen layer, so that the ratios hold while the machine's speed changes.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import compare, gate, memory, peers, provenance, timing
from benchmarks.peers import FROZEN, PEERS, PEFT, Peer
from benchmarks.problems import FORWARD, MODES, Ceilings, Spec, specs

ROUNDS = 20
OP = "lora_linear"


@functools.cache
def ceilings(device: str, dtype: torch.dtype, threads: int) -> Ceilings:
    return timing.measure_ceilings(device, dtype)


def stopwatch(peer: Peer, spec: Spec, mode: str) -> timing.Stopwatch:
    """The peer's stopwatch over as many sets of tensors as exceed the cache."""
    sets = timing.sets_beyond_cache(spec.device, spec.bytes(FORWARD))
    layers = [peer.layer(spec, seed) for seed in range(sets)]
    return timing.stopwatch(
        spec.device, [layer.step(mode) for layer in layers], layers[0].context, one_thread=spec.threads == 1
    )


@functools.lru_cache(maxsize=2)
def baseline(peer: Peer, spec: Spec, mode: str) -> timing.Stopwatch:
    return stopwatch(peer, spec, mode)


@pytest.fixture
def threads(spec: Spec):
    before = torch.get_num_threads()
    torch.set_num_threads(spec.threads or before)
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.mark.benchmark(timer=timing.clock)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name.replace(" ", "-"))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.label)
def test_lora_linear(benchmark, spec: Spec, mode: str, peer: Peer, threads: int) -> None:
    reason = peer.unavailable(spec)
    if reason is not None:
        pytest.skip(reason)
    compared = gate.check(peer, spec)
    watch = stopwatch(peer, spec, mode)
    others = {other.name: [] for other in (PEFT, FROZEN) if other.unavailable(spec) is None}

    def measure_others() -> None:
        for name, pairs in others.items():
            pairs.append(baseline(peers.by_name(name), spec, mode).sample())

    own: list[float] = []

    def measure() -> None:
        own.append(watch.sample())
        timing.clock.advance(own[-1])

    benchmark.group = f"{spec.label} {mode}"
    benchmark.extra_info.update(facts(peer, spec, mode, compared, watch, threads))
    benchmark.pedantic(measure, setup=measure_others, rounds=ROUNDS, warmup_rounds=1)
    for name, samples in others.items():
        ratio = compare.of_pairs(list(zip(own, samples, strict=True))[1:])
        benchmark.extra_info[f"ratio_to_{name}"] = ratio.rounded()
    if not benchmark.disabled:
        benchmark.extra_info["percent_of_floor"] = round(
            100 * benchmark.extra_info["floor_s"] / benchmark.stats.stats.median, 1
        )


def facts(peer: Peer, spec: Spec, mode: str, compared: str, watch: timing.Stopwatch, threads: int) -> dict:
    """What a row of the report needs besides its times. Sizes in bytes, times in seconds."""
    limits = ceilings(spec.device, spec.dtype, threads)
    layer = peer.layer(spec)
    rows = {
        "op": OP, "problem": spec.label, "mode": mode, "peer": peer.name, "checked": compared, "timer": watch.kind,
        "calls_per_sample": watch.calls, "threads": threads, "flop": spec.flop(mode), "bytes": spec.bytes(mode),
        "floor_s": spec.floor(mode, limits), "flop_per_s_ceiling": limits.flop_per_s,
        "bytes_per_s_ceiling": limits.bytes_per_s, "saved_bytes": memory.saved_bytes(layer, layer.parameters()),
    }  # fmt: skip
    if peer.backend is not None:
        choice = peers.chosen_backend(spec)
        backend = choice.backend if peer.backend == "auto" else peer.backend
        rows |= {"backend": backend, "digest": provenance.digest(OP, backend)}
        if peer.backend == "auto":
            rows["why"] = str(choice)
    return rows
