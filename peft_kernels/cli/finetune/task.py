"""What a task is to the training loop: batches, a loss, and a measure on held-out examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peft_kernels.cli.finetune.data import Example


class Task(Protocol):
    """Implemented by `EmbeddingTask` and `CausalLMTask`."""

    device: torch.device
    # Keys of what `evaluate` returns; the plot shows the first.
    metrics: tuple[str, ...]
    peft_task_type: str

    def batch(self, examples: Sequence[Example]) -> Any:
        """The tensors of one batch, on the device, in the form that `loss` takes."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar to minimise."""

    def count_tokens(self, batch: Any) -> int:
        """Rows of x that a linear layer of the model sees in one call."""

    def evaluate(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """The metrics over all examples."""
