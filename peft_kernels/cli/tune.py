"""`peft-kernels tune`: checks and measures kernel configurations on this machine's GPU and keeps the winners.

Where the fused kernels are measured to be faster than what runs without them, they are used from then on.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_kernels import dispatch, tuning
from peft_kernels._table import table
from peft_kernels.checks import MAX_RANK
from peft_kernels.cli.errors import CommandError, UsageError, positive_float, probability
from peft_kernels.kernels.triton import _launch
from peft_kernels.problems import BUILDERS
from peft_kernels.tuning import presets, provenance
from peft_kernels.tuning.candidates import Machine, candidates
from peft_kernels.tuning.configs import CONFIGS
from peft_kernels.tuning.points import EXTENTS, SMALL, Point
from peft_kernels.tuning.presets import PRESETS, Sizes
from peft_kernels.tuning.search import OURS, Deadline, Interrupted, Laboratory, Report, Search, Workload
from peft_kernels.tuning.store import Store

SUMMARY = "measure kernel configurations on this GPU and use the winners"

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEVICE = "cuda"


def tunable() -> list[str]:
    """Ops that have a Triton implementation, something to compare it with, and a problem to measure it on."""
    return [op for op, order in dispatch.ORDER.items() if OURS in order and op in BUILDERS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", nargs="+", choices=tunable(), metavar="OP", help=f"of {', '.join(tunable())}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shapes", nargs="+", type=sizes, metavar="M,N,K,r", help="rows, out and in features, rank")
    what.add_argument("--preset", choices=PRESETS, default=SMALL, help="default: %(default)s; full takes hours")
    parser.add_argument(
        "--extent",
        choices=EXTENTS,
        default=SMALL,
        help="how far from what is in force (none: only compare that; default: %(default)s)",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    parser.add_argument(
        "--adapter-dtype",
        nargs="+",
        choices=("same", *DTYPES),
        default=["same", "float32"],
        help="of the adapters (default: that of the layer, and float32)",
    )
    parser.add_argument("--dropout", nargs="+", type=probability, default=[0.0, 0.05], metavar="P")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="default: a file of the user's that the library reads"
    )
    parser.add_argument("--minutes", type=positive_float, default=math.inf, metavar="N", help="stop after so many")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and measure nothing")


def sizes(text: str) -> Sizes:
    """M,N,K,r."""
    try:
        found = Sizes(*map(int, text.split(",")))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not M,N,K,r: four integers") from None
    if min(found) < 1 or found.r > MAX_RANK:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are at least 1 and the rank at most {MAX_RANK}")
    return found


@dataclass(frozen=True)
class Target:
    """The device that is measured, and the file that gets the results."""

    device: str
    arch: str
    index: int | None
    machine: Machine
    output: Path


def run(options: argparse.Namespace) -> int:
    """Returns 0 when everything was measured or the time was up.

    Raises:
        UsageError: there is no GPU for it, or the output is no tuning file.
        CommandError: a candidate left the GPU unusable, or the output cannot be written.
    """
    target = find_target(options.output)
    work = list(workloads(options))
    try:
        store = Store(target.output, target.arch)
    except (tuning.TuningError, OSError) as error:
        raise UsageError(f"{target.output}: {error}") from None
    if options.dry_run:
        print(plan(work, store, target, options.extent))
        return 0
    bar, report = progress(work)
    found = tune(bar, store, target, options.extent, Deadline(options.minutes), report)
    print(summary(found))
    left = len(work) - sum(point.searched(options.extent) for point in found)
    print(f"written to {target.output}" + (f"; {left} problems are left, run it again to go on" if left else ""))
    return 0


def progress(work: list[Workload]) -> tuple[Iterable[Workload], Report]:
    """The work with a bar, where there is a terminal and tqdm to draw it, and what prints a line beside it."""
    if importlib.util.find_spec("tqdm") is None or not sys.stderr.isatty():
        return work, print
    from tqdm import tqdm

    bar = tqdm(work, unit="problem")
    return bar, bar.write


def find_target(output: Path | None) -> Target:
    """Raises UsageError where this machine has no GPU for the Triton kernels."""
    reason = _launch.unavailable(DEVICE, None)
    if reason is not None:
        raise UsageError(f"nothing to measure on: {reason}")
    index = torch.cuda.current_device()
    arch = _launch.gpu_architecture(index)
    # Imported only now: without a GPU there is nothing to ask.
    from triton.runtime import driver

    shared_bytes = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    machine = Machine(arch, torch.cuda.get_device_properties(index).multi_processor_count, shared_bytes)
    return Target(DEVICE, arch, index, machine, output or tuning.user_folder() / f"{arch}.json")


def workloads(options: argparse.Namespace) -> Iterator[Workload]:
    """What the options ask for, sizes slowest, without repetitions."""
    adapter_dtypes = [None if name == "same" else DTYPES[name] for name in options.adapter_dtype]
    dtypes = [DTYPES[name] for name in options.dtype]
    ops = options.op or ["lora_linear", *(op for op in tunable() if op != "lora_linear")]
    for shape in presets.shapes(options.shapes or PRESETS[options.preset], dtypes, adapter_dtypes, options.dropout):
        yield from (Workload(op, shape) for op in ops if shape.dropout_p or op != "philox_dropout")


def tune(
    work: Iterable[Workload], store: Store, target: Target, extent: str, deadline: Deadline, report: Report, **lab
) -> list[Point]:
    """Measures what the store does not hold yet and saves each result at once.

    Returns:
        The points of all workloads that have one, in order.

    Raises:
        CommandError: a candidate left the GPU unusable, or the file cannot be written. What there is was saved.
    """
    found = []
    for workload in work:
        here = provenance.here(workload.op, workload.rival, target.index)
        known = store.find(workload.op, workload.problem(), workload.rival, here)
        if known is None or not known.searched(extent):
            if deadline.over:
                continue
            report(f"{workload} against {workload.rival}")
            known = _measure(workload, store, target, extent, deadline, report, here, known, lab)
        found.append(known)
    return found


def _measure(workload, store, target, extent, deadline, report, here, known, lab) -> Point:
    try:
        search = Search(
            Laboratory(workload, target.device, **lab), here, target.machine, extent,
            fixed=store.answers(workload.op, workload.rival, here), known=known, deadline=deadline, report=report,
        )  # fmt: skip
        point = search.run()
    except Interrupted as error:
        _save(store, error.point)
        raise CommandError(f"{error}; what was measured is saved, run it again to go on without that one") from error
    _save(store, point)
    return point


def _save(store: Store, point: Point) -> None:
    try:
        store.save(point)
    except OSError as error:
        raise CommandError(f"cannot write {store.path}: {error.strerror}") from None
    tuning.forget()
    dispatch.forget()


HEADERS = ("op", "problem", "mode", "us", "rival us", "ratio", "quartiles", "")


def summary(found: Iterable[Point]) -> str:
    """The comparisons as a table."""
    rows: list[tuple] = []
    for point in found:
        problem = " ".join(f"{name}={value}" for name, value in point.problem)
        if not point.compared:
            rows.append((point.op, problem, None, None, None, None, None, point.verdict))
        for mode, timing in point.compared:
            quartiles = f"{timing.low:.3f} to {timing.high:.3f}"
            state = ("used from now on" if point.wins else "not used") + ("" if point.complete else ", time was up")
            rows.append((point.op, problem, mode, timing.us, timing.rival_us, timing.ratio, quartiles, state))
    return table(rows, HEADERS)


def plan(work: Iterable[Workload], store: Store, target: Target, extent: str) -> str:
    """What would be measured, and how many candidates the kernels have that a call asks for now."""
    rows = []
    for workload in work:
        here = provenance.here(workload.op, workload.rival, target.index)
        known = store.find(workload.op, workload.problem(), workload.rival, here)
        state = "to do" if known is None else "done" if known.searched(extent) else "to go on with"
        rows.append((workload.op, str(workload.shape), workload.rival, state))
    kernels = []
    for kernel in CONFIGS:
        rules = tuning.rules(target.arch, kernel)
        if rules:
            found = candidates(kernel, "bfloat16", rules[-1].config, extent, target.machine)
            kernels.append((kernel, len(found)))
    return "\n".join(
        (table(rows, ("op", "problem", "rival", "state")), "", table(kernels, ("kernel", "candidates")), "",
         f"would be written to {target.output}")
    )  # fmt: skip
