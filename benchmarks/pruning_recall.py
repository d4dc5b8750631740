"""Sparsity against recall@1 of the demo's encoder: magnitude and Wanda without training, magnitude with fine-tuning,
lottery-ticket rounds and movement pruning.

    python -m benchmarks.pruning_recall [--steps 40] [--rounds 3] [--rate 0.25] [--sparsity 0.5] [--json FILE]

All trainings fine-tune every parameter by AdamW (movement's scores by SGD) on the same batches, from the pretrained
weights; recall is of the demo's held-out pairs. A lottery round trains, prunes by magnitude, rewinds to the pretrained
weights and trains again. A few dozen steps say whether a method works and no more: what pruning costs after a full
fine-tuning is another matter, of movement pruning above all, which needs weights that have moved.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_kernels._table import table
from peft_kernels.cli.finetune.data import EMBEDDING, Split, load_examples
from peft_kernels.cli.finetune.embedding import EmbeddingTask
from peft_kernels.cli.finetune.model import load_model
from peft_kernels.cli.finetune.training import draw_batches
from peft_kernels.pruning import (
    Cubic,
    LotteryTicket,
    add_movement,
    apply_masks,
    finalize_movement,
    magnitude_masks,
    score_parameters,
    set_sparsity,
    sparsity_report,
    wanda_masks,
)

HEADERS = ("method", "steps", "sparsity", "recall@1", "seconds")


class Record(NamedTuple):
    method: str
    steps: int
    sparsity: float
    recall: float
    seconds: float


class Experiment:
    """The model, the data and the training that all methods share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        model, tokenizer = load_model(None, EMBEDDING, torch.float32, torch.device("cpu"))
        self.pretrained, self.task = model, EmbeddingTask(tokenizer, torch.device("cpu"), options.max_length)
        data = load_examples(EMBEDDING, None)
        self.data = Split(data.train, data.held_out[: options.held_out], data.source)
        self.records: list[Record] = []

    def model(self) -> nn.Module:
        return copy.deepcopy(self.pretrained)

    def batches(self) -> Iterator[Any]:
        batches = draw_batches(self.data.train, self.options.batch_size, self.options.seed)
        return (self.task.batch(examples) for examples in batches)

    def train(self, model: nn.Module, before: Callable[[int], None] | None = None) -> float:
        """Steps over all parameters, `before` each of which is called with its number; returns recall afterwards."""
        scores = {id(p) for p in score_parameters(model)}
        weights = [p for p in model.parameters() if p.requires_grad and id(p) not in scores]
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(weights, lr=self.options.lr, weight_decay=0.01)]
        if scores:
            # Adam would make steps of one size of what differs by orders of magnitude, and that is the ranking.
            optimizers.append(torch.optim.SGD(score_parameters(model), lr=self.options.score_lr))
        model.train()
        for step, batch in zip(range(self.options.steps), self.batches(), strict=False):
            if before is not None:
                before(step)
            self.task.loss(model, batch).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return self.recall(model)

    def recall(self, model: nn.Module) -> float:
        return self.task.evaluate(model.eval(), self.data.held_out)["recall"]

    def note(self, method: str, steps: int, sparsity: float, recall: float, start: float) -> None:
        self.records.append(Record(method, steps, sparsity, recall, time.perf_counter() - start))
        print(self.records[-1], flush=True)


def dense(job: Experiment) -> None:
    for steps in (0, job.options.steps):
        start, model = time.perf_counter(), job.model()
        job.note("dense", steps, 0.0, job.train(model) if steps else job.recall(model), start)


def without_training(job: Experiment) -> None:
    halves = [{**half} for _, batch in zip(range(4), job.batches(), strict=False) for half in batch]
    for name, masks in (
        ("magnitude, global", functools.partial(magnitude_masks)),
        ("magnitude, by row", functools.partial(magnitude_masks, scope="row")),
        ("Wanda", lambda model, sparsity: wanda_masks(model, halves, sparsity)),
    ):
        start, model = time.perf_counter(), job.model()
        apply_masks(model, masks(model, job.options.sparsity))
        job.note(name, 0, sparsity_report(model).sparsity, job.recall(model), start)


def magnitude(job: Experiment) -> None:
    start, model = time.perf_counter(), job.model()
    apply_masks(model, magnitude_masks(model, job.options.sparsity), weight_is_masked=True)
    recall = job.train(model)
    job.note("magnitude, global, fine-tuned", job.options.steps, sparsity_report(model).sparsity, recall, start)


def lottery(job: Experiment) -> None:
    model = job.model()
    ticket = LotteryTicket(model)

    def once(net: nn.Module, i: int) -> float:
        start = time.perf_counter()
        recall = job.train(net)
        job.note(f"lottery ticket, round {i}", job.options.steps, sparsity_report(ticket.masks).sparsity, recall, start)
        return recall

    print(ticket.iterate(once, job.options.rounds, job.options.rate))


def movement(job: Experiment, scores: str = "zeros", method: str = "movement") -> None:
    start, model = time.perf_counter(), job.model()
    add_movement(model, scores=scores)
    steps = job.options.steps
    schedule = Cubic(job.options.sparsity, begin=steps // 10, end=steps * 7 // 10)
    job.train(model, before=lambda step: set_sparsity(model, schedule(step)))
    finalize_movement(model)
    job.note(method, steps, sparsity_report(model).sparsity, job.recall(model), start)


METHODS = {
    "dense": dense, "untrained": without_training, "magnitude": magnitude, "lottery": lottery, "movement": movement,
    "movement-from-magnitude": functools.partial(movement, scores="magnitude", method="movement from magnitude"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.25)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--score-lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    job = Experiment(options)
    for method in options.methods:
        METHODS[method](job)
    rows = [(r.method, r.steps, f"{r.sparsity:.4f}", f"{r.recall:.3f}", f"{r.seconds:.0f}") for r in job.records]
    print(table(rows, HEADERS))
    if options.json is not None:
        facts = {"options": {k: str(v) for k, v in vars(options).items()}, "held_out": len(job.data.held_out)}
        options.json.write_text(json.dumps({**facts, "records": [r._asdict() for r in job.records]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
