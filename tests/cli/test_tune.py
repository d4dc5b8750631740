"""`peft-kernels tune` without a GPU: what is tried, checked, chosen, written and resumed.

Times are scripted: nothing here says how fast anything is. One search runs the kernels, in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peft_kernels import selfcheck, tuning
from peft_kernels.cli import tune
from peft_kernels.cli.main import build_parser, main
from peft_kernels.kernels.triton import _launch
from peft_kernels.problems import Shape
from peft_kernels.tuning import files, points, provenance, search
from peft_kernels.tuning.candidates import Machine, candidates
from peft_kernels.tuning.points import FORWARD, FORWARD_BACKWARD, FULL, NONE, SMALL
from peft_kernels.tuning.search import Deadline, DeviceLost, Interrupted, Search, Workload
from peft_kernels.tuning.trials import Question, Trial

BF16 = torch.bfloat16
H200 = Machine("sm_90", 132, 227 << 10)
HERE = provenance.Provenance("NVIDIA H200", "570.1", "2.13.0", "3.7.1", "0123456789abcdef")
WORKLOAD = Workload("lora_linear", Shape((8192,), 4096, 4096, 16, BF16, BF16))
DOWN = Question.of("down_projection", "bfloat16", False, {"m": 8192, "r": 16})
GRAD = Question.of("grad_s_b", "bfloat16", False, {"m": 8192, "r": 16})
SUMS = Question.of("sum_over_rows", "bfloat16", False, {"r": 16})
# Without grad_s_b, the op asks for the kernels of two passes.
ASKED = {FORWARD: (DOWN,), FORWARD_BACKWARD: (DOWN, GRAD)}


def in_force(question: Question):
    return tuning.rules("sm_90", question.kernel)[-1].config


@dataclass
class FakeLaboratory:
    """Asks as the op would; `seconds(question, config)` adds up to the time of a call, the rival takes 1000."""

    workload: Workload = WORKLOAD
    seconds: dict = field(default_factory=dict)
    wrong: tuple = ()
    fatal: tuple = ()
    log: list = field(default_factory=list)
    modes = (FORWARD, FORWARD_BACKWARD)
    lost = False

    def ask(self, mode, answers) -> Trial:
        trial = Trial(answers)
        for question in ASKED[mode]:
            trial.answer(question, lambda q=question: in_force(q))
            if question == GRAD and trial.asked[GRAD] is None:
                trial.answer(SUMS, lambda: in_force(SUMS))
        return trial

    def check(self, answers) -> None:
        for mode in self.modes:
            for config in self.ask(mode, answers).asked.values():
                if config in self.fatal:
                    self.lost = True
                    raise RuntimeError("CUDA error: an illegal memory access was encountered")
                if config in self.wrong:
                    raise selfcheck.Disagreement("gradient of lora_A has error 1.0e+00, eager 1.0e-03")

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def watch(self, mode, backend, answers):
        if backend != search.OURS:
            return SimpleNamespace(kind="scripted", sample=lambda: 1000e-6)
        asked = self.ask(mode, answers).asked
        self.log.append((mode, dict(asked)))
        seconds = sum(self.seconds.get(config, 400e-6) for config in asked.values())
        return SimpleNamespace(kind="scripted", sample=lambda: seconds)


def searched(laboratory, **options) -> points.Point:
    return Search(laboratory, HERE, H200, SMALL, **options).run()


def choice_of(point, question):
    return next(choice for choice in point.choices if choice.question == question)


def neighbour(question: Question, index: int = 1):
    return candidates(question.kernel, "bfloat16", in_force(question), SMALL, H200)[index]


def test_every_candidate_is_measured_and_the_fastest_wins():
    best = neighbour(DOWN)
    laboratory = FakeLaboratory(seconds={best: 300e-6})
    point = searched(laboratory)
    expected = candidates("down_projection", "bfloat16", in_force(DOWN), SMALL, H200)
    choice = choice_of(point, DOWN)
    assert [candidate.config for candidate in choice.candidates] == list(expected)
    assert choice.config == best
    assert choice.mode == FORWARD, "asked in forward only, and judged by it"
    assert choice_of(point, GRAD).mode == FORWARD_BACKWARD
    assert choice_of(point, GRAD).config == in_force(GRAD), "all equally fast: nothing changes"
    assert {candidate.timing.us for candidate in choice.candidates} == {300.0, 400.0}
    # Kernels are tuned with the winners before them in force.
    assert all(asked[DOWN] == best for mode, asked in laboratory.log if mode == FORWARD_BACKWARD)
    assert point.complete
    assert point.compared == (
        (FORWARD, points.Timing(300.0, 1000.0, 0.3, 0.3, 0.3)),
        (FORWARD_BACKWARD, points.Timing(700.0, 1000.0, 0.7, 0.7, 0.7)),
    )
    assert point.wins
    assert dict(point.problem)["m"] == 8192


def test_a_difference_within_the_margin_changes_nothing():
    assert choice_of(searched(FakeLaboratory(seconds={neighbour(DOWN): 399e-6})), DOWN).config == in_force(DOWN)
    assert choice_of(searched(FakeLaboratory(seconds={neighbour(DOWN): 396e-6})), DOWN).config == neighbour(DOWN)


def test_a_kernel_that_is_better_left_out_opens_other_questions():
    point = searched(FakeLaboratory(seconds={None: 10e-6, in_force(SUMS): 100e-6}))
    assert choice_of(point, GRAD).config is None
    assert choice_of(point, SUMS).config == in_force(SUMS)


def test_a_wrong_candidate_is_named_and_never_timed():
    wrong = neighbour(DOWN)
    laboratory, lines = FakeLaboratory(seconds={wrong: 1e-6}, wrong=(wrong,)), []
    point = searched(laboratory, report=lines.append)
    found = next(candidate for candidate in choice_of(point, DOWN).candidates if candidate.config == wrong)
    assert found.timing is None
    assert found.dropped == "Disagreement: gradient of lora_A has error 1.0e+00, eager 1.0e-03"
    assert choice_of(point, DOWN).config == in_force(DOWN)
    assert all(asked[DOWN] != wrong for _, asked in laboratory.log)
    assert any("dropped" in line and str(wrong) in line for line in lines)


def test_the_configuration_in_force_can_be_the_wrong_one():
    point = searched(FakeLaboratory(wrong=(in_force(DOWN),)))
    assert choice_of(point, DOWN).config not in (None, in_force(DOWN))
    assert point.compared


def test_a_kernel_that_is_wrong_in_every_form_is_not_compared():
    every = candidates("down_projection", "bfloat16", in_force(DOWN), SMALL, H200)
    point = searched(FakeLaboratory(wrong=every))
    assert point.complete
    assert not point.compared
    assert not point.wins
    assert "none of its configurations gave right results" in point.verdict


def test_what_another_problem_decided_is_in_force_and_not_tuned_again():
    laboratory = FakeLaboratory()
    point = searched(laboratory, fixed={DOWN: neighbour(DOWN)})
    assert [choice.question for choice in point.choices] == [GRAD]
    assert all(asked[DOWN] == neighbour(DOWN) for _, asked in laboratory.log)


def test_without_a_search_what_is_in_force_is_compared_and_a_later_search_goes_on():
    laboratory = FakeLaboratory(seconds={neighbour(DOWN): 300e-6})
    first = Search(laboratory, HERE, H200, NONE).run()
    assert first.choices == ()
    assert [timing.us for _, timing in first.compared] == [400.0, 800.0]
    assert first.wins
    assert first.searched(NONE)
    assert not first.searched(SMALL)
    second = searched(laboratory, known=first)
    assert choice_of(second, DOWN).config == neighbour(DOWN)
    assert second.searched(SMALL)
    assert not second.searched(FULL)
    with pytest.raises(Interrupted):
        searched(FakeLaboratory(fatal=(in_force(DOWN),)))


class Budget(Deadline):
    """Over after so many candidates."""

    def __init__(self, candidates: int) -> None:
        super().__init__()
        self.left = candidates

    def check(self) -> None:
        self.left -= 1
        super().check()

    @property
    def over(self) -> bool:
        return self.left < 0


def test_time_is_up_and_a_later_run_goes_on():
    best = candidates("grad_s_b", "bfloat16", in_force(GRAD), SMALL, H200)[2]
    script = {best: 100e-6}
    whole = searched(FakeLaboratory(seconds=script))
    number = sum(len(choice.candidates) for choice in whole.choices)
    first = searched(FakeLaboratory(seconds=script), deadline=Budget(number - 5))
    assert not first.complete
    assert first.compared, "what there is is compared, as it will be used"
    assert sum(len(choice.candidates) for choice in first.choices) == number - 5
    laboratory = FakeLaboratory(seconds=script)
    second = searched(laboratory, known=points.from_json(json.loads(json.dumps(points.to_json(first)))))
    assert second == whole
    assert len(laboratory.log) == 5 + 2, "only what was missing is measured, and the comparison"


def test_a_deadline_is_minutes():
    now = 100.0
    deadline = Deadline(2, lambda: now)
    now = 219.0
    deadline.check()
    now = 220.0
    with pytest.raises(search.OutOfTime):
        deadline.check()


def test_a_candidate_that_kills_the_gpu_is_not_tried_twice():
    killer = neighbour(DOWN)
    with pytest.raises(Interrupted, match="unusable after dropped") as interrupted:
        searched(FakeLaboratory(fatal=(killer,)))
    assert isinstance(interrupted.value.__cause__, DeviceLost)
    saved = points.from_json(json.loads(json.dumps(points.to_json(interrupted.value.point))))
    assert not saved.complete
    assert "illegal memory access" in choice_of(saved, DOWN).candidates[-1].dropped
    point = searched(FakeLaboratory(fatal=(killer,)), known=saved)
    assert point.complete
    assert choice_of(point, DOWN).config != killer


def test_times_of_unlike_stopwatches_are_not_compared():
    class Events(FakeLaboratory):
        def watch(self, mode, backend, answers):
            watch = super().watch(mode, backend, answers)
            if answers.get(DOWN) == neighbour(DOWN):
                watch.kind = "cuda-events"
            return watch

    found = choice_of(searched(Events(seconds={neighbour(DOWN): 1e-6})), DOWN)
    assert found.config == in_force(DOWN)
    assert "can only be timed by cuda-events" in found.candidates[1].dropped


def test_the_tail_stays_in_the_bucket():
    for m in (1, 2, 3, 16, 100, 4097, 8192):
        for r in (1, 16, 17, 32, 64):
            workload = Workload("lora_linear", Shape((m,), 64, 64, r))
            tail = workload.tail().shape
            assert points.bucket("m", tail.batch[0]) == points.bucket("m", m)
            assert points.bucket("r", tail.r) == points.bucket("r", r)
            assert (tail.n, tail.k) == (64, 64)
    assert Workload("lora_linear", Shape((8192,), 64, 64, 16)).tail().shape.batch == (7167,)


# The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path, monkeypatch) -> tune.Target:
    """The command believes to have an H200, and runs FakeLaboratory on it."""
    target = tune.Target("cuda", "sm_90", 0, H200, tmp_path / "sm_90.json")
    monkeypatch.setattr(tune, "find_target", lambda output: replace(target, output=output or target.output))
    monkeypatch.setattr(provenance, "here", lambda op, rival, index: HERE)
    monkeypatch.setattr(tune, "Laboratory", lambda workload, device, **_: FakeLaboratory(workload))
    monkeypatch.setattr(tuning, "forget", lambda: None)
    return target


def arguments(*more: str) -> list[str]:
    return ["tune", "--op", "lora_linear", "--shapes", "8192,4096,4096,16", "64,4096,4096,16", *more]


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(_launch, "unavailable", lambda *_: "torch sees no such GPU")
    assert main(arguments()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "peft-kernels tune: error: nothing to measure on: torch sees no such GPU\n"


def test_it_writes_what_it_measured_and_does_not_measure_it_again(target, capsys):
    assert main(arguments("--dropout", "0")) == 0
    out = capsys.readouterr().out
    assert "used from now on" in out
    assert f"written to {target.output}" in out
    content = json.loads(target.output.read_text())
    problems = [(raw["problem"]["m"], raw["problem"]["adapter_dtype"]) for raw in content["tuned"]]
    assert problems == [(8192, "bfloat16"), (8192, "float32"), (64, "bfloat16"), (64, "float32")]
    assert all(raw["complete"] and raw["provenance"]["gpu"] == "NVIDIA H200" for raw in content["tuned"])
    # The kernels are not asked for the adapters' dtype or N and K: decided by the first problem.
    assert [bool(raw["kernels"]) for raw in content["tuned"]] == [True, False, False, False]
    candidate = content["tuned"][0]["kernels"][0]["candidates"][0]
    assert candidate["us"] == 400.0
    assert candidate["rival_us"] == 1000.0
    assert {(entry["op"], *entry["m"]) for entry in content["measured"]} == {
        ("lora_linear", 33, 64),
        ("lora_linear", 4097, 8192),
    }
    files.parse(content, "sm_90.json")
    before = target.output.read_text()
    assert main(arguments("--dropout", "0")) == 0
    assert target.output.read_text() == before
    assert "lora_linear 8192" not in capsys.readouterr().out, "nothing to report: nothing was measured"


def test_a_wider_search_measures_again_only_what_is_new(target, capsys):
    assert main(arguments("--dropout", "0", "--adapter-dtype", "same", "--extent", "none")) == 0
    assert all(not raw["kernels"] for raw in json.loads(target.output.read_text())["tuned"])
    assert main(arguments("--dropout", "0", "--adapter-dtype", "same")) == 0
    content = json.loads(target.output.read_text())
    assert len(content["tuned"]) == 2
    assert {raw["extent"] for raw in content["tuned"]} == {"small"}
    assert "left" not in capsys.readouterr().out


def test_a_result_is_on_disk_before_the_next_begins(target, monkeypatch):
    started = []

    def laboratory(workload, device):
        started.append(json.loads(target.output.read_text())["tuned"] if target.output.exists() else [])
        return FakeLaboratory(workload)

    monkeypatch.setattr(tune, "Laboratory", laboratory)
    assert main(arguments("--dropout", "0", "--adapter-dtype", "same")) == 0
    assert [len(found) for found in started] == [0, 1]


def test_dry_run_measures_nothing(target, capsys):
    assert main(arguments("--dry-run", "--dropout", "0")) == 0
    out = capsys.readouterr().out
    assert out.count("to do") == 4
    assert "down_projection" in out
    assert not target.output.exists()


def test_time_is_up(target, capsys):
    assert main(arguments("--minutes", "1e-9")) == 0
    assert "8 problems are left, run it again to go on" in capsys.readouterr().out


def test_a_lost_gpu_is_an_error_that_keeps_what_was_measured(target, monkeypatch, capsys):
    killer = neighbour(DOWN)
    monkeypatch.setattr(tune, "Laboratory", lambda workload, device: FakeLaboratory(workload, fatal=(killer,)))
    assert main(arguments()) == 1
    assert "what was measured is saved, run it again" in capsys.readouterr().err
    assert not json.loads(target.output.read_text())["tuned"][0]["complete"]
    assert main(arguments()) == 0
    dropped = json.loads(target.output.read_text())["tuned"][0]["kernels"][0]["candidates"][1]["dropped"]
    assert "illegal memory access" in dropped


def test_a_file_that_cannot_be_written_is_an_error(target, monkeypatch, capsys):
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main(arguments()) == 1
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", '{"arch": "sm_80", "measured": [], "configs_of": "sm_80"}', "[]"])
def test_an_output_that_is_no_tuning_file_is_refused_and_left_alone(target, tmp_path, capsys, content):
    other = tmp_path / "other.json"
    other.write_text(content)
    assert main(arguments("--output", str(other))) == 2
    assert "other.json" in capsys.readouterr().err
    assert other.read_text() == content


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5", "a,b,c,d", "0,1,1,1", "1,1,1,513", "1.5,1,1,1"])
def test_wrong_shapes_are_refused(text, capsys):
    with pytest.raises(SystemExit) as exit:
        build_parser().parse_args(["tune", "--shapes", text])
    assert exit.value.code == 2
    assert text in capsys.readouterr().err


def test_presets():
    options = build_parser().parse_args(["tune"])
    work = list(tune.workloads(options))
    assert work[0] == WORKLOAD, "the most important first: time may be up after any"
    assert len(set(work)) == len(work)
    assert not any(w.op == "philox_dropout" and not w.shape.dropout_p for w in work), "nothing would run"
    assert {workload.op for workload in work} == set(tune.tunable())
    full = list(tune.workloads(build_parser().parse_args(["tune", "--preset", "full"])))
    assert set(work) < set(full)
    assert {workload.shape.batch[0] for workload in full} >= {1, 16, 16384}


def test_every_tunable_op_has_a_problem():
    for op in tune.tunable():
        workload = Workload(op, Shape((64,), 96, 64, 8, BF16, BF16, 0.05))
        assert workload.problem().items() == points.fields_of(workload.case("cpu").problem).items()
        assert workload.rival in ("composed", "reference")


INTERPRETED = """
import sys
from pathlib import Path
import torch
from peft_kernels import dispatch
from peft_kernels.cli import tune
from peft_kernels.problems import Shape
from peft_kernels.tuning import candidates, configs, trials
from peft_kernels.tuning.search import Deadline, Workload
from peft_kernels.tuning.store import Store
from tests.triton.interpreter import speed_up

speed_up()

class Watch:
    kind = "scripted"

    def __init__(self, device, steps, context):
        with context():
            steps[0]()
            blocks = [config.block_m for config in trials.active.asked.values() if hasattr(config, "block_m")]
        self.seconds = 1e-6 * (sum(blocks) or 1000)

    def sample(self):
        return self.seconds

triton = dispatch.implementation("lora_linear", "triton")
forward = triton.forward

def wrong_with_blocks_of_16(*arguments):
    y, s = forward(*arguments)
    wrong = any(isinstance(c, configs.DownProjection) and c.block_m == 16 for c in trials.active.asked.values())
    return y * (1.01 if wrong else 1.0), s

triton.forward = wrong_with_blocks_of_16
candidates.SPACES.clear()
candidates._of_rules = lambda *_: iter(())
candidates.SPACES["sum_over_rows"] = candidates.Space((("block_m", (32, 64)), ("num_warps", (4,))))
candidates.SPACES["down_projection"] = candidates.Space((("block_m", (16, 32, 64)), ("num_warps", (4,))))
target = tune.Target("cpu", "sm_80", None, candidates.Machine("sm_80", 3, 99 << 10), Path(sys.argv[1]))
shape = Shape((40,), 48, 64, 5, torch.float16, torch.float32, 0.25)
tune.tune([Workload("lora_linear", shape)], Store(target.output, "sm_80"), target, "full", Deadline(), print,
          stopwatch=Watch)
"""


@pytest.mark.slow
def test_a_search_in_the_interpreter(tmp_path):
    """The kernels themselves are asked, run, compared with float64 and recorded. One configuration was made wrong."""
    pytest.importorskip("triton", reason="triton is not installed")
    output = tmp_path / "sm_80.json"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", files.FOLDER_VARIABLE: str(tmp_path)}
    command, root = [sys.executable, "-c", INTERPRETED, str(output)], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (raw,) = json.loads(output.read_text())["tuned"]
    assert raw["problem"] == {
        "dtype": "float16", "adapter_dtype": "float32", "m": 64, "n": 48, "k": 64, "r": 5, "dropout": True,
    } | {name: value for name, value in raw["problem"].items() if value is False}  # fmt: skip
    kernels = {entry["kernel"]: entry for entry in raw["kernels"]}
    down = kernels["down_projection"]
    assert (down["mode"], down["dropout"]) == (FORWARD, True)
    outcomes = {entry["config"]["block_m"]: entry.get("dropped") for entry in down["candidates"]}
    assert outcomes.keys() == {16, 32, 64}
    assert outcomes[16].startswith("Disagreement: y has error")
    assert outcomes[32] is outcomes[64] is None
    assert down["config"]["block_m"] == 32
    assert any(entry["mode"] == FORWARD_BACKWARD for entry in raw["kernels"])
    assert raw["complete"]
    assert [entry["mode"] for entry in raw["compared"]] == [FORWARD, FORWARD_BACKWARD]
