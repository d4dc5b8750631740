"""`peft-kernels bench`: what it calls, and what it says where there is nothing to call."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

import peft_kernels
from peft_kernels.cli import bench
from peft_kernels.cli.main import main

pytest.importorskip("pytest_benchmark")


@pytest.fixture
def calls(monkeypatch):
    """Records the programs instead of running them; `calls.codes` are their exit codes."""
    record = SimpleNamespace(commands=[], codes=[0, 0])

    def run(command, **options):
        record.commands.append(command)
        for argument in command:
            if argument.startswith("--benchmark-json="):
                with open(argument.partition("=")[2], "w") as file:
                    file.write("{}")
        return SimpleNamespace(returncode=record.codes[len(record.commands) - 1])

    monkeypatch.setattr(bench.subprocess, "run", run)
    return record


def test_runs_the_files_and_prints_their_table(calls, tmp_path):
    results = tmp_path / "results" / "run.json"
    assert main(["bench", "-k", "M4", "--backend", "composed", "--json", str(results)]) == 0
    run, report = calls.commands
    assert "benchmarks/bench_lora_linear.py" in run
    assert run[run.index("-k") + 1] == "(M4) and (not ours or composed)"
    assert report[1:] == ["-m", "benchmarks.report", str(results)]


def test_a_failed_benchmark_still_prints_the_table_and_fails(calls, capsys):
    calls.codes = [1, 0]
    assert main(["bench"]) == 1
    assert len(calls.commands) == 2
    assert "a benchmark failed" in capsys.readouterr().err


def test_no_match_is_an_error(calls, capsys):
    calls.codes = [5]
    assert main(["bench", "-k", "nothing"]) == 2
    assert "no benchmark matches" in capsys.readouterr().err


def test_an_installation_without_benchmarks_is_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peft_kernels, "__file__", str(tmp_path / "peft_kernels" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "source checkout" in capsys.readouterr().err


def test_benchmarks_really_run_and_their_report_is_printed(tmp_path, monkeypatch, capfd):
    for variable in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(variable)  # pytest-benchmark measures nothing in what it takes for a parallel run
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "bench_thing.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('peer', ['frozen', 'ours-(composed)', 'ours-(triton)'])\n"
        "def test_thing(benchmark, peer):\n"
        "    benchmark.pedantic(sum, args=([1, 2],), rounds=2)\n"
    )
    (folder / "report.py").write_text(
        "import json, sys\n"
        "rows = json.load(open(sys.argv[1]))['benchmarks']\n"
        "print('TABLE', *(row['params']['peer'] for row in rows))\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\n")
    monkeypatch.setattr(peft_kernels, "__file__", str(tmp_path / "peft_kernels" / "__init__.py"))
    assert main(["bench", "--backend", "composed"]) == 0
    assert "TABLE frozen ours-(composed)\n" in capfd.readouterr().out
