"""Pruned weights on a CPU: `masked_linear` and `masked_lora_linear` against what PyTorch users write, call by call in
turn.

    python -m benchmarks.masked_time [--rounds 15] [--m 256] [--threads 2] [--json FILE]

A weight of 1024 x 4096, half of it pruned. Compared with `torch.nn.utils.prune`, with `F.linear(x, W * mask)`, with the
dense layer, and for the update inside the mask with its materialised form `F.linear(x, (W + s B A) * mask)` (as PERP's
MaskLoRA has it). `clean`: W is 0 outside the mask and ours is told so; `compact`: the gradient of the kept weights
only. Before anything is timed, the two results are compared. The bar is how many times faster ours has to be; the exit
code is 1 when it is missed by both the median of the ratios and the ratio of the fastest samples, or when ours takes
more extra memory than a sixteenth of W. Extra memory is the most that PyTorch's allocator held during a step beyond
what it held before and what the step returns; scratch of csrc, 0.41 MiB a thread whatever the sizes, is not in it.
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
from torch import Tensor, nn
from torch.nn.utils import prune

from benchmarks import compare, memory
from peft_kernels import functional
from peft_kernels._table import table
from peft_kernels.formats.mask import pack
from peft_kernels.selfcheck import relative_error
from peft_kernels.tuning.timing import HostStopwatch

HEADERS = (
    "step", "dtype", "against", "its ms", "our ms", "times faster", "quartile 1", "quartile 3", "bar", "its extra / W",
    "our extra / W",
)  # fmt: skip
N, K, DENSITY, RANK, SCALING = 1024, 4096, 0.5, 16, 2.0
STEP_BAR = 1 / 0.92  # of the float32 training step against torch.nn.utils.prune
EXTRA_BAR = 1 / 15.5  # of a float32 W: a sixteenth, and room for A and B
Step = Callable[[], list[Tensor]]


class Pair(NamedTuple):
    """Two ways to the same results; `bar`: how many times faster ours has to be, None where it is only shown."""

    step: str
    dtype: torch.dtype
    against: str
    theirs: Step
    ours: Step
    bar: float | None = None


class Problem:
    """One pruned layer in all the forms that are compared."""

    def __init__(self, m: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.dtype, self.x, self.grad_y = dtype, draw(m, K).to(dtype).requires_grad_(), draw(m, N).to(dtype)
        self.kept = torch.rand(N, K, generator=generator) < DENSITY
        self.mask = pack(self.kept)
        self.places = self.mask.positions()
        self.weight = (draw(N, K) * K**-0.5).to(dtype).requires_grad_()
        self.bias = draw(N).to(dtype).requires_grad_()
        self.clean = (self.weight.detach() * self.kept).requires_grad_()
        self.values = self.clean.detach()[self.kept].requires_grad_()
        self.lora_A = (draw(RANK, K) * K**-0.5).to(dtype).requires_grad_()
        self.lora_B = (draw(N, RANK) * RANK**-0.5).to(dtype).requires_grad_()
        self.pruned = nn.Linear(K, N, dtype=dtype)
        self.pruned.load_state_dict({"weight": self.weight.detach(), "bias": self.bias.detach()})
        prune.custom_from_mask(self.pruned, "weight", self.kept)

    def masked(self, x: Tensor, weight: Tensor | None = None, **options) -> Tensor:
        return functional.masked_linear(x, self.weight if weight is None else weight, self.mask, self.bias, **options)

    def lora(self, x: Tensor, update_masked: bool) -> Tensor:
        return functional.masked_lora_linear(
            x, self.clean.detach(), self.mask, self.lora_A, self.lora_B, scaling=SCALING, bias=self.bias,
            update_masked=update_masked, weight_is_masked=True,
        )  # fmt: skip

    def materialised(self, x: Tensor, update_masked: bool) -> Tensor:
        if update_masked:
            return F.linear(x, (self.clean.detach() + SCALING * (self.lora_B @ self.lora_A)) * self.kept, self.bias)
        base = F.linear(x, self.clean.detach() * self.kept, self.bias)
        return base + SCALING * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def training(self, call: Callable[[Tensor], Tensor], *parameters: Tensor) -> Step:
        """Forward and backward: y, and the gradients of x, the bias and the parameters."""

        def step() -> list[Tensor]:
            y = call(self.x)
            return [y.detach(), *torch.autograd.grad(y, (self.x, self.bias, *parameters), self.grad_y)]

        return step


def forward(call: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    def step() -> list[Tensor]:
        with torch.no_grad():
            return [call(x)]

    return step


def pruned_step(p: Problem) -> Step:
    """As `Problem.training`, of the parameters that the pruned module has."""

    def step() -> list[Tensor]:
        y = p.pruned(p.x)
        return [y.detach(), *torch.autograd.grad(y, (p.x, p.pruned.bias, p.pruned.weight_orig), p.grad_y)]

    return step


def pairs(p: Problem) -> list[Pair]:
    dtype, narrow = p.dtype, p.dtype != torch.float32
    dense = p.training(lambda x: F.linear(x, p.weight, p.bias), p.weight)
    ours, clean = p.training(p.masked, p.weight), lambda x: p.masked(x, p.clean, weight_is_masked=True)
    product = p.training(lambda x: F.linear(x, p.weight * p.kept, p.bias), p.weight)
    compact = p.training(
        lambda x: p.masked(x, p.clean.detach(), weight_is_masked=True, grad_layout="compact", values=p.values,
                           places=p.places), p.values)  # fmt: skip
    compacted = p.training(lambda x: F.linear(x, torch.zeros_like(p.weight).masked_scatter(p.kept, p.values), p.bias),
                           p.values)  # fmt: skip
    made = [
        Pair("forward", dtype, "F.linear(x, W * mask)", forward(lambda x: F.linear(x, p.weight * p.kept, p.bias), p.x),
             forward(p.masked, p.x)),
        Pair("training step", dtype, "torch.nn.utils.prune", pruned_step(p), ours, None if narrow else STEP_BAR),
        Pair("training step", dtype, "F.linear(x, W * mask)", product, ours),
        Pair("training step", dtype, "dense", dense, ours),
        Pair("training step, clean", dtype, "F.linear(x, W * mask)",
             p.training(lambda x: F.linear(x, p.clean * p.kept, p.bias), p.clean), p.training(clean, p.clean)),
        Pair("training step, compact", dtype, "masked_scatter", compacted, compact),
    ]  # fmt: skip
    for masked, name in ((False, "beside the mask"), (True, "inside the mask")):
        theirs, mine = (p.training(lambda x, f=f, masked=masked: f(x, masked), p.lora_A, p.lora_B)
                        for f in (p.materialised, p.lora))  # fmt: skip
        made.append(Pair(f"masked LoRA {name}, r={RANK}", dtype, "materialised", theirs, mine))
    return made


def check(pair: Pair) -> None:
    """Raises AssertionError where the two differ by more than rounding. (Of dense and masked only shapes agree.)"""
    if pair.against == "dense":
        return
    allowed = 40 * torch.finfo(pair.dtype).eps
    for mine, other in zip(pair.ours(), pair.theirs(), strict=True):
        error = relative_error(mine, other)
        assert error <= allowed, f"{pair.step} against {pair.against}: {error:.2e} > {allowed:.2e}"


def extra(step: Step) -> float:
    """Bytes beyond what the step returns, in parts of W."""
    returned = sum(tensor.nbytes for tensor in step())
    kept: list[list[Tensor]] = []
    peak = memory.peak_bytes(lambda: kept.append(step()), "cpu")
    return (peak - returned) / (N * K * kept[0][0].element_size())


def measure(pair: Pair, rounds: int) -> dict:
    ratio = compare.ratio(HostStopwatch([pair.theirs]), HostStopwatch([pair.ours]), rounds)
    return {
        "step": pair.step, "dtype": str(pair.dtype).removeprefix("torch."), "against": pair.against, "bar": pair.bar,
        "their_extra": extra(pair.theirs), "our_extra": extra(pair.ours), **ratio._asdict(),
    }  # fmt: skip


def cells(record: dict) -> tuple:
    """A record as a row of the table."""
    times = (f"{record[name] * 1e3:.2f}" for name in ("a", "b"))
    ratios = (f"{record[name]:.2f}" for name in ("ratio", "low", "high"))
    bar = record["bar"] and f"{record['bar']:.2f}"
    extras = (f"{record[name]:.3f}" for name in ("their_extra", "our_extra"))
    return *(record[name] for name in ("step", "dtype", "against")), *times, *ratios, bar, *extras


def misses(record: dict) -> bool:
    slow = record["bar"] and max(record["ratio"], record["best"]) < record["bar"]
    return bool(slow) or (record["dtype"] == "float32" and record["our_extra"] > EXTRA_BAR)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--m", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    # In 16 bits PyTorch's matmuls take seconds on a processor without instructions for them: few rows, few rounds.
    for dtype, m, rounds in ((torch.float32, options.m, options.rounds), (torch.bfloat16, min(16, options.m), 5)):
        for pair in pairs(Problem(m, dtype)):
            check(pair)
            records.append({"m": m, "threads": options.threads, **measure(pair, rounds)})
            print(table([cells(records[-1])], HEADERS).splitlines()[-1], file=sys.stderr)
    print(table(map(cells, records), HEADERS))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return int(any(map(misses, records)))


if __name__ == "__main__":
    sys.exit(main())
