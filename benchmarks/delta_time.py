"""Chosen weights on a CPU: our layer against PEFT's SHiRA layer and PyTorch's dense matmuls, step by step in turn.

    python -m benchmarks.delta_time [--rounds 15] [--rows 256] [--out 1024] [--in 4096] [--threads 2] [--json FILE]

A step is forward and backward: gradients of x and of the chosen weights, in float32. PEFT's is the real layer (peft's
`ShiraConfig` over an `nn.Linear`) with the same places; "two matmuls" are x Wᵀ and dY W alone, which every way has to
do. Before anything is timed, ours is compared with float64. The bar is how many times faster ours has to be than PEFT's
with 1 % chosen; the exit code is 1 when the median of the ratios and the ratio of the fastest samples both miss it.
Extra memory is the most that PyTorch's allocator held during a step beyond what it held before; scratch of csrc, up to
256 rows of x and of dY, is not in it.
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
from torch import Tensor, nn

from benchmarks import compare, memory
from peft_kernels._table import table
from peft_kernels.nn import SparseDeltaLinear
from peft_kernels.selfcheck import RATIO, relative_error
from peft_kernels.tuning.timing import HostStopwatch

HEADERS = (
    "chosen",
    "against",
    "its ms",
    "our ms",
    "times faster",
    "quartile 1",
    "quartile 3",
    "bar",
    "extra MiB",
    "its extra MiB",
)
# PEFT says how many weights by a rank: r (N + K); of 1024 x 4096 0.12, 0.37, 0.98, 4.9, 10, 25 and 50 %.
RANKS = (1, 3, 8, 40, 82, 205, 410)
BAR_RANK, BAR = 8, 1 / 0.8
Step = Callable[[], object]


class Sizes(NamedTuple):
    m: int
    n: int
    k: int


class Layers:
    """The same weight with the same places and values, as ours, as PEFT's and without."""

    def __init__(self, sizes: Sizes, rank: int) -> None:
        import peft

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(sizes.k, sizes.n, bias=False))
        config = peft.ShiraConfig(r=rank, random_seed=0, target_modules=["0"], init_weights=False)
        self.theirs = peft.get_peft_model(model, config).base_model.model[0]
        base = self.theirs.base_layer
        self.their_values = self.theirs.shira_weight["default"]
        self.their_values.data.mul_(0.02)
        self.ours = SparseDeltaLinear.from_linear(base, indices=self.theirs.shira_indices["default"])
        self.ours.values.data.copy_(self.their_values)
        self.weight = base.weight.detach()
        self.x, self.grad_y = torch.randn(sizes.m, sizes.k), torch.randn(sizes.m, sizes.n)

    def step(self, layer: nn.Module, values: Tensor) -> Step:
        leaf = self.x.detach().requires_grad_()
        return lambda: torch.autograd.grad(layer(leaf), (leaf, values), self.grad_y)

    def our_step(self) -> Step:
        return self.step(self.ours, self.ours.values)

    def their_step(self) -> Step:
        return self.step(self.theirs, self.their_values)

    def matmuls(self) -> Step:
        return lambda: (torch.mm(self.x, self.weight.t()), torch.mm(self.grad_y, self.weight))

    def check(self) -> None:
        """Raises AssertionError where ours is less accurate than PEFT's by the rule."""
        whole = (self.weight.double() + self.ours.delta.dense().double()).requires_grad_()
        x = self.x.double().requires_grad_()
        y = nn.functional.linear(x, whole)
        grad_x, grad_weight = torch.autograd.grad(y, (x, whole), self.grad_y.double())
        truths = (y.detach(), grad_x, grad_weight.flatten()[self.ours.indices.long()])
        for name, ours, theirs, truth in zip(
            ("y", "dx", "dvalues"),
            (self.ours(self.x).detach(), *self.our_step()()),
            (self.theirs(self.x).detach(), *self.their_step()()),
            truths,
            strict=True,
        ):
            other, error = relative_error(theirs, truth), relative_error(ours, truth)
            assert other <= 1e-5, f"{name}: PEFT's error is {other:.2e}: it computes something else"
            allowed = RATIO * other
            assert error <= allowed, f"{name}: error {error:.2e} > {allowed:.2e}"


def measure(layers: Layers, rank: int, against: str, rounds: int) -> dict:
    theirs = layers.their_step() if against == "PEFT SHiRA" else layers.matmuls()
    ours = layers.our_step()
    ratio = compare.ratio(HostStopwatch([theirs]), HostStopwatch([ours]), rounds)
    bar = BAR if rank == BAR_RANK and against == "PEFT SHiRA" else None
    return {
        "density": layers.ours.density, "against": against, "bar": bar,
        "extra_bytes": memory.peak_bytes(ours, "cpu"), "their_extra_bytes": memory.peak_bytes(theirs, "cpu"),
        **ratio._asdict(),
    }  # fmt: skip


def cells(record: dict) -> tuple:
    """A record as a row of the table."""
    times = (f"{record[name] * 1e3:.2f}" for name in ("a", "b"))
    ratios = (f"{record[name]:.2f}" for name in ("ratio", "low", "high"))
    extra = (f"{record[name] / 2**20:.1f}" for name in ("extra_bytes", "their_extra_bytes"))
    return f"{100 * record['density']:.2f} %", record["against"], *times, *ratios, record["bar"], *extra


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--out", type=int, default=1024)
    parser.add_argument("--in", type=int, default=4096, dest="columns")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "Sparse invariant checks")  # PEFT builds a sparse tensor at each forward
    records = []
    for rank in RANKS:
        layers = Layers(Sizes(options.rows, options.out, options.columns), rank)
        layers.check()
        for against in ("PEFT SHiRA", "two matmuls"):
            records.append(measure(layers, rank, against, options.rounds))
            print(table([cells(records[-1])], HEADERS).splitlines()[-1], file=sys.stderr)
    print(table(map(cells, records), HEADERS))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return int(any(record["bar"] and max(record["ratio"], record["best"]) < record["bar"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
