"""One picture of a training: the loss curves and the held-out metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peft_kernels.cli.finetune.training import Lane

OURS_STYLE = {"color": "#1f6feb", "linewidth": 2.4}
# Dashed and on top, so that two curves that agree can both be seen.
OTHER_STYLES = (
    {"color": "#f0883e", "linewidth": 1.4, "linestyle": (0, (4, 3))},
    {"color": "#2da44e", "linewidth": 1.4, "linestyle": (0, (1, 2))},
)
LABELS = {"recall": "recall@1, held out", "held_out_loss": "loss per token, held out"}


def save_plot(path: Path, lanes: Sequence[Lane], metric: str, title: str) -> None:
    """Writes a PNG: training loss on the left, `metric` over the steps on the right, one curve per model."""
    # The object interface rather than pyplot: no display is looked for and no global state is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for lane, style in zip(lanes, (OURS_STYLE, *OTHER_STYLES), strict=False):
        left.plot(range(1, len(lane.losses) + 1), lane.losses, label=lane.name, **style)
        steps = sorted(lane.scores)
        values = [lane.scores[step][metric] for step in steps]
        if style is OURS_STYLE:
            right.plot(steps, values, marker="o", markersize=5, **style)
            _label_ends(right, steps, values)
        else:  # evaluated at the ends only: a line between them would claim more
            right.plot(steps, values, marker="x", markersize=9, markeredgewidth=2, linestyle="", color=style["color"])
    left.set_ylabel("training loss")
    left.set_ylim(bottom=0)
    right.set_ylabel(LABELS[metric])
    right.margins(x=0.08, y=0.18)
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    FigureCanvasAgg(figure).print_png(path)


def _label_ends(axes, steps: list[int], values: list[float]) -> None:
    """Writes the first and the last value on the side that the curve leaves free."""
    if not steps:
        return
    rising = values[-1] >= values[0]
    for index, above in {0: not rising, len(steps) - 1: rising}.items():
        axes.annotate(
            f"{values[index]:.3f}", (steps[index], values[index]), textcoords="offset points",
            xytext=(0, 9 if above else -18), ha="center", fontsize=9,
        )  # fmt: skip
