"""What pytest-benchmark records with each run: the machine without its name, and statistics without the raw samples."""

from __future__ import annotations

import pytest

from benchmarks import provenance

_STATS = ("min", "max", "mean", "median", "iqr", "stddev", "q1", "q3", "rounds")
_COMMIT = ("id", "time", "dirty")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Peers whose import patches other libraries run last."""
    items.sort(key=lambda item: getattr(getattr(item, "callspec", None), "params", {}).get("peer") in _patching())


def _patching():
    from benchmarks import blocks, many, peers, quantised

    return [peer for peer in (*peers.PEERS, *blocks.PEERS, *quantised.PEERS, *many.PEERS) if peer.patches]


@pytest.hookimpl(trylast=True)
def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.clear()
    machine_info.update(provenance.machine())


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    for key in set(commit_info) - set(_COMMIT):
        del commit_info[key]


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    for row in output_json["benchmarks"]:
        row["stats"] = {name: row["stats"][name] for name in _STATS}
        for key in ("options", "fullname", "params", "param"):
            row.pop(key, None)
