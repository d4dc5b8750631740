"""Block-sparse weights on a CPU: ours against the dense layer and against what users have, call by call in turn.

    python -m benchmarks.block_sparse_time [--rounds 15] [--sizes 256 1024 4096] [--block 64] [--json FILE]

For each density of blocks: forward, and a training step (forward, dx and dW), float32. Against

* dense: `F.linear` on the weight with its zeros, the time that pruning is to beat;
* mask: `F.linear(x, W * mask)`, what `torch.nn.utils.prune` and fine-tuning scripts do;
* BSR: `(bsr @ x.T).T` with PyTorch's own sparse tensor (forward only; its blocks as they are and cut into 8 x 8).

Before anything is timed, ours is compared with float64. The bars are how many times faster than dense ours has to be;
the exit code is 1 when one is missed by both the median of the ratios and the ratio of the fastest samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import compare
from benchmarks.nf4_time import training
from peft_kernels import explain, functional
from peft_kernels._table import table
from peft_kernels.formats import sparse
from peft_kernels.selfcheck import RATIO, relative_error
from peft_kernels.tuning.timing import HostStopwatch

HEADERS = ("density", "step", "against", "its ms", "our ms", "times faster", "quartile 1", "quartile 3", "bar", "by")
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
# How many times faster than dense, by density.
BARS = {0.1: 2.5, 0.5: 1.0}
Step = Callable[[], object]


class Pair(NamedTuple):
    """Two ways to the same result; `bar` is how many times faster ours has to be, None where it is only shown."""

    step: str
    against: str
    theirs: Step
    ours: Step
    bar: float | None = None


class Problem:
    """One weight [n, k] of which a part of the blocks is kept, in all the forms that are compared."""

    def __init__(self, m: int, n: int, k: int, block: int, density: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.grad_y = (torch.randn(m, size, generator=generator) for size in (k, n))
        rows, columns = n // block, k // block
        count = max(1, round(density * rows * columns))
        chosen = torch.randperm(rows * columns, generator=generator)[:count]
        tiles = torch.zeros(rows * columns).index_fill_(0, chosen, 1).view(rows, columns)
        self.mask = tiles.repeat_interleave(block, 0).repeat_interleave(block, 1)
        self.whole = torch.randn(n, k, generator=generator) * k**-0.5
        self.dense, self.density = self.whole * self.mask, density
        self.weight = sparse.compress(self.dense, "block", block=block)
        self.trained = self.weight.with_tensors([self.weight.values.requires_grad_(), *self.weight.tensors[1:]])
        with warnings.catch_warnings():  # "Sparse BSR tensor support is in beta state"
            warnings.simplefilter("ignore")
            self.bsr = {size: self.dense.to_sparse_bsr((size, size)) for size in dict.fromkeys((block, 8))}

    def check(self) -> None:
        """Raises AssertionError where ours is less accurate than eager by the rule."""
        exact = self.x.double() @ self.dense.double().t()
        allowed = max(RATIO * relative_error(F.linear(self.x, self.dense), exact), torch.finfo(torch.float32).eps / 4)
        error = relative_error(functional.sparse_linear(self.x, self.weight).detach(), exact)
        assert error <= allowed, f"density {self.density}: error {error:.2e} > {allowed:.2e}"

    def pairs(self) -> list[Pair]:
        x, dense, bar = self.x, self.dense, BARS.get(self.density)
        frozen = self.weight.with_tensors([self.weight.values.detach(), *self.weight.tensors[1:]])
        whole, leaf = (t.clone().requires_grad_() for t in (self.whole, dense))

        def ours() -> Tensor:
            return functional.sparse_linear(x, frozen)

        step = training(lambda t: functional.sparse_linear(t, self.trained), x, self.grad_y, self.trained.values)
        return [
            Pair("forward", "dense", lambda: F.linear(x, dense), ours, bar),
            Pair("forward", "mask", lambda: F.linear(x, self.whole * self.mask), ours),
            *(
                Pair("forward", f"BSR {size}", lambda bsr=bsr: (bsr @ x.t()).t(), ours)
                for size, bsr in self.bsr.items()
            ),
            Pair("training", "dense", training(lambda t: F.linear(t, leaf), x, self.grad_y, leaf), step, bar),
            Pair(
                "training",
                "mask",
                training(lambda t: F.linear(t, whole * self.mask), x, self.grad_y, whole),
                step,
            ),
        ]


def measure(problem: Problem, pair: Pair, rounds: int) -> dict:
    ratio = compare.ratio(HostStopwatch([pair.theirs]), HostStopwatch([pair.ours]), rounds)
    chosen = explain("sparse_linear", problem.x, problem.weight).backend
    record = {"density": problem.density, "step": pair.step, "against": pair.against, "bar": pair.bar, "by": chosen}
    return {**record, **ratio._asdict()}


def cells(record: dict) -> tuple:
    """A record as a row of the table."""
    times = (f"{record[name] * 1e3:.2f}" for name in ("a", "b"))
    ratios = (f"{record[name]:.2f}" for name in ("ratio", "low", "high"))
    return record["density"], record["step"], record["against"], *times, *ratios, record["bar"], record["by"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs=3, default=(256, 1024, 4096), metavar=("M", "N", "K"))
    parser.add_argument("--block", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for density in options.densities:
        problem = Problem(*options.sizes, options.block, density)
        problem.check()
        for pair in problem.pairs():
            records.append(measure(problem, pair, options.rounds))
            print(table([cells(records[-1])], HEADERS).splitlines()[-1], file=sys.stderr)
    print(table(map(cells, records), HEADERS))
    if options.json:
        sizes = dict(zip("mnk", options.sizes, strict=True))
        told = {"sizes": sizes, "block": options.block, "threads": options.threads, "records": records}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return int(any(record["bar"] and max(record["ratio"], record["best"]) < record["bar"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
