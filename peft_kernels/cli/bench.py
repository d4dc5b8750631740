"""`peft-kernels bench`: runs the benchmark files of a source checkout and prints their table."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import peft_kernels
from peft_kernels.cli.errors import CommandError, UsageError, require_packages
from peft_kernels.dispatch import BACKENDS

SUMMARY = "run the benchmarks of a source checkout and print the table"

PACKAGES = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "peft": "peft"}
NO_TESTS_COLLECTED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-k", metavar="EXPRESSION", help="benchmarks whose names match, as for pytest")
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), help="of this library's implementations only this one"
    )
    parser.add_argument("--json", metavar="FILE", help="keep pytest-benchmark's results in this file")


def run(options: argparse.Namespace) -> int:
    """Returns 0 when every benchmark ran and its result was right.

    Raises:
        UsageError: there is no source checkout, a package is missing, or no benchmark matches.
        CommandError: a benchmark failed; the table of the others has been printed.
    """
    require_packages("bench", PACKAGES, extra="bench")
    root = find_checkout()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(options.json).resolve() if options.json else Path(folder, "results.json")
        results.parent.mkdir(parents=True, exist_ok=True)
        code = subprocess.run(pytest_command(root, results, options), cwd=root).returncode
        if code == NO_TESTS_COLLECTED:
            raise UsageError("no benchmark matches")
        if results.is_file() and results.stat().st_size:
            subprocess.run([sys.executable, "-m", "benchmarks.report", str(results)], cwd=root, check=False)
    if code:
        raise CommandError("a benchmark failed; see above")
    return 0


def find_checkout() -> Path:
    """The folder that holds `benchmarks/`: where the package was installed from in editable mode, or the current one.

    Raises:
        UsageError: neither has it.
    """
    for root in (Path(peft_kernels.__file__).resolve().parent.parent, Path.cwd()):
        if any(root.glob("benchmarks/bench_*.py")):
            return root
    raise UsageError("the benchmarks are not part of the installed package; run it in a source checkout")


def pytest_command(root: Path, results: Path, options: argparse.Namespace) -> list[str]:
    files = sorted(str(path.relative_to(root)) for path in root.glob("benchmarks/bench_*.py"))
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", f"--benchmark-json={results}"]
    expression = " and ".join(f"({part})" for part in (options.k, _backend_expression(options.backend)) if part)
    return [*command, "-k", expression] if expression else command


def _backend_expression(backend: str | None) -> str | None:
    """The ids of this library's rows hold "ours-(<backend>)"; other libraries' rows stay, to be compared with."""
    return f"not ours or {backend}" if backend else None
