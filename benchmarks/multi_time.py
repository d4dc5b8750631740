"""A batch in which every sample has its own adapter, on a CPU: `multi_lora_linear` against PEFT's mixed batch, call by
call in turn.

    python -m benchmarks.multi_time [--rounds 15] [--threads 2] [--json FILE]

64 samples of 8 tokens or of one, K = N = 1024, r = 16, the adapters being the parameters of a PEFT layer in eval mode;
before anything is timed, the two results are compared. Then a training step (x, A and B have gradients) of 8 adapters
against one of `lora_linear` with one adapter on the same rows. The bars are how many times faster ours has to be, less
than one for the training step; the exit code is 1 when one is missed by both the median of the ratios and the ratio of
the fastest samples.
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
from torch import Tensor, nn

from benchmarks import compare
from peft_kernels import functional
from peft_kernels._table import table
from peft_kernels.selfcheck import relative_error
from peft_kernels.tuning.timing import HostStopwatch

HEADERS = (
    "step", "dtype", "adapters", "against", "its ms", "our ms", "times faster", "quartile 1", "quartile 3", "fastest",
    "bar",
)  # fmt: skip
SAMPLES, SIZE, RANK, SCALING = 64, 1024, 16, 2.0
# Tokens of a sample, adapters, dtype, how many times faster ours has to be.
CASES: tuple[tuple[int, int, torch.dtype, float | None], ...] = (
    (8, 1, torch.float32, None),
    (8, 8, torch.float32, 1.3),
    (8, 64, torch.float32, 2.2),
    (8, 256, torch.float32, None),
    (1, 1, torch.float32, None),
    (1, 8, torch.float32, 1.6),
    (1, 64, torch.float32, 4.0),
    (1, 256, torch.float32, None),
    (8, 64, torch.bfloat16, None),
    (1, 64, torch.bfloat16, None),
)
TRAINING_BAR = 1 / 1.5
Step = Callable[[], object]


class Pair(NamedTuple):
    """Two ways to the same result, or to one of the same size; `bar`: how many times faster ours has to be."""

    step: str
    dtype: torch.dtype
    adapters: int
    against: str
    theirs: Step
    ours: Step
    bar: float | None


def peft_layer(adapters: int, dtype: torch.dtype) -> nn.Module:
    """PEFT's linear layer with that many adapters, B not zero, in eval mode."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", nn.Linear(SIZE, SIZE, bias=False, dtype=dtype))
    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["layer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is more than one adapter
        for adapter in range(adapters):
            inject_adapter_in_model(config, model, adapter_name=f"adapter{adapter}")
    layer = model.eval().layer
    for lora_B in layer.lora_B.values():
        nn.init.normal_(lora_B.weight, std=RANK**-0.5)
    return layer.requires_grad_(False)


def factors(layer: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    return [[module.weight for module in side.values()] for side in (layer.lora_A, layer.lora_B)]  # type: ignore[return-value]


def mixed_batch(tokens: int, adapters: int, dtype: torch.dtype, bar: float | None) -> list[Pair]:
    """Against PEFT, and what the base layer alone takes. Of more adapters than samples each sample has another."""
    layer = peft_layer(adapters, dtype)
    lora_As, lora_Bs = factors(layer)
    weight = layer.base_layer.weight
    ids = torch.arange(SAMPLES) * max(1, adapters // SAMPLES) % adapters
    names = [f"adapter{adapter}" for adapter in ids.tolist()]
    x = torch.randn(SAMPLES, tokens, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)

    def ours() -> Tensor:
        return functional.multi_lora_linear(x, weight, lora_As, lora_Bs, ids, scalings=SCALING, training=False)

    def peft() -> Tensor:
        return layer(x, adapter_names=names)

    error = relative_error(ours(), peft().double())
    assert error < 4 * torch.finfo(dtype).eps, f"{tokens} tokens, {adapters} adapters: they differ by {error:.2e}"
    step = f"{SAMPLES} x {tokens} forward"
    return [
        Pair(step, dtype, adapters, "PEFT", peft, ours, bar),
        Pair(step, dtype, adapters, "base alone", lambda: F.linear(x, weight), ours, None),
    ]


def training(adapters: int, bar: float | None) -> Pair:
    """A step of many adapters against one of a single adapter on the same rows."""
    lora_As, lora_Bs = factors(peft_layer(adapters, torch.float32).requires_grad_())
    weight = torch.randn(SIZE, SIZE) * SIZE**-0.5
    x, grad_y = torch.randn(SAMPLES * 8, SIZE, requires_grad=True), torch.randn(SAMPLES * 8, SIZE)
    ids = torch.arange(SAMPLES).repeat_interleave(8) % adapters

    def many() -> object:
        y = functional.multi_lora_linear(x, weight, lora_As, lora_Bs, ids, scalings=SCALING)
        return torch.autograd.grad(y, (x, *lora_As, *lora_Bs), grad_y)

    def one() -> object:
        y = functional.lora_linear(x, weight, lora_As[0], lora_Bs[0], scaling=SCALING)
        return torch.autograd.grad(y, (x, lora_As[0], lora_Bs[0]), grad_y)

    return Pair(f"{SAMPLES} x 8 training", torch.float32, adapters, "one adapter", one, many, bar)


def measure(pair: Pair, rounds: int) -> dict:
    theirs, ours = HostStopwatch([pair.theirs]), HostStopwatch([pair.ours])
    named = pair._asdict() | {"dtype": str(pair.dtype).removeprefix("torch.")}
    named = {name: named[name] for name in ("step", "dtype", "adapters", "against", "bar")}
    return named | compare.ratio(theirs, ours, rounds)._asdict()


def cells(record: dict) -> tuple:
    """A record as a row of the table."""
    times = (f"{record[name] * 1e3:.2f}" for name in ("a", "b"))
    ratios = (f"{record[name]:.2f}" for name in ("ratio", "low", "high", "best"))
    bar = None if record["bar"] is None else f"{record['bar']:.2f}"
    return *(record[name] for name in ("step", "dtype", "adapters", "against")), *times, *ratios, bar


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    for case in CASES:
        with torch.no_grad():
            records += [measure(pair, options.rounds) for pair in mixed_batch(*case)]
        print(table([cells(records[-2])], HEADERS).splitlines()[-1], file=sys.stderr)
    for adapters, bar in ((8, TRAINING_BAR), (64, None)):
        records.append(measure(training(adapters, bar), options.rounds))
        print(table([cells(records[-1])], HEADERS).splitlines()[-1], file=sys.stderr)
    print(table(map(cells, records), HEADERS))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")
    return int(any(record["bar"] and max(record["ratio"], record["best"]) < record["bar"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
