"""What a training leaves behind: the JSON figures and the table on the screen."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft_kernels
from peft_kernels import MaskedLoRALinear
from peft_kernels.cli.finetune import memory
from peft_kernels.cli.finetune.model import fused_layers
from peft_kernels.cli.finetune.training import Lane, relative_differences
from peft_kernels.formats.nf4 import NF4Weight

MEMORY = {
    "peak_memory_bytes": "peak memory",
    "weights_bytes": "weights",
    "optimizer_bytes": "optimizer state",
    "saved_for_backward_bytes": "saved for backward",
}
LABELS = {"recall": "recall@1", "held_out_loss": "held-out loss", "perplexity": "perplexity"}


def backends_used(model: nn.Module, rows: int) -> str:
    """The implementations that `explain` names for the model's layers at `rows` rows of x, joined by commas."""
    names: dict[str, None] = {}
    for layer in fused_layers(model).values():
        weight = layer.weight
        x = torch.empty(1, dtype=weight.dtype, device=weight.device).expand(rows, layer.in_features)
        options: dict[str, Any] = {
            "scaling": layer.scaling, "bias": layer.bias, "dropout_p": layer.lora_dropout, "training": True,
        }  # fmt: skip
        if isinstance(layer, MaskedLoRALinear):
            options |= {"update_masked": layer.update_masked, "weight_is_masked": True}
            choice = peft_kernels.explain(
                "masked_lora_linear", x, weight, layer.mask, layer.lora_A, layer.lora_B, **options
            )
        else:
            op = "nf4_lora_linear" if isinstance(weight, NF4Weight) else "lora_linear"
            choice = peft_kernels.explain(op, x, weight, layer.lora_A, layer.lora_B, **options)
        names[choice.backend] = None
    return ", ".join(names)


def versions(*packages: str) -> str:
    return ", ".join(f"{package} {metadata.version(package)}" for package in packages)


def lane_figures(lane: Lane, backend: str) -> dict:
    """The figures of one model; what was not reached is None. Seconds are medians, memory is in bytes."""
    last = len(lane.losses)
    figures: dict = {}
    for name in lane.task.metrics:
        figures[f"{name}_before"] = _value(lane.scores.get(0, {}).get(name))
        figures[f"{name}_after"] = _value(lane.scores.get(last, {}).get(name)) if last else None
    figures["losses"] = lane.losses
    figures["seconds_per_step"] = lane.seconds_per_step
    figures["peak_memory_bytes"] = lane.memory.peak or None
    figures["saved_for_backward_bytes"] = lane.memory.saved or None
    figures["weights_bytes"], figures["optimizer_bytes"] = memory.held(lane.model, lane.optimizer)
    figures["backend"] = backend
    return figures


def _value(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def build(lanes: Sequence[Lane], backends: Sequence[str], facts: dict) -> dict:
    """The whole report: the first lane at the top level, the others under their keys ("peft", "lora"), `facts` about
    the run beside them. What compares with PEFT is at the top level too."""
    ours = lanes[0]
    figures = lane_figures(ours, backends[0]) | facts
    figures["memory_measure"] = memory.CUDA_MEASURE if ours.task.device.type == "cuda" else memory.CPU_MEASURE
    figures["versions"] = {"peft_kernels": peft_kernels.__version__, "torch": torch.__version__}
    for lane, backend in zip(lanes[1:], backends[1:], strict=True):
        compared = _comparison(ours, lane)
        figures[lane.key] = lane_figures(lane, backend) | compared
        if lane.key == "peft":
            figures |= compared
    return figures


def _comparison(ours: Lane, other: Lane) -> dict:
    differences = relative_differences(ours.losses, other.losses)
    # Of the same step, so that a busy moment of the machine slows both.
    ratios = [a / b for a, b in zip(ours.seconds, other.seconds, strict=False)]
    return {
        "relative_loss_difference": max(differences, default=None),
        "step_ratio": statistics.median(ratios) if ratios else None,
    }


def write_json(path: Path, figures: dict) -> None:
    path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def print_table(figures: dict, lanes: Sequence[Lane]) -> None:
    """The final table: a column for each model that was trained."""
    from rich.console import Console
    from rich.table import Table

    columns = [figures] + [figures[lane.key] for lane in lanes[1:]]
    table = Table(title=f"{figures['steps']} of {figures['steps_asked']} steps")
    table.add_column("")
    for lane in lanes:
        table.add_column(lane.name, justify="right")
    for label, cells in _rows(columns, lanes[0].task.metrics):
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    for lane, column in zip(lanes[1:], columns[1:], strict=True):
        if column["step_ratio"] is not None:
            console.print(
                f"Step time {column['step_ratio']:.3f} of {lane.name}'s (median over steps); losses differ by at most "
                f"{column['relative_loss_difference']:.1e} (relative).",
                soft_wrap=True,
            )
    console.print(f"Memory: {figures['memory_measure']}.", style="dim", soft_wrap=True)


def _rows(columns: Sequence[dict], metrics: Sequence[str]):
    for name in metrics:
        for when in ("before", "after"):
            yield f"{LABELS[name]} {when}", [_format(column[f"{name}_{when}"], ".3f") for column in columns]
    yield "last training loss", [_format((column["losses"] or [None])[-1], ".4f") for column in columns]
    yield "seconds per step", [_format(column["seconds_per_step"], ".3f") for column in columns]
    for key, label in MEMORY.items():
        yield label, [_format(column[key] and column[key] / 2**20, ".1f", " MiB") for column in columns]
    yield "backend", [column["backend"] for column in columns]


def _format(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"
