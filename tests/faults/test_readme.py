"""README.md lists each of the 77 faults, with tests of its number or with what it waits for, and the 14 traps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = dict(
    re.match(r"\| F(\d\d) \| .*? \| (.*) \|$", line).groups()
    for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| F")
)


def test_every_fault_is_listed():
    assert list(ROWS) == [f"{number:02}" for number in range(1, 78)]


@pytest.mark.parametrize("number", ROWS)
def test_listed_files_hold_tests_of_that_number(number):
    where = ROWS[number].split("; ")[0]
    if where.startswith("arrives with"):
        return
    first = re.search(r"`([^`]*\.py)`", where).group(1)
    path = HERE.parents[1] / first if first.startswith("tests/") else HERE / first
    assert f"def test_f{number}_" in path.read_text(encoding="utf-8"), first


def test_every_trap_has_its_test():
    lines = (HERE / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [re.match(r"\| T(\d\d) \| .*? \| `(\w+)`", line) for line in lines if line.startswith("| T")]
    assert [row.group(1) for row in rows] == [f"{number:02}" for number in range(1, 15)]
    source = (HERE / "test_traps.py").read_text(encoding="utf-8")
    for row in rows:
        assert f"t{row.group(1)}_" in row.group(2)
        assert f"def {row.group(2)}(" in source
