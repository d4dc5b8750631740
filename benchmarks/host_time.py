"""Ours against Hugging Face PEFT on a CPU, call by call in turn: what a layer costs besides its matmuls.

    python -m benchmarks.host_time [--rounds 60] [--json FILE]

Two sizes, forward + backward: 4×16 with r=4 (all host time) and M=512, K=N=1024, r=16 in fp32 with 2 threads. The bars
are what this library promises; the exit code is 1 when one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks import compare, gate, timing
from benchmarks.peers import AUTO, FROZEN, PEFT, Peer, by_name
from benchmarks.problems import FORWARD_BACKWARD, MODES, Spec
from peft_kernels._table import table

# Forward + backward, ours / PEFT.
BARS = {Spec(4, 16, 16, 4, threads=1): 0.85, Spec(512, 1024, 1024, 16, threads=2): 0.92}
SUBJECTS = (AUTO, by_name("peft accelerated"), FROZEN)


def measure(peer: Peer, spec: Spec, mode: str, rounds: int) -> compare.Ratio:
    """The peer's time over PEFT's, after both have been checked against float64."""
    for either in (peer, PEFT):
        gate.check(either, spec)
    torch.set_num_threads(spec.threads or torch.get_num_threads())
    own, other = (timing.stopwatch("cpu", [p.layer(spec).step(mode)]) for p in (peer, PEFT))
    return compare.ratio(own, other, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, records, missed = [], [], False
    for spec, bar in BARS.items():
        for peer in SUBJECTS:
            reason = peer.unavailable(spec)
            if reason is not None:
                print(f"{peer.name}: {reason}")
                continue
            for mode in MODES:
                ratio = measure(peer, spec, mode, options.rounds)
                judged = bar if mode == FORWARD_BACKWARD and peer is not FROZEN else None
                missed |= judged is not None and min(ratio.ratio, ratio.best) > judged
                rows.append(
                    (spec.label, mode, peer.name, f"{ratio.a * 1e6:.1f}", f"{ratio.b * 1e6:.1f}", ratio, judged)
                )
                records.append(
                    {"problem": spec.label, "mode": mode, "peer": peer.name, "bar": judged, **ratio._asdict()}
                )
    print(table(rows, ("problem", "mode", "peer", "µs", "PEFT µs", "ratio to PEFT (quartiles)", "bar")))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
