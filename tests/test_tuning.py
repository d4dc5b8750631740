"""The tuning files: what they contain, how a configuration is looked up, how a wrong file is refused, and when a
measurement counts."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging

import pytest
import torch

from peft_kernels import dispatch, tuning
from peft_kernels.ops.lora_linear import Problem
from peft_kernels.tuning import candidates, files, points, provenance, trials
from peft_kernels.tuning.candidates import Machine
from peft_kernels.tuning.configs import CONFIGS
from peft_kernels.tuning.points import FORWARD, FORWARD_BACKWARD, FULL, NONE, SMALL, Candidate, Choice, Point, Timing
from peft_kernels.tuning.provenance import Provenance
from peft_kernels.tuning.store import Store, layout
from peft_kernels.tuning.trials import Question

BF16, F32 = torch.bfloat16, torch.float32
HERE = Provenance("NVIDIA H200", "570.1", "2.13.0", "3.7.1", "0123456789abcdef")
H200 = Machine("sm_90", 132, 227 << 10)
PROBLEM = Problem("cuda", 0, BF16, F32, 8192, 4096, 4096, 16, True)
# Kernels beside another that serves every problem: no rule may hold.
OPTIONAL = (
    "grad_s_b", "extended_gemm_tma", "extended_gemm_persistent", "single_pass", "product_tma", "group_grad_s_b",
    "extended_gemm_specialized", "expert_gemm_tma", "masked_gemm_tma", "masked_grad_x_tma",
)  # fmt: skip


@pytest.fixture
def sm_90() -> dict:
    return json.loads((files.FOLDER / "sm_90.json").read_text())


def _parse(content: dict) -> files.Architecture:
    return files.parse(content, "sm_90.json")


def test_every_file_loads_and_claims_no_measurement_that_it_cannot_show():
    for arch in tuning.known_architectures():
        loaded = files.load(arch)
        assert set(loaded.rules) == set(CONFIGS)
        content = files.content_of(files.FOLDER / f"{arch}.json")
        shown = [points.from_json(raw, choices=False) for raw in content.get("tuned", ())]
        assert content["measured"] == points.measured_ranges(shown)


@pytest.mark.parametrize("arch", tuning.known_architectures())
@pytest.mark.parametrize("kernel", [k for k in CONFIGS if k not in OPTIONAL])
def test_every_size_has_a_configuration(arch, kernel):
    for dtype in (BF16, torch.float16, F32):
        for m in (1, 64, 65, 10**6):
            for r in (1, 16, 33, 512):
                for dropout in (False, True):
                    assert tuning.config(arch, kernel, dtype, dropout=dropout, m=m, n=4096, r=r, block=64) is not None


def test_configurations_are_frozen():
    config = tuning.config("sm_90", "down_projection", BF16, m=1, r=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_m = 1


@pytest.mark.parametrize(
    ("arch", "file"),
    [
        ("sm_75", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_89", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
    ],
)
def test_an_unknown_architecture_takes_the_nearest_older_one(arch, file):
    assert tuning.nearest(arch) == file
    assert tuning.rules(arch, "extended_gemm") == tuning.rules(file, "extended_gemm")


def test_the_first_rule_that_holds_is_taken(sm_90):
    rule = {"block": 512, "unroll": 8, "num_warps": 4}
    sm_90["kernels"]["splitk_reduce"] = [{**rule, "dtype": "float32", "max_m": 8, "dropout": True, "block": 128}, rule]
    first, second = _parse(sm_90).rules["splitk_reduce"]
    assert first.holds("float32", True, {"m": 8})
    assert not first.holds("float32", True, {"m": 9})
    assert not first.holds("float32", False, {"m": 8})
    assert not first.holds("bfloat16", True, {"m": 8})
    assert second.holds("bfloat16", False, {"m": 9})


def _win(**bounds) -> dict:
    return {"op": "lora_linear", "speedup": 1.2, "rival": "composed", "provenance": HERE.as_dict(), **bounds}


@pytest.mark.parametrize(
    ("bounds", "covered"),
    [
        ({}, True),
        ({"dtype": "bfloat16", "m": [1024, 16384], "r": 16, "dropout": True}, True),
        ({"dtype": "float16"}, False),
        ({"m": [1024, 4096]}, False),
        ({"r": 8}, False),
        ({"dropout": False}, False),
    ],
)
def test_a_measurement_covers_its_bounds_only(sm_90, bounds, covered, monkeypatch):
    sm_90["measured"] = [_win(**bounds)]
    architecture = _parse(sm_90)
    monkeypatch.setattr(tuning, "load", lambda arch: architecture)
    monkeypatch.setattr(provenance, "here", lambda op, rival, index: HERE)
    reason = tuning.measured_win("sm_90", "lora_linear", PROBLEM)
    assert (reason is not None) == covered
    assert reason is None or "1.20x" in reason
    assert tuning.measured_win("sm_90", "other_op", PROBLEM) is None
    assert tuning.measured_win("sm_91", "lora_linear", PROBLEM) is None, "measured on another GPU"


def _change(path: tuple, value):
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        if value is None:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


FIRST = ("kernels", "down_projection", 0)
WRONG = {
    "arch is 'sm_80'": _change(("arch",), "sm_80"),
    r"missing \['measured'\]": _change(("measured",), None),
    r"unknown \['extra'\]": _change(("extra",), 1),
    "configs_of is 'sm_70', an architecture without a file": _change(("configs_of",), "sm_70"),
    r"kernels: missing \['grad_s_b'\]": _change(("kernels", "grad_s_b"), None),
    r"down_projection\[0\]: missing \['block_m'\]": _change((*FIRST, "block_m"), None),
    r"down_projection\[0\]: .*unknown \['block_q'\]": _change((*FIRST, "block_q"), 4),
    "block_m is 48; expected a power of two": _change((*FIRST, "block_m"), 48),
    "num_stages is 0; expected a positive integer": _change((*FIRST, "num_stages"), 0),
    "max_r is '8'; expected a positive integer": _change((*FIRST, "max_r"), "8"),
    "dtype is 'fp32'; expected": _change((*FIRST, "dtype"), "fp32"),
    "dropout is 1; expected": _change((*FIRST, "dropout"), 1),
    "expected an object, got int": _change(("measured",), [3]),
    r"measured\[0\]: missing \['provenance', 'rival'\]": _change(("measured",), [{"op": "lora_linear", "speedup": 2}]),
    r"measured\[0\]: provenance: missing \['digest'": _change(("measured",), [{**_win(), "provenance": {}}]),
    r"tuned\[0\]: missing \['compared'": _change(("tuned",), [{"op": "lora_linear"}]),
    "speedup is 0.9; expected a number above 1": _change(("measured",), [{**_win(), "speedup": 0.9}]),
    r"m is \[9, 1\]; expected a value or": _change(("measured",), [_win(m=[9, 1])]),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_file_is_refused_with_its_name_and_place(sm_90, message):
    content = copy.deepcopy(sm_90)
    WRONG[message](content)
    with pytest.raises(tuning.TuningError, match=rf"^sm_90\.json.*{message}"):
        _parse(content)


def test_a_file_that_is_no_json(tmp_path, monkeypatch):
    (tmp_path / "sm_90.json").write_text("{")
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    with pytest.raises(tuning.TuningError, match=r"sm_90\.json: not JSON"):
        files.load.__wrapped__("sm_90")


def test_a_file_takes_what_it_lacks_from_another_architecture(sm_90):
    own = sm_90["kernels"].pop("grad_s_b")
    sm_90["configs_of"] = "sm_80"
    assert _parse(sm_90).rules["grad_s_b"] == files.load("sm_80").rules["grad_s_b"]
    sm_90["kernels"]["grad_s_b"] = own
    assert _parse(sm_90).rules == files.load("sm_90").rules


# What `peft-kernels tune` writes ----------------------------------------------------------------------------------

FIELDS = tuple(points.fields_of(PROBLEM).items())
WON, LOST = Timing(90.0, 100.0, 0.9, 0.89, 0.91), Timing(100.0, 100.0, 1.0, 0.98, 1.01)
QUESTION = Question.of("down_projection", "bfloat16", True, {"m": 8192, "r": 16})
WINNER = CONFIGS["down_projection"](
    **{**dataclasses.asdict(tuning.config("sm_90", "down_projection", BF16, m=8192, r=16)), "block_m": 32}
)


def point(both: Timing = WON, made: Provenance = HERE, complete: bool = True, **fields) -> Point:
    choice = Choice(QUESTION, FORWARD, WINNER, (Candidate(WINNER, WON), Candidate(None, None, "does not compile")))
    compared = ((FORWARD, WON), (FORWARD_BACKWARD, both))
    problem = tuple((dict(FIELDS) | fields).items())
    return Point("lora_linear", problem, "composed", made, complete, compared, (choice,))


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """Writes points into the user's file, as the command does, on a machine that measured them as HERE."""
    monkeypatch.setenv(files.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(provenance, "here", lambda op, rival, index: HERE)
    monkeypatch.setattr(tuning.provenance.here, "cache_clear", lambda: None, raising=False)

    def write(*found: Point, arch: str = "sm_90"):
        store = Store(tmp_path / f"{arch}.json", arch)
        for one in found:
            store.save(one)
        tuning.forget()
        dispatch.forget()
        return store.path

    tuning.forget()
    yield write
    monkeypatch.undo()
    tuning.forget()
    dispatch.forget()


def test_a_point_survives_its_file(user_file):
    path = user_file(point(), point(LOST, m=64))
    store = Store(path, "sm_90")
    assert store.find("lora_linear", dict(FIELDS), "composed", HERE) == point()
    assert store.find("lora_linear", dict(FIELDS) | {"m": 1}, "composed", HERE) is None
    assert store.answers("lora_linear", "composed", HERE) == {QUESTION: WINNER}
    assert [path.name for path in path.parent.iterdir()] == ["sm_90.json"], "no temporary file stays"
    user_file(point(LOST))
    again = Store(path, "sm_90")
    assert len(again.content["tuned"]) == 2, "measured again: replaced"
    assert again.find("lora_linear", dict(FIELDS), "composed", HERE) == point(LOST)


def test_a_write_that_fails_leaves_the_file_as_it_was(user_file, monkeypatch):
    path = user_file(point())
    before = path.read_text()
    store = Store(path, "sm_90")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        store.save(point(LOST))
    assert path.read_text() == before
    assert [path.name for path in path.parent.iterdir()] == ["sm_90.json"]


def test_the_library_s_own_file_keeps_its_rules(tmp_path):
    path = tmp_path / "sm_90.json"
    path.write_text((files.FOLDER / "sm_90.json").read_text())
    Store(path, "sm_90").save(point())
    written = files.read(path)
    assert written.rules == files.load("sm_90").rules
    assert [win.op for win in written.measured] == ["lora_linear"]
    assert "\n" in layout(json.loads(path.read_text()))
    with pytest.raises(tuning.TuningError, match="arch is 'sm_90'"):
        Store(path, "sm_80")


def test_winners_are_honoured_in_their_bucket_only(user_file):
    def asked(**sizes):
        return tuning.config("sm_90", "down_projection", BF16, dropout=True, **sizes)

    shipped = asked(m=8192, r=16)
    user_file(point())
    assert shipped != WINNER
    assert asked(m=8192, r=16) == asked(m=4097, r=1) == WINNER
    assert asked(m=4096, r=16) == asked(m=8193, r=16) == shipped
    assert tuning.config("sm_90", "down_projection", BF16, dropout=False, m=8192, r=16) != WINNER
    assert tuning.config("sm_80", "down_projection", BF16, dropout=True, m=8192, r=16) != WINNER


def test_dispatch_takes_what_was_measured_to_win(user_file):
    assert "peft-kernels tune makes one" in tuning.unproven("sm_90", "lora_linear", PROBLEM)
    user_file(point())
    assert tuning.measured_win("sm_90", "lora_linear", PROBLEM) == "measured 1.11x of composed on NVIDIA H200"
    assert tuning.unproven("sm_90", "lora_linear", PROBLEM) is None
    elsewhere = PROBLEM._replace(m=2 * PROBLEM.m)
    assert "no measurement on sm_90" in tuning.unproven("sm_90", "lora_linear", elsewhere)


def test_what_was_not_measured_to_win_is_said(user_file):
    user_file(point(LOST))
    assert tuning.measured_win("sm_90", "lora_linear", PROBLEM) is None
    reason = tuning.unproven("sm_90", "lora_linear", PROBLEM)
    assert reason.startswith("not measured faster than composed at this shape")
    assert "forward+backward in 1.000 of its time" in reason
    user_file(dataclasses.replace(point(), compared=(), complete=False))
    assert "was not finished" in tuning.unproven("sm_90", "lora_linear", PROBLEM)


STALE = {
    "the kernels have changed since": {"digest": "another"},
    "it was made with torch 2.12.1, this is 2.13.0": {"torch": "2.12.1"},
    "it was made with triton 3.6.0, this is 3.7.1": {"triton": "3.6.0"},
    "it was made on NVIDIA H100, this is NVIDIA H200": {"gpu": "NVIDIA H100"},
}


@pytest.mark.parametrize("reason", STALE)
def test_a_stale_measurement_does_not_count_and_says_why(user_file, reason):
    path = user_file(point(made=dataclasses.replace(HERE, **STALE[reason])))
    assert tuning.measured_win("sm_90", "lora_linear", PROBLEM) is None
    assert reason in tuning.unproven("sm_90", "lora_linear", PROBLEM)
    assert Store(path, "sm_90").find("lora_linear", dict(FIELDS), "composed", HERE) is None, "to be measured again"
    winner = tuning.config("sm_90", "down_projection", BF16, dropout=True, m=8192, r=16)
    assert (winner == WINNER) == ("H100" in reason), "another model's winner is a configuration like any"


def test_a_new_driver_or_patch_release_makes_nothing_stale():
    made = dataclasses.replace(HERE, driver="580.2", torch="2.13.1+cu130", triton="3.7.0")
    assert made.stale(HERE) is None


def test_a_stale_point_of_a_changed_configuration_is_never_read(user_file):
    path = user_file(point(made=dataclasses.replace(HERE, digest="another")))
    path.write_text(path.read_text().replace('"block_m"', '"block_gone"'))
    tuning.forget()
    assert tuning.config("sm_90", "down_projection", BF16, dropout=True, m=8192, r=16) != WINNER
    assert "kernels have changed" in tuning.unproven("sm_90", "lora_linear", PROBLEM)
    Store(path, "sm_90").save(point())


def test_a_broken_user_file_is_reported_and_passed_over(user_file, caplog):
    path = user_file(point())
    path.write_text("{")
    tuning.forget()
    with caplog.at_level(logging.WARNING, "peft_kernels"):
        assert tuning.config("sm_90", "down_projection", BF16, m=8192, r=16) is not None
        assert tuning.measured_win("sm_90", "lora_linear", PROBLEM) is None
    assert "sm_90.json is passed over: sm_90.json: not JSON" in caplog.text


def test_an_architecture_without_a_file_can_have_measurements(user_file):
    user_file(point(), arch="sm_89")
    assert tuning.measured_win("sm_89", "lora_linear", PROBLEM) is not None
    assert tuning.rules("sm_89", "down_projection") == tuning.rules("sm_80", "down_projection")


def test_ranges_join_neighbouring_buckets_that_win():
    found = [point(m=m, r=r) for r in (16, 32) for m in (8192, 2048, 4096)]
    found += [point(m=512), point(LOST, m=1024), point(m=16384, adapter_dtype="bfloat16")]
    found[0] = point(dataclasses.replace(WON, ratio=0.8), m=8192, r=16)
    ranges = [
        (entry["m"], entry["r"], entry["adapter_dtype"], entry["speedup"]) for entry in points.measured_ranges(found)
    ]
    assert sorted(ranges) == [
        ([257, 512], [1, 16], "float32", 1.111),
        ([1025, 8192], [1, 32], "float32", 1.111),
        ([8193, 16384], [1, 16], "bfloat16", 1.111),
    ]


def test_a_win_shows_in_every_mode_and_three_quarters_of_the_pairs():
    assert point().wins
    assert not point(Timing(99.0, 100.0, 0.99, 0.98, 1.001)).wins
    assert not dataclasses.replace(point(), compared=((FORWARD, LOST), (FORWARD_BACKWARD, WON))).wins


def test_problems_of_groups_can_be_recorded():
    from peft_kernels.ops.lora_linear_group import Problem as GroupProblem

    problem = GroupProblem("cuda", 0, BF16, BF16, 64, (96, 24, 24), 32, (8, 8, 8), (0, 1, 2), False, False)
    fields = points.fields_of(problem)
    assert fields["ns"] == "96,24,24"
    assert points.covers(fields, points.fields_of(problem._replace(m=33)))
    assert not points.covers(fields, points.fields_of(problem._replace(ns=(96, 24, 48))))


@pytest.mark.parametrize(("name", "size", "expected"), [
    ("m", 1, (1, 1)), ("m", 2, (2, 2)), ("m", 5, (5, 8)), ("m", 8, (5, 8)), ("m", 8192, (4097, 8192)), ("m", 0, (0, 0)),
    ("r", 1, (1, 16)), ("r", 16, (1, 16)), ("r", 17, (17, 32)), ("r", 64, (33, 64)), ("n", 100, (100, 100)),
])  # fmt: skip
def test_buckets(name, size, expected):
    assert trials.bucket(name, size) == expected


def test_trials_answer_by_bucket_and_hear_everything():
    question = Question.of("down_projection", "bfloat16", False, {"m": 8192, "r": 16})
    with trials.trial({question: None}) as trial:
        assert tuning.config("sm_90", "down_projection", BF16, m=5000, r=3) is None
        other = tuning.config("sm_90", "down_projection", BF16, m=64, r=3)
    assert other is not None
    assert trial.asked == {question: None, Question.of("down_projection", "bfloat16", False, {"m": 64, "r": 16}): other}
    assert tuning.config("sm_90", "down_projection", BF16, m=5000, r=3) is not None, "the trial is over"


@pytest.mark.parametrize("kernel", CONFIGS)
@pytest.mark.parametrize("extent", [SMALL, FULL])
def test_candidates(kernel, extent):
    in_force = tuning.config("sm_90", kernel, BF16, m=8192, n=4096, k=4096, r=16, block=64)
    found = candidates.candidates(kernel, "bfloat16", in_force, extent, H200)
    assert found[0] == in_force
    assert len(set(found)) == len(found)
    assert found == candidates.candidates(kernel, "bfloat16", in_force, extent, H200)
    rules = [rule.config for rule in tuning.rules("sm_90", kernel) if rule.dtype in (None, "bfloat16")]
    space = candidates.SPACES.get(kernel)
    assert all(
        config in found for config in rules if space is None or candidates._fits(config, space, "bfloat16", H200)
    )
    for config in filter(None, found):
        assert type(config) is CONFIGS[kernel]
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name.startswith(("block", "num_warps")):
                assert value & (value - 1) == 0
    if space is not None:
        assert (None in found) == (space.optional or in_force is None)
        assert len(found) > 2


def test_spaces_name_fields_that_exist():
    for kernel, space in candidates.SPACES.items():
        names = {field.name for field in dataclasses.fields(CONFIGS[kernel])}
        staged = {name for tile in space.staged for name in tile}
        accumulated = set(space.accumulated or ())
        assert {name for name, _ in space.fields} | staged | accumulated | set(space.per_multiprocessor) <= names


def test_candidates_fit_the_machine():
    space = candidates.SPACES["extended_gemm"]
    in_force = tuning.config("sm_80", "extended_gemm", BF16, m=8192, n=4096, r=16)
    small = Machine("sm_80", 108, 48 << 10)
    for config in candidates.candidates("extended_gemm", "bfloat16", in_force, FULL, small)[1:]:
        assert 2 * config.num_stages * config.block_k * (config.block_m + config.block_n) <= 48 << 10
        assert config.block_m * config.block_n <= 128 * 32 * config.num_warps
    assert space.optional is False
    assert candidates.candidates("extended_gemm", "bfloat16", in_force, NONE, small) == (in_force,)
    only = candidates.candidates("extended_gemm_tma", "bfloat16", None, SMALL, small)
    assert only == (None,), "no rule of this or an older architecture: nothing to try"


def test_digest_of_the_sources():
    ours = provenance.sources("lora_linear", ("triton", "composed"))
    names = {path.relative_to(provenance.PACKAGE).as_posix() for path in ours}
    assert {"ops/lora_linear.py", "kernels/triton/_extended_gemm.py", "kernels/composed/lora_linear.py"} <= names
    assert not any(name.endswith(".json") for name in names), "what tune writes must not make its own result stale"
    assert provenance.here("lora_linear", "composed", None).gpu == "cpu"
