"""Training of one model, or of two beside each other step by step, with what is measured on the way."""

from __future__ import annotations

import contextlib
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from peft_kernels.cli.errors import CommandError
from peft_kernels.cli.finetune.data import Example
from peft_kernels.cli.finetune.memory import Memory
from peft_kernels.cli.finetune.optimizers import make_optimizer
from peft_kernels.cli.finetune.task import Task

EVALUATIONS = 4
WEIGHT_DECAY = 0.01  # AdamW's own default, of PyTorch and of bitsandbytes


@dataclass
class Lane:
    """One model in training and its measurements. `key` is its place in the figures; the first lane's are on top."""

    key: str
    name: str
    model: nn.Module
    task: Task
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)

    @classmethod
    def of(cls, key: str, name: str, model: nn.Module, task: Task, optim: str, lr: float) -> Lane:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return cls(key, name, model, task, make_optimizer(optim, trained, lr, WEIGHT_DECAY))

    def step(self, batch) -> None:
        """Forward, backward and update, timed together.

        Raises:
            CommandError: the loss is not finite; the weights keep their last values.
        """
        device = self.task.device
        self.model.train()
        _synchronize(device)
        start = time.perf_counter()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        value = float(loss.detach())
        if value - value != 0:
            raise CommandError(
                f"{self.name}: the loss is {value} at step {len(self.losses) + 1}; "
                "try a smaller --lr, or --dtype float32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        _synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(value)

    def evaluate(self, examples: Sequence[Example]) -> None:
        self.model.eval()
        self.scores[len(self.losses)] = self.task.evaluate(self.model, examples)

    @property
    def seconds_per_step(self) -> float | None:
        """Median, so that the slow first step and a busy moment of the machine do not count."""
        return statistics.median(self.seconds) if self.seconds else None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw_batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches, a new order each epoch; what does not fill a batch waits for the next epoch."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(range(len(examples)), len(examples))
        for start in range(0, len(order) - size + 1, size):
            yield [examples[i] for i in order[start : start + size]]


def train(
    lanes: Sequence[Lane],
    batches: Iterator[list[Example]],
    held_out: Sequence[Example],
    steps: int,
    progress: Callable[[Sequence[Lane], str], None],
) -> bool:
    """Trains all lanes on the same batches, one step of each in turn.

    Which lane goes first alternates, so that neither always finds the other's caches; ratios of their times then come
    from the same moments of the machine.

    Args:
        lanes: the models; evaluated before and after, the first also `EVALUATIONS - 1` times between.
        batches: from `draw_batches`.
        held_out: what to evaluate on.
        steps: number of steps.
        progress: called with the lanes and what is done next, "evaluating" or "training".

    Returns:
        Whether all steps were made: False after Ctrl-C, which lets the current step end (a second one does not).

    Raises:
        CommandError: a loss is not finite.
    """
    evaluated = {round(steps * part / EVALUATIONS) for part in range(EVALUATIONS + 1)}
    try:
        with _deferred_interrupt() as interrupted:
            for step in range(steps + 1):
                if step in evaluated:
                    progress(lanes, "evaluating")
                    for lane in lanes if step in (0, steps) else lanes[:1]:
                        lane.evaluate(held_out)
                if step == steps or interrupted.is_set():
                    break
                progress(lanes, "training")
                batch = lanes[0].task.batch(next(batches))
                for lane in lanes if step % 2 == 0 else reversed(lanes):
                    with lane.memory.measured(lane.model, lane.optimizer, lane.task.device):
                        lane.step(batch)
    except KeyboardInterrupt:
        return False
    return not interrupted.is_set()


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C only sets the event: no step is left half done. A second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number, frame) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def relative_differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """|a - b| / |b| at each step that both have."""
    return [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(first, second, strict=False)]
