"""Tables and plots from the results under `benchmarks/results/<device>/`.

    python -m benchmarks.report [FILE.json ...] [--plot FOLDER] [--output REPORT.md]

Without files it reads every result that is committed. A row is marked `stale` when the sources that it measured have
changed since (`provenance.digest`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import provenance
from peft_kernels._table import table

HEADERS = ("peer", "median µs", "IQR µs", "x PEFT", "x frozen", "% of floor", "kept KiB", "note")
Digest = Callable[[str, str], str]


@dataclass(frozen=True)
class Row:
    """One peer on one problem in one mode, as recorded."""

    problem: str
    mode: str
    peer: str
    stats: dict
    info: dict
    stale: bool

    def cells(self) -> tuple:
        return (
            self.peer, f"{self.stats['median'] * 1e6:.1f}", f"{self.stats['iqr'] * 1e6:.1f}",
            _ratio(self.info.get("ratio_to_peft", self.info.get("ratio_to_bitsandbytes"))),
            _ratio(self.info.get("ratio_to_frozen")),
            f"{self.info['percent_of_floor']:.0f}" if "percent_of_floor" in self.info else None,
            f"{self.info['saved_bytes'] / 2**10:.1f}", self._note(),
        )  # fmt: skip

    def _note(self) -> str:
        notes = ["stale"] if self.stale else []
        if "why" in self.info:
            notes.append(f"runs {self.info['backend']}")
        if self.info["checked"] != "exact mask":
            notes.append(f"checked {self.info['checked']}")
        if self.info["timer"] == "cuda-events":
            notes.append("timed by events")
        return ", ".join([*notes, *self._others(), *self._bars()])

    def _others(self) -> list[str]:
        """Ratios to other peers than those with a column."""
        columns = ("ratio_to_peft", "ratio_to_bitsandbytes", "ratio_to_frozen")
        others = [name for name in self.info if name.startswith("ratio_to_") and name not in columns]
        return [f"{self.info[name]['ratio']:.2f} x {name.removeprefix('ratio_to_')}" for name in others]

    def _bars(self) -> list[str]:
        """Ratios are missed where both the median of pairs and the fastest samples miss."""
        notes = []
        for name, most in self.info.get("bars", {}).items():
            of_time = name == "median_s"
            text = f"bar {most * 1e6:g} µs" if of_time else f"bar {most:.2f} x {name.removeprefix('ratio_to_')}"
            if not of_time and name not in self.info:
                notes.append(f"{text} not compared")
                continue
            found = self.stats["median"] if of_time else min(self.info[name]["ratio"], self.info[name]["best"])
            notes.append(f"{text} {'met' if found <= most else '**missed**'}")
        return notes


def _ratio(recorded: dict | None) -> str | None:
    return None if recorded is None else f"{recorded['ratio']:.2f}"


@dataclass(frozen=True)
class Run:
    """One result file."""

    name: str
    machine: dict
    commit: dict
    rows: tuple[Row, ...]

    def busy(self) -> bool:
        """Whether other processes wanted the cores too: the benchmark alone loads each of them once at most."""
        return self.machine["device"] == "cpu" and self.machine["load_average"] > self.machine["cores"] + 0.5

    def groups(self) -> dict[tuple[str, str], list[Row]]:
        """Rows by (problem, mode), in the file's order, fastest first."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.problem, row.mode), []).append(row)
        return {key: sorted(rows, key=lambda row: row.stats["median"]) for key, rows in groups.items()}


def load(path: Path, digest: Digest = provenance.digest) -> Run:
    """Reads one pytest-benchmark file.

    Raises:
        ValueError: the file is no pytest-benchmark result of this project; the message names it.
    """
    try:
        content = json.loads(path.read_text())
        rows = tuple(_row(entry, digest) for entry in content["benchmarks"])
        return Run(f"{path.parent.name}/{path.name}", content["machine_info"], content["commit_info"], rows)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a benchmark result of this project: {type(error).__name__} {error}") from error


def _row(entry: dict, digest: Digest) -> Row:
    info = entry["extra_info"]
    stale = "digest" in info and info["digest"] != digest(info["op"], info["backend"])
    return Row(info["problem"], info["mode"], info["peer"], entry["stats"], info, stale)


def render(run: Run) -> str:
    """The run as Markdown: where it was measured, then one table for each problem and mode."""
    versions = ", ".join(f"{name} {version}" for name, version in run.machine["versions"].items())
    facts = [f"device {run.machine['device']}", versions, f"commit {run.commit.get('id', 'unknown')[:12]}"]
    facts += [f"{key} {run.machine[key]}" for key in ("driver", "cuda") if key in run.machine]
    if run.commit.get("dirty"):
        facts.append("with uncommitted changes")
    parts = [f"## {run.name}", "; ".join(facts) + "."]
    if run.busy():
        parts.append(
            f"**The machine was busy**: load average {run.machine['load_average']} on {run.machine['cores']} cores. "
            "Only the ratios, taken pair by pair, mean anything."
        )
    for (problem, mode), rows in run.groups().items():
        parts += [f"### {problem}, {mode}", table([row.cells() for row in rows], _headers(rows), markdown=True)]
    return "\n\n".join(parts) + "\n"


def _headers(rows: list[Row]) -> tuple[str, ...]:
    """Layers of 4 bits without an adapter are compared with bitsandbytes, which PEFT's are made of."""
    bare = any("ratio_to_bitsandbytes" in row.info for row in rows)
    return tuple("x bnb" if bare and header == "x PEFT" else header for header in HEADERS)


def plot(run: Run, folder: Path) -> Path:
    """Writes `folder`/<device>-<file>.png: each peer's time as a multiple of the frozen layer's, by problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {key: rows for key, rows in run.groups().items() if any("ratio_to_frozen" in row.info for row in rows)}
    peers = list(dict.fromkeys(row.peer for rows in groups.values() for row in rows if row.peer != "frozen"))
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.22 * len(groups) * max(1, len(peers))))
    height = 0.8 / max(1, len(peers))
    for position, peer in enumerate(peers):
        found = [(i, row) for i, rows in enumerate(groups.values()) for row in rows if row.peer == peer]
        shown = [(i, row.info["ratio_to_frozen"]["ratio"]) for i, row in found if "ratio_to_frozen" in row.info]
        axes.barh([i + position * height for i, _ in shown], [ratio for _, ratio in shown], height, label=peer)
    axes.set_yticks(
        [i + 0.4 for i in range(len(groups))], [f"{problem}\n{mode}" for problem, mode in groups], fontsize=7
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time / frozen layer, {run.machine['device']}")
    axes.legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{run.name.replace('/', '-').removesuffix('.json')}.png"
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def committed() -> list[Path]:
    """Every pytest-benchmark file under `benchmarks/results/`."""
    return sorted((provenance.ROOT / "benchmarks" / "results").glob("*/bench_*.json"))


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write one PNG for each file into this folder")
    parser.add_argument("--output", type=Path, help="write the Markdown here as well")
    options = parser.parse_args(None if arguments is None else list(arguments))
    paths = options.files or committed()
    if not paths:
        print("no results: run `make bench` (CPU) or `make gpu` first", file=sys.stderr)
        return 1
    try:
        runs = [load(path) for path in paths]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    text = "\n".join(map(render, runs))
    print(text)
    if options.output:
        options.output.write_text(text)
    if options.plot:
        for run in runs:
            print(f"plot: {plot(run, options.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
