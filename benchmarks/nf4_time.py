"""NF4 on a CPU: ours against bitsandbytes and PyTorch's dense matmul, call by call in turn.

    python -m benchmarks.nf4_time [--rounds 15] [--size 4096] [--threads 2] [--json FILE]

A weight of size x size, bfloat16, double quantisation. Before anything is timed, ours is compared with float64 of the
dequantised weight, bits with the specification. The bars are how many times faster ours has to be; the exit code is 1
when one is missed by both the median of the ratios and the ratio of the fastest samples. Extra memory is the most that
PyTorch's allocator held during a step beyond what it held before; scratch of csrc, a few MiB, is not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_kernels
from benchmarks import compare, memory
from peft_kernels import functional
from peft_kernels._table import table
from peft_kernels.formats import nf4
from peft_kernels.selfcheck import RATIO, relative_error
from peft_kernels.tuning.timing import HostStopwatch

HEADERS = (
    "step",
    "dtype",
    "against",
    "its ms",
    "our ms",
    "times faster",
    "quartile 1",
    "quartile 3",
    "bar",
    "extra MiB",
)
RANK, SCALING = 16, 2.0
Step = Callable[[], object]


class Pair(NamedTuple):
    """Two ways to the same result; `bar` is how many times faster ours has to be, None where it is only shown."""

    step: str
    dtype: torch.dtype
    against: str
    theirs: Step
    ours: Step
    bar: float | None = None


class Problem:
    """One weight in all the forms that are compared."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        import bitsandbytes

        generator = torch.Generator().manual_seed(0)
        self.draw = lambda *shape: torch.randn(*shape, generator=generator)
        self.dtype, self.size, self.bnb = dtype, size, bitsandbytes
        self.weight = (self.draw(size, size) * size**-0.5).to(dtype)
        self.q = nf4.quantize(self.weight)
        params = self.q.to_bitsandbytes()
        self.packed, self.state = params.data, params.quant_state
        self.dense = self.q.dequantize(dtype)
        self.lora_A = (self.draw(RANK, size) * size**-0.5).requires_grad_()
        self.lora_B = (self.draw(size, RANK) * RANK**-0.5).requires_grad_()

    def rows(self, m: int) -> Tensor:
        return self.draw(m, self.size).to(self.dtype)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense)

    def matmul_4bit(self, x: Tensor) -> Tensor:
        return self.bnb.matmul_4bit(x, self.packed.t(), self.state)

    def peft(self, x: Tensor) -> Tensor:
        """What PEFT's layer over a `Linear4bit` computes: the adapter in its own dtype, the result cast to x's."""
        update = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B) * SCALING
        return self.matmul_4bit(x) + update.to(x.dtype)

    def ours_lora(self, x: Tensor) -> Tensor:
        return functional.nf4_lora_linear(x, self.q, self.lora_A, self.lora_B, scaling=SCALING)

    def check(self, m: int) -> None:
        """Raises AssertionError where ours is wrong: the weight's bits, or less accurate than eager by the rule."""
        with peft_kernels.use_backend("reference"):
            assert torch.equal(self.dense, self.q.dequantize(self.dtype)), "the weight has other bits"
        x, grad_y = self.rows(m), self.rows(m)
        for ours, eager, truth in (
            (functional.nf4_linear(x, self.q), F.linear(x, self.dense), x.double() @ self.dense.double().t()),
            (_grad(lambda t: functional.nf4_linear(t, self.q), x, grad_y), grad_y.float() @ self.dense.float(), None),
        ):
            exact = grad_y.double() @ self.dense.double() if truth is None else truth
            allowed = RATIO * relative_error(eager.to(self.dtype), exact)
            error = relative_error(ours, exact)
            assert error <= max(allowed, torch.finfo(self.dtype).eps / 4), f"M={m}: error {error:.2e} > {allowed:.2e}"


def _grad(call: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(call(leaf), leaf, grad_y)[0]


def training(call: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor, *parameters: Tensor) -> Step:
    """Forward and backward: the gradients of x and of the parameters."""
    leaf = x.detach().requires_grad_()
    return lambda: torch.autograd.grad(call(leaf), (leaf, *parameters), grad_y)


def pairs(problem: Problem) -> list[Pair]:
    """The comparisons of one dtype. The bars are those of bfloat16."""
    p, q, dtype = problem, problem.q, problem.dtype
    narrow = dtype == torch.bfloat16
    one, few, grad_y = p.rows(1), p.rows(16), p.rows(16)
    dequantize, quantize = p.bnb.functional.dequantize_4bit, p.bnb.functional.quantize_4bit
    ours_few = training(lambda t: functional.nf4_linear(t, q), few, grad_y)
    lora = (few, grad_y, p.lora_A, p.lora_B)
    return [
        Pair("M=1 forward", dtype, "dense", lambda: p.linear(one), lambda: functional.nf4_linear(one, q),
             1.8 if narrow else None),
        Pair("M=16 forward + backward", dtype, "bitsandbytes", training(p.matmul_4bit, few, grad_y), ours_few,
             2.2 if narrow else None),
        Pair("M=16 forward + backward", dtype, "dense", training(p.linear, few, grad_y), ours_few),
        Pair(f"the same with LoRA, r={RANK}", dtype, "PEFT's formula", training(p.peft, *lora),
             training(p.ours_lora, *lora), 2.2 if narrow else None),
        Pair("dequantise", dtype, "bitsandbytes", lambda: dequantize(p.packed, p.state), lambda: q.dequantize(dtype),
             6.0 if narrow else None),
        Pair("quantise", dtype, "bitsandbytes", lambda: quantize(p.weight, quant_type="nf4", compress_statistics=True),
             lambda: nf4.quantize(p.weight), 10.0 if narrow else None),
    ]  # fmt: skip


def measure(pair: Pair, rounds: int) -> dict:
    theirs, ours = HostStopwatch([pair.theirs]), HostStopwatch([pair.ours])
    ratio = compare.ratio(theirs, ours, rounds)
    return {
        "step": pair.step, "dtype": str(pair.dtype).removeprefix("torch."), "against": pair.against,
        "bar": pair.bar, "extra_bytes": memory.peak_bytes(pair.ours, "cpu"), **ratio._asdict(),
    }  # fmt: skip


def cells(record: dict) -> tuple:
    """A record as a row of the table."""
    times = (f"{record[name] * 1e3:.2f}" for name in ("a", "b"))
    ratios = (f"{record[name]:.2f}" for name in ("ratio", "low", "high"))
    extra = f"{record['extra_bytes'] / 2**20:.1f}"
    return *(record[name] for name in ("step", "dtype", "against")), *times, *ratios, record["bar"], extra


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for dtype in (torch.bfloat16, torch.float32):
        problem = Problem(options.size, dtype)
        for m in (1, 16):
            problem.check(m)
        for pair in pairs(problem):
            records.append(measure(pair, options.rounds))
            print(table([cells(records[-1])], HEADERS).splitlines()[-1], file=sys.stderr)
    print(table(map(cells, records), HEADERS))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return int(any(record["bar"] and max(record["ratio"], record["best"]) < record["bar"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
