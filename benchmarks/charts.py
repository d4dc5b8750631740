"""Charts from result files: what an adapter adds to the frozen layer's time, against M and against r.

    python -m benchmarks.charts [bench_sweep.json ...] [--output FOLDER]

Only what was measured is drawn: one PNG for each file, the median of the ratios with their quartiles. Without files it
takes every committed `bench_sweep.json`, without a folder `docs/images`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks import report
from benchmarks.provenance import ROOT
from benchmarks.report import Row, Run

AXES = {"m": "rows M", "r": "rank r"}


def sweep(rows: Iterable[Row], axis: str) -> list[Row]:
    """Those rows in which only `axis` varies, the most common values of the other sizes kept fixed."""
    others = [name for name in ("m", "k", "n", "r", "dropout_p") if name != axis]
    rows = [row for row in rows if "ratio_to_frozen" in row.info and all(name in row.info for name in others)]
    varying: dict[tuple, set] = {}
    for row in rows:
        varying.setdefault(tuple(row.info[name] for name in others), set()).add(row.info[axis])
    if not varying:
        return []
    fixed = max(varying, key=lambda key: len(varying[key]))
    return sorted(
        (row for row in rows if tuple(row.info[name] for name in others) == fixed), key=lambda row: row.info[axis]
    )


def draw(run: Run, folder: Path) -> Path:
    """Writes `folder`/overhead-<device>.png.

    Raises:
        ValueError: the file holds no row with sizes and a ratio to the frozen layer.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(AXES), figsize=(11, 4.2), sharey=True)
    for panel, (axis, title) in zip(panels, AXES.items(), strict=True):
        rows = sweep(run.rows, axis)
        if not rows:
            raise ValueError(f"{run.name}: no row with sizes and a ratio to the frozen layer")
        for peer in Counter(row.peer for row in rows if row.peer != "frozen"):
            _line(panel, peer, [row for row in rows if row.peer == peer], axis)
        first = rows[0].info
        fixed = ", ".join(f"{name.upper() if name != 'r' else 'r'}={first[name]}" for name in "mknr" if name != axis)
        panel.set_title(f"{first['mode']}, {fixed}", fontsize=9)
        panel.set_xscale("log", base=2)
        sizes = sorted({row.info[axis] for row in rows})
        panel.set_xticks(sizes, list(map(str, sizes)), fontsize=8)
        panel.minorticks_off()
        panel.set_xlabel(title)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time over the frozen layer, %")
    panels[0].legend(fontsize=8)
    stale = ", of sources that have changed since" if any(row.stale for row in run.rows) else ""
    figure.suptitle(f"What LoRA adds, measured on {run.machine['device']}{stale}", fontsize=10)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"overhead-{run.name.partition('/')[0]}.png"
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _line(panel, peer: str, rows: list[Row], axis: str) -> None:
    ratios = [row.info["ratio_to_frozen"] for row in rows]
    percent = [100 * (ratio["ratio"] - 1) for ratio in ratios]
    below = [100 * max(0.0, ratio["ratio"] - ratio["low"]) for ratio in ratios]
    above = [100 * max(0.0, ratio["high"] - ratio["ratio"]) for ratio in ratios]
    sizes = [row.info[axis] for row in rows]
    panel.errorbar(sizes, percent, yerr=(below, above), marker="o", markersize=4, capsize=2, linewidth=1.2, label=peer)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images", metavar="FOLDER")
    options = parser.parse_args(None if arguments is None else list(arguments))
    paths = options.files or sorted((ROOT / "benchmarks" / "results").glob("*/bench_sweep.json"))
    if not paths:
        print("no bench_sweep.json: run `make bench` (CPU) or `make gpu` first", file=sys.stderr)
        return 1
    try:
        for path in paths:
            print(f"chart: {draw(report.load(path), options.output)}")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
