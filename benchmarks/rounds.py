"""One row of a benchmark: the gate, then rounds that time the peer, PEFT and the frozen layer in turn."""

from __future__ import annotations

import functools
import statistics
from types import ModuleType

import pytest
import torch

from benchmarks import blocks, compare, gate, many, memory, peers, provenance, pruned, quantised, timing
from benchmarks.peers import Peer
from benchmarks.problems import FORWARD, Ceilings, Spec

ROUNDS = 20


def peers_of(spec: Spec) -> ModuleType:
    """The module that has FROZEN, PEFT, AUTO, BASELINES and PEERS for the problem's op."""
    if spec.op in quantised.OPS:
        return quantised
    if spec.op in many.OPS:
        return many
    if spec.op in pruned.OPS:
        return pruned
    return peers if spec.op == "lora_linear" else blocks


@functools.cache
def ceilings(device: str, dtype: torch.dtype, threads: int) -> Ceilings:
    return timing.measure_ceilings(device, dtype)


def steps(peer: Peer, spec: Spec, mode: str) -> tuple[list[timing.Step], timing.Context]:
    """The peer's work on as many sets of tensors as exceed the cache."""
    sets = timing.sets_beyond_cache(spec.device, spec.bytes(FORWARD), spec.most_sets)
    layers = [peer.layer(spec, seed) for seed in range(sets)]
    return [layer.step(mode) for layer in layers], layers[0].context


def stopwatch(peer: Peer, spec: Spec, mode: str) -> timing.Stopwatch:
    return timing.stopwatch(spec.device, *steps(peer, spec, mode), one_thread=spec.threads == 1)


def eager_seconds(peer: Peer, spec: Spec, mode: str) -> float:
    """GPU time of a call without a CUDA graph, launch gaps included."""
    watch = timing.EventStopwatch(*steps(peer, spec, mode))
    return statistics.median(watch.sample() for _ in range(5))


@functools.lru_cache(maxsize=3)
def baseline(peer: Peer, spec: Spec, mode: str) -> timing.Stopwatch:
    return stopwatch(peer, spec, mode)


def run(benchmark, spec: Spec, mode: str, peer: Peer) -> None:
    """Checks the peer, times it and records the row; skips where the peer cannot run this problem here."""
    reason = peer.unavailable(spec)
    if reason is not None:
        pytest.skip(reason)
    before = torch.get_num_threads()
    torch.set_num_threads(spec.threads or before)
    try:
        _run(benchmark, spec, mode, peer)
    finally:
        torch.set_num_threads(before)


def _run(benchmark, spec: Spec, mode: str, peer: Peer) -> None:
    compared = gate.check(peer, spec)
    watch = stopwatch(peer, spec, mode)
    others = [other for other in peers_of(spec).BASELINES if other.unavailable(spec) is None]
    pairs: dict[str, list[float]] = {other.name: [] for other in others}
    own: list[float] = []

    def measure_others() -> None:
        for other in others:
            pairs[other.name].append(baseline(other, spec, mode).sample())

    def measure() -> None:
        own.append(watch.sample())
        timing.clock.advance(own[-1])

    benchmark.group = f"{spec.label} {mode}"
    benchmark.extra_info.update(facts(peer, spec, mode, compared, watch))
    benchmark.pedantic(measure, setup=measure_others, rounds=ROUNDS, warmup_rounds=1)
    if not benchmark.disabled:
        for name, samples in pairs.items():
            ratio = compare.of_pairs(list(zip(own, samples, strict=True))[1:])
            benchmark.extra_info[f"ratio_to_{name}"] = ratio.rounded()
        benchmark.extra_info["percent_of_floor"] = round(
            100 * benchmark.extra_info["floor_s"] / benchmark.stats.stats.median, 1
        )


def facts(peer: Peer, spec: Spec, mode: str, compared: str, watch: timing.Stopwatch) -> dict:
    """What a row of the report needs besides its times. Sizes in bytes, times in seconds."""
    threads = torch.get_num_threads()
    limits = ceilings(spec.device, spec.dtype, threads)
    layer = peer.layer(spec)
    rows = {
        "op": spec.op, "problem": spec.label, "mode": mode, "peer": peer.name, "checked": compared, "timer": watch.kind,
        "calls_per_sample": watch.calls, "threads": threads, "m": spec.m, "k": spec.k, "n": spec.n, "r": spec.r,
        "dropout_p": spec.dropout_p, "flop": spec.flop(mode), "bytes": spec.bytes(mode),
        "floor_s": spec.floor(mode, limits), "flop_per_s_ceiling": limits.flop_per_s,
        "bytes_per_s_ceiling": limits.bytes_per_s, "saved_bytes": memory.saved_bytes(layer, layer.parameters()),
    }  # fmt: skip
    if spec.device == "cuda" and spec.op in quantised.OPS:
        rows["eager_s"] = eager_seconds(peer, spec, mode)
    if isinstance(spec, many.ManySpec):
        rows |= many.facts(peer, spec)
    if isinstance(spec, pruned.PrunedSpec):
        rows |= pruned.facts(peer, spec, mode)
    if peer.backend is not None:
        choice = peers.chosen_backend(spec)
        backend = choice.backend if peer.backend == "auto" else peer.backend
        rows |= {"backend": backend, "digest": provenance.digest(spec.op, backend)}
        if peer.backend == "auto":
            rows["why"] = str(choice)
    return rows


def parametrized(specs: list[Spec], modes: tuple[str, ...], chosen: tuple[Peer, ...]):
    """A decorator: one benchmark for each peer, mode and problem, with ids to select by."""

    def decorate(test):
        # The last one varies fastest: what the others of a round have built is used again.
        test = pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.label)(test)
        test = pytest.mark.parametrize("mode", modes)(test)
        test = pytest.mark.parametrize("peer", chosen, ids=lambda peer: peer.name.replace(" ", "-"))(test)
        return pytest.mark.benchmark(timer=timing.clock)(test)

    return decorate
