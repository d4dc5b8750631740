"""What a training leaves behind: the JSON figures and the table on the screen."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import peft_kernels
from peft_kernels.cli.finetune import memory
from peft_kernels.cli.finetune.model import fused_layers
from peft_kernels.cli.finetune.training import Lane, relative_differences

LABELS = {"recall": "recall@1", "held_out_loss": "held-out loss", "perplexity": "perplexity"}


def backends_used(model: nn.Module, rows: int) -> str:
    """The implementations that `explain` names for the model's layers at `rows` rows of x, joined by commas."""
    names: dict[str, None] = {}
    for layer in fused_layers(model).values():
        x = layer.weight.new_empty(1).expand(rows, layer.in_features)
        choice = peft_kernels.explain(
            "lora_linear", x, layer.weight, layer.lora_A, layer.lora_B,
            scaling=layer.scaling, bias=layer.bias, dropout_p=layer.lora_dropout, training=True,
        )  # fmt: skip
        names[choice.backend] = None
    return ", ".join(names)


def peft_version() -> str:
    return f"peft {metadata.version('peft')}"


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
    figures["backend"] = backend
    return figures


def _value(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def build(lanes: Sequence[Lane], backends: Sequence[str], facts: dict) -> dict:
    """The whole report: ours at the top level, PEFT's under "peft", `facts` about the run beside them."""
    ours = lanes[0]
    figures = lane_figures(ours, backends[0]) | facts
    figures["memory_measure"] = memory.CUDA_MEASURE if ours.task.device.type == "cuda" else memory.CPU_MEASURE
    figures["versions"] = {"peft_kernels": peft_kernels.__version__, "torch": torch.__version__}
    if len(lanes) == 2:
        figures["peft"] = lane_figures(lanes[1], backends[1])
        differences = relative_differences(ours.losses, lanes[1].losses)
        figures["relative_loss_difference"] = max(differences, default=None)
        # Of the same step, so that a busy moment of the machine slows both.
        ratios = [a / b for a, b in zip(ours.seconds, lanes[1].seconds, strict=False)]
        figures["step_ratio"] = statistics.median(ratios) if ratios else None
    return figures


def write_json(path: Path, figures: dict) -> None:
    path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def print_table(figures: dict, metrics: Sequence[str]) -> None:
    """The final table, with PEFT's column when it was trained beside."""
    from rich.console import Console
    from rich.table import Table

    columns = [figures] + ([figures["peft"]] if "peft" in figures else [])
    table = Table(title=f"{figures['steps']} of {figures['steps_asked']} steps")
    table.add_column("")
    for name in ("peft_kernels", "PEFT")[: len(columns)]:
        table.add_column(name, justify="right")
    for label, cells in _rows(columns, metrics):
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    if figures.get("step_ratio") is not None:
        console.print(
            f"Step time {figures['step_ratio']:.3f} of PEFT's (median over steps); losses differ by at most "
            f"{figures['relative_loss_difference']:.1e} (relative).",
            soft_wrap=True,
        )
    console.print(f"Memory: {figures['memory_measure']}.", style="dim", soft_wrap=True)


def _rows(columns: Sequence[dict], metrics: Sequence[str]):
    for name in metrics:
        for when in ("before", "after"):
            yield f"{LABELS[name]} {when}", [_format(column[f"{name}_{when}"], ".3f") for column in columns]
    yield "last training loss", [_format((column["losses"] or [None])[-1], ".4f") for column in columns]
    yield "seconds per step", [_format(column["seconds_per_step"], ".3f") for column in columns]
    for key, label in (("peak_memory_bytes", "peak memory"), ("saved_for_backward_bytes", "saved for backward")):
        yield label, [_format(column[key] and column[key] / 2**20, ".1f", " MiB") for column in columns]
    yield "backend", [column["backend"] for column in columns]


def _format(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"
