"""Charts of time against density from result files: block-sparse layers, layers of which chosen weights train, and
unstructured ones of layout "csr".

    python -m benchmarks.density_charts [--results FOLDER] [--output FOLDER]

Reads `block_sparse_time.json`, `delta_time.json` and `csr_time.json`, by default of benchmarks/results/cpu.
Only what was measured is drawn: medians of interleaved ratios; of ours their quartiles too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.provenance import ROOT

STEPS = {"forward": "forward", "training": "forward + backward"}


def relative_to(base: str, records: Iterable[dict]) -> dict[str, list[tuple[float, float, float, float]]]:
    """For ours and for each other way, (density, time / that of `base`, quartile 1, quartile 3), by density.

    A record's ratio is its way's time over ours, so that of another way over the base is the quotient of two records;
    quartiles are known of ours alone.
    """
    records = sorted(records, key=lambda record: record["density"])
    bases = {record["density"]: record for record in records if record["against"] == base}
    lines: dict[str, list[tuple[float, float, float, float]]] = {"peft_kernels": []}
    for density, record in bases.items():
        lines["peft_kernels"].append((density, *(1 / record[name] for name in ("ratio", "high", "low"))))
    for record in records:
        if record["against"] != base and record["density"] in bases:
            time = record["ratio"] / bases[record["density"]]["ratio"]
            lines.setdefault(record["against"], []).append((record["density"], time, time, time))
    return lines


def _panel(panel, base: str, records: list[dict], title: str) -> None:
    for name, points in relative_to(base, records).items():
        densities, times, lows, highs = zip(*points, strict=True)
        errors = [[max(0.0, t - low) for t, low in zip(times, lows, strict=True)],
                  [max(0.0, high - t) for t, high in zip(times, highs, strict=True)]]  # fmt: skip
        panel.errorbar(densities, times, yerr=errors, marker="o", markersize=3.5, capsize=2, linewidth=1.2, label=name)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_title(title, fontsize=9)
    panel.set_xscale("log")
    panel.set_yscale("log")
    shown = sorted({record["density"] for record in records})
    panel.set_xticks(shown, [f"{100 * density:.3g} %" for density in shown], fontsize=7, rotation=45)
    panel.minorticks_off()
    low, high = panel.get_ylim()
    marks = [mark for mark in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.2, 1.5, 2, 5) if low <= mark <= high]
    panel.set_yticks(marks, [f"{mark:g}" for mark in marks], fontsize=8)
    panel.grid(alpha=0.3, which="both")
    panel.set_ylabel(f"time / {base}", fontsize=9)
    panel.legend(fontsize=7)


def draw(results: Path, target: Path) -> Path:
    """Writes the chart of the files in `results`.

    Raises:
        OSError: a file is not there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = json.loads((results / "block_sparse_time.json").read_text())
    deltas = json.loads((results / "delta_time.json").read_text())
    kept = json.loads((results / "csr_time.json").read_text())
    m, n, k = (blocks["sizes"][name] for name in "mnk")
    figure, (panels, below) = pyplot.subplots(2, 3, figsize=(13, 8.2))
    for panel, (step, title) in zip(panels, STEPS.items(), strict=False):
        records = [record for record in blocks["records"] if record["step"] == step]
        _panel(panel, "dense", records, f"blocks of {blocks['block']}, {title}")
        panel.set_xlabel("density of blocks")
    _panel(panels[2], "two matmuls", deltas, "chosen weights, forward + backward")
    panels[2].set_xlabel("part of the weights that trains")
    for panel, step in zip(below, dict.fromkeys(record["step"] for record in kept["records"]), strict=True):
        records = [record for record in kept["records"] if record["step"] == step]
        _panel(panel, "dense", records, f"csr, {step}")
        panel.set_xlabel("density of weights")
    figure.suptitle(
        f"Time against density, M={m}, N={n}, K={k}, float32, CPU, {blocks['threads']} threads", fontsize=10
    )
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "cpu", metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", metavar="FOLDER")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        print(f"chart: {draw(options.results, options.output / f'density-{options.results.name}.png')}")
    except (OSError, KeyError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
