"""Where the examples come from: the standard library's docstrings and JSON lines."""

from __future__ import annotations

import json
import sys

import pytest

from peft_kernels.cli.errors import UsageError
from peft_kernels.cli.finetune import data
from peft_kernels.cli.finetune.data import CAUSAL_LM, EMBEDDING, FIELDS, load_examples, read_jsonl, split
from peft_kernels.cli.finetune.docstrings import collect_pairs


def test_the_standard_library_gives_thousands_of_unambiguous_pairs(docstrings):
    pairs = docstrings
    queries, positives = zip(*pairs, strict=True)
    assert len(pairs) > 2000
    assert len(set(queries)) == len(set(positives)) == len(pairs)
    assert all(len(line) > 25 for line in positives)
    assert ("dumps (json)", "Serialize ``obj`` to a JSON formatted ``str``.") in pairs


def test_the_default_split_is_disjoint_and_the_same_each_time(docstrings, monkeypatch):
    monkeypatch.setattr(data, "collect_pairs", lambda: list(docstrings))
    first = load_examples(EMBEDDING, None)
    assert first == split(docstrings, first.source)
    assert len(first.held_out) == min(1000, (len(first.train) + len(first.held_out)) // 4)
    assert not {text for pair in first.train for text in pair} & {text for pair in first.held_out for text in pair}


def test_sources_are_parsed_and_never_imported(tmp_path):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    long = "A docstring that is certainly long enough."
    (tmp_path / "side_effect.py").write_text(f'raise SystemExit\ndef run():\n    """{long} One."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "_private.py").write_text(f'def hidden():\n    """{long} Two."""\n')
    (tmp_path / "pkg" / "test" / "case.py").write_text(f'def hidden():\n    """{long} Three."""\n')
    (tmp_path / "pkg" / "__init__.py").write_text(
        f'class Outer:\n    """{long} Four.\n\n    More."""\n    def inner(self):\n        """{long} Five."""\n'
        f'    def _hidden(self):\n        """{long} Six."""\n    def short(self):\n        """Too short to use."""\n'
        f'def again():\n    """{long} Four."""\ndef blank():\n    """   """\n'
    )
    assert collect_pairs(tmp_path) == [
        ("run (side_effect)", f"{long} One."),
        ("Outer (pkg)", f"{long} Four."),
        ("Outer.inner (pkg)", f"{long} Five."),
    ]
    assert "side_effect" not in sys.modules


def test_a_python_without_sources_is_named(tmp_path):
    with pytest.raises(UsageError, match="no library sources"):
        collect_pairs(tmp_path)


def test_split_keeps_what_is_held_out_out_of_training():
    examples = [(f"q{i}", f"p{i % 15}") for i in range(40)] * 2
    data = split(examples, "here")
    assert len(data.held_out) == 10
    assert not {p for _, p in data.train} & {p for _, p in data.held_out}
    assert set(data.train) | set(data.held_out) <= set(examples)


def test_too_few_examples_are_refused():
    with pytest.raises(UsageError, match="at least 2 of each"):
        split([("q", "p")] * 50, "here")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "positive"', r"line 2: not JSON .*column"),
        ('["a", "b"]', "line 2: list; expected an object"),
        ('{"query": "a"}', r"line 2: has the keys \['query'\]"),
        ('{"query": "a", "positive": 3}', "line 2: 'positive' is 3; expected text"),
        ('{"query": " ", "positive": "b"}', "line 2: 'query' is ' '; expected text"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_text('{"query": "a", "positive": "b"}\n' + line + "\n")
    with pytest.raises(UsageError, match=message):
        read_jsonl(file, FIELDS[EMBEDDING])


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_file_that_gives_nothing_is_named(tmp_path, content):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"data\.jsonl"):
        read_jsonl(file, FIELDS[EMBEDDING])


def test_causal_lm_takes_text_and_prompts_in_one_file(tmp_path):
    file = tmp_path / "data.jsonl"
    records = [{"text": "a", "id": 1}, {"prompt": "b", "completion": "c"}]
    file.write_text("\n\n".join(json.dumps(record) for record in records))
    assert read_jsonl(file, FIELDS[CAUSAL_LM]) == [("a",), ("b", "c")]
