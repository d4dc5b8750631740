"""Unstructured pruned weights on a CPU: layout "csr" against the dense layer and PyTorch's CSR, call by call in turn.

    python -m benchmarks.csr_time [--rounds 15] [--rows 1 256] [--out 1024] [--in 4096] [--json FILE]

For each density of kept weights: forward for each number of rows, and forward with dx for the most rows, float32. The
dense layer is `F.linear` on the weight with its zeros, the time that pruning is to beat; PyTorch's CSR is
`(csr @ x.T).T`, forward only. Before anything is timed, ours is compared with float64.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.block_sparse_time import HEADERS, Pair, cells, measure
from benchmarks.nf4_time import training
from peft_kernels import functional
from peft_kernels._table import table
from peft_kernels.formats import sparse
from peft_kernels.selfcheck import RATIO, relative_error

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


class Problem:
    """One weight [n, k] of which a part is kept, in all the forms that are compared. `density`, `x` and `weight` are
    what `block_sparse_time.measure` tells of it."""

    def __init__(self, rows: tuple[int, ...], n: int, k: int, density: float) -> None:
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(n, k, generator=generator) < density
        self.density, self.dense = density, torch.randn(n, k, generator=generator) * k**-0.5 * kept
        self.weight = sparse.compress(self.dense, "csr")
        self.xs = [torch.randn(m, k, generator=generator) for m in rows]
        self.x, self.grad_y = self.xs[-1], torch.randn(rows[-1], n, generator=generator)
        with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
            warnings.simplefilter("ignore")
            self.csr = self.dense.to_sparse_csr()

    def check(self) -> None:
        """Raises AssertionError where ours is less accurate than eager by the rule."""
        leaf = self.x.clone().requires_grad_()
        y = functional.sparse_linear(leaf, self.weight)
        (grad_x,) = torch.autograd.grad(y, leaf, self.grad_y)
        wide = self.dense.double()
        for name, ours, eager, exact in (
            ("y", y.detach(), F.linear(self.x, self.dense), self.x.double() @ wide.t()),
            ("dx", grad_x, self.grad_y @ self.dense, self.grad_y.double() @ wide),
        ):
            allowed = max(RATIO * relative_error(eager, exact), torch.finfo(torch.float32).eps / 4)
            error = relative_error(ours, exact)
            assert error <= allowed, f"density {self.density}, {name}: error {error:.2e} > {allowed:.2e}"

    def pairs(self) -> list[Pair]:
        found = []
        for x in self.xs:
            step, ours = f"forward, M={len(x)}", lambda x=x: functional.sparse_linear(x, self.weight)
            found.append(Pair(step, "dense", lambda x=x: F.linear(x, self.dense), ours))
            found.append(Pair(step, "PyTorch CSR", lambda x=x: (self.csr @ x.t()).t(), ours))
        ours = training(lambda t: functional.sparse_linear(t, self.weight), self.x, self.grad_y)
        theirs = training(lambda t: F.linear(t, self.dense), self.x, self.grad_y)
        return [*found, Pair(f"forward and dx, M={len(self.x)}", "dense", theirs, ours)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 256))
    parser.add_argument("--out", type=int, default=1024)
    parser.add_argument("--in", type=int, default=4096, dest="columns")
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for density in options.densities:
        problem = Problem(tuple(options.rows), options.out, options.columns, density)
        problem.check()
        for pair in problem.pairs():
            records.append(measure(problem, pair, options.rounds))
            print(table([cells(records[-1])], HEADERS).splitlines()[-1], file=sys.stderr)
    print(table(map(cells, records), HEADERS))
    if options.json:
        told = {"sizes": {"n": options.out, "k": options.columns}, "threads": options.threads, "records": records}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
