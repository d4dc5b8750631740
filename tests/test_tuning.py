"""The tuning files: what they contain, how a configuration is looked up, and how a wrong file is refused."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from peft_kernels import tuning
from peft_kernels.ops.lora_linear import Problem
from peft_kernels.tuning import files
from peft_kernels.tuning.configs import CONFIGS

BF16, F32 = torch.bfloat16, torch.float32
PROBLEM = Problem("cuda", 0, BF16, F32, 8192, 4096, 4096, 16, True)
# Kernels beside another that serves every problem: no rule may hold.
OPTIONAL = ("grad_s_b", "extended_gemm_tma", "extended_gemm_persistent")


@pytest.fixture
def sm_90() -> dict:
    return json.loads((files.FOLDER / "sm_90.json").read_text())


def _parse(content: dict) -> files.Architecture:
    return files.parse(content, "sm_90.json")


def test_every_file_loads_and_claims_no_measurement_that_it_cannot_show():
    for arch in tuning.known_architectures():
        loaded = files.load(arch)
        assert set(loaded.rules) == set(CONFIGS)
        for win in loaded.measured:
            assert (files.FOLDER.parent.parent / win.result).exists()


@pytest.mark.parametrize("arch", tuning.known_architectures())
@pytest.mark.parametrize("kernel", [k for k in CONFIGS if k not in OPTIONAL])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
def test_every_size_has_a_configuration(arch, kernel, dtype):
    for m in (1, 64, 65, 10**6):
        for r in (1, 16, 33, 512):
            for dropout in (False, True):
                assert tuning.config(arch, kernel, dtype, dropout=dropout, m=m, n=4096, r=r) is not None


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
    return {"op": "lora_linear", "speedup": 1.2, "result": "benchmarks/results/x.json", **bounds}


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
    "expected either 'kernels' or 'configs_of'": _change(("configs_of",), "sm_80"),
    r"kernels: missing \['grad_s_b'\]": _change(("kernels", "grad_s_b"), None),
    r"down_projection\[0\]: missing \['block_m'\]": _change((*FIRST, "block_m"), None),
    r"down_projection\[0\]: .*unknown \['block_q'\]": _change((*FIRST, "block_q"), 4),
    "block_m is 48; expected a power of two": _change((*FIRST, "block_m"), 48),
    "num_stages is 0; expected a positive integer": _change((*FIRST, "num_stages"), 0),
    "max_r is '8'; expected a positive integer": _change((*FIRST, "max_r"), "8"),
    "dtype is 'fp32'; expected": _change((*FIRST, "dtype"), "fp32"),
    "dropout is 1; expected": _change((*FIRST, "dropout"), 1),
    "expected an object, got int": _change(("measured",), [3]),
    r"measured\[0\]: missing \['result'\]": _change(("measured",), [{"op": "lora_linear", "speedup": 2}]),
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
