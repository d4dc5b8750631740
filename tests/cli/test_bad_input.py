"""What does not fit ends with exit code 2 and a line that names it, never with a traceback."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from peft_kernels.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: 0 is not at least 1"),
        ("--steps many", "--steps: 'many' is not an integer"),
        ("--batch-size -1", "--batch-size: -1 is not at least 1"),
        ("--r 0", "--r: 0 is not a rank in 1..512"),
        ("--r 513", "--r: 513 is not a rank"),
        ("--lora-alpha nan", "--lora-alpha: nan is not a finite number above 0"),
        ("--lora-dropout 1.5", "--lora-dropout: 1.5 is not a probability"),
        ("--lora-dropout -0.1", "--lora-dropout: -0.1 is not a probability"),
        ("--sparsity 1", "--sparsity: 1 is not a probability"),
        ("--lr 0", "--lr: 0 is not a finite number above 0"),
        ("--dtype int8", "--dtype: invalid choice: 'int8'"),
        ("--task chess", "--task: invalid choice: 'chess'"),
        ("--target-modules a,,b", "--target-modules: 'a,,b' is not a comma-separated list"),
        ("--threads 0", "--threads: 0 is not at least 1"),
        ("--max-length 7", "--max-length: 7 is not at least 8"),
        ("--seed x", "--seed: invalid int value: 'x'"),
    ],
)
def test_arguments_that_do_not_parse(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["finetune", *arguments.split()])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./missing"], "--model ./missing: no such folder"),
        (["--model", "{tmp}"], "--model {tmp}:"),
        (["--data", "{tmp}/missing.jsonl"], "cannot read {tmp}/missing.jsonl: No such file or directory"),
        (["--data", "{bad}"], "bad.jsonl, line 2: has the keys ['query']"),
        (
            ["--target-modules", "query,nothing"],
            "match no linear layer: nothing; the model's linear layers are named: ",
        ),
        (["--device", "tpu"], "--device tpu: expected auto, cpu, cuda"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch sees"),
        (["--batch-size", "1000"], "--batch-size 1000: there are only 1"),
        (["--output", "{bad}"], "cannot make the folder"),
        (["--json", "{tmp}"], "is a folder; expected a file"),
    ],
)
def test_what_does_not_fit_the_machine_the_model_or_the_data(arguments, message, tmp_path, encoder, pairs, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "a", "positive": "b"}\n{"query": "c"}\n')
    names = {"tmp": tmp_path, "bad": bad}
    given = [argument.format(**names) for argument in arguments]
    defaults = ["--model", encoder, "--data", pairs, "--batch-size", 8, "--output", tmp_path / "out"]
    assert main(["finetune", *map(str, defaults), *given]) == 2
    error = capsys.readouterr().err
    assert message.format(**names) in error
    assert error.startswith("peft-kernels finetune: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("command", "extra"), [("finetune", "demo"), ("bench", "bench")])
def test_missing_packages_are_named_with_the_extra_that_brings_them(command, extra, monkeypatch, capsys):
    find = importlib.util.find_spec
    missing = {"matplotlib", "rich", "pytest_benchmark"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    assert main([command]) == 2
    assert f'pip install "peft-kernels[{extra}]"' in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["frobnicate"])
    assert stop.value.code == 2
    assert "frobnicate" in capsys.readouterr().err


def test_as_a_program_it_needs_only_the_base_installation_and_shows_no_traceback():
    """Everything beyond torch is blocked: the parser still works, and the error says what is missing."""
    program = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('transformers', 'peft', 'rich', 'tqdm', 'matplotlib', 'pytest'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from peft_kernels.cli.main import main\n"
        "assert not {'transformers', 'peft', 'rich'} & sys.modules.keys()\n"
        "try:\n"
        "    main(['--version'])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "main(['finetune', '--r', '0'])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stdout.startswith("peft-kernels ")
    assert "0 is not a rank" in result.stderr
    assert "Traceback" not in result.stderr
