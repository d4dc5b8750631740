"""The serving example on a tiny model: every row is that of its adapter alone, and the plot is drawn."""

from __future__ import annotations

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_adapters.py"


def test_serve_adapters(tmp_path, capsys):
    plot = tmp_path / "plots" / "serve.png"
    main = runpy.run_path(str(EXAMPLE))["main"]
    rows = main(adapters=(1, 5), new_tokens=4, hidden=64, layers=2, output=plot)
    assert [row.adapters for row in rows] == [1, 5]
    for row in rows:
        assert row.same_tokens == 1.0
        assert row.logit_error < 1e-5
        assert all(rate > 0 for rate in row.tokens_per_second.values())
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(way in printed for way in ("pool", "PEFT mixed batch", "one by one"))
