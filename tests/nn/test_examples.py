"""The examples of the modules run, and what they print is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_dora_and_groups(capsys):
    losses = runpy.run_path(str(EXAMPLES / "dora_and_groups.py"))["main"]()
    assert losses[-1] < 0.5 * losses[0]
    text = capsys.readouterr().out
    lines = re.findall(r"kept for backward.*", text)
    assert len(lines) == 2
    for line in lines:
        grouped, separate = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:bytes|one)", line))
        assert grouped < 0.6 * separate
    assert float(re.search(r"after merging: (\S+)", text)[1]) < 1e-4
    assert text.rstrip().endswith("True")


def test_replace_linear(capsys):
    runpy.run_path(str(EXAMPLES / "replace_linear.py"))
    assert float(capsys.readouterr().out.rpartition(":")[2]) < 1e-4
