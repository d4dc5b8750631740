"""Ours against Hugging Face PEFT on a CPU, call by call in turn: what a layer costs besides its matmuls.

    python -m benchmarks.host_time [--rounds 60] [--json FILE]

A LoRA layer at two sizes: 4×16 with r=4 (all host time) and M=512, K=N=1024, r=16 in fp32 with 2 threads, and with 1,
whose CPU time can be measured on a busy machine too; at the latter size with dropout, a DoRA layer and a group of q, k
and v. The bars are what this library promises of forward + backward; the exit code is 1 when one is missed by both the
median of the ratios and the ratio of the fastest samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from benchmarks import compare, gate, timing
from benchmarks.peers import Peer
from benchmarks.problems import FORWARD_BACKWARD, MODES, Spec
from benchmarks.rounds import peers_of
from peft_kernels._table import table

# Forward + backward, ours / PEFT; None: shown, not judged.
BARS = {
    Spec(4, 16, 16, 4, threads=1): 0.75,
    Spec(512, 1024, 1024, 16, threads=1): None,
    Spec(512, 1024, 1024, 16, threads=2): 0.9,
    Spec(512, 1024, 1024, 16, dropout_p=0.05, threads=2): 0.85,
    Spec(512, 1024, 1024, 16, threads=2, op="dora_linear"): 0.8,
    Spec(512, 1024, 1024, 16, threads=2, op="lora_linear_group"): 0.9,
}
HEADERS = ("problem", "threads", "mode", "peer", "µs", "PEFT µs", "ratio", "quartile 1", "quartile 3", "fastest", "bar")
SUBJECTS = ("ours (auto)", "peft accelerated", "frozen")


def measure(peer: Peer, spec: Spec, mode: str, rounds: int) -> compare.Ratio:
    """The peer's time over PEFT's, after both have been checked against float64."""
    peft = peers_of(spec).PEFT
    for either in (peer, peft):
        gate.check(either, spec)
    torch.set_num_threads(spec.threads or torch.get_num_threads())
    layers = (peer.layer(spec), peft.layer(spec))
    own, other = (timing.HostStopwatch([layer.step(mode)], one_thread=spec.threads == 1) for layer in layers)
    return compare.ratio(own, other, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = []
    for spec, name in itertools.product(BARS, SUBJECTS):
        peer = next(peer for peer in peers_of(spec).PEERS if peer.name == name)
        reason = peer.unavailable(spec)
        if reason is not None:
            print(f"{peer.name}: {reason}")
            continue
        for mode in MODES:
            ratio = measure(peer, spec, mode, options.rounds)
            bar = BARS[spec] if mode == FORWARD_BACKWARD and not peer.frozen else None
            record = {"problem": spec.label, "threads": spec.threads, "mode": mode, "peer": peer.name, "bar": bar}
            records.append(record | ratio._asdict())
    print(table(map(cells, records), HEADERS))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return int(any(record["bar"] and min(record["ratio"], record["best"]) > record["bar"] for record in records))


def cells(record: dict) -> tuple:
    """A record as a row of the table."""
    ratios = (f"{record[name]:.3f}" for name in ("ratio", "low", "high", "best"))
    times = (f"{record[name] * 1e6:.1f}" for name in ("a", "b"))
    return *(record[name] for name in ("problem", "threads", "mode", "peer")), *times, *ratios, record["bar"]


if __name__ == "__main__":
    sys.exit(main())
