"""`peft-kernels doctor` and the self-check behind it: right kernels pass, wrong ones are found."""

from __future__ import annotations

import json

import pytest
import torch

from peft_kernels import dispatch, selfcheck
from peft_kernels.cli.main import main
from peft_kernels.kernels.composed import lora_linear as composed
from peft_kernels.kernels.reference import nf4_dequantize, nf4_quantize, philox_dropout, splitk_reduce


def test_every_op_has_cases_and_every_implementation_an_outcome(tmp_path, capsys):
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(file)]) == 0
    findings = json.loads(file.read_text())
    assert findings["ok"] is True
    assert findings["environment"]["torch"].startswith(torch.__version__)
    rows = {(row["op"], row["backend"]): row for row in findings["implementations"] if row["device"] == "cpu"}
    assert rows.keys() == {(op, backend) for op, order in dispatch.ORDER.items() for backend in order}
    for op in dispatch.ORDER:
        reference = rows[op, "reference"]
        assert reference["checked"] == len(list(selfcheck.cases(op, "cpu"))) > 0
        assert 0 < reference["ratio"] <= selfcheck.RATIO or reference["ratio"] == 0
    assert all(row["checked"] or row["unavailable"] for row in rows.values())
    assert "all agree" in capsys.readouterr().out


def _check(op: str, backend: str) -> selfcheck.Outcome:
    return selfcheck.check_implementation(op, backend, list(selfcheck.cases(op, "cpu")))


def _after(function, change):
    return lambda *arguments: change(function(*arguments))


def _noisy(results):
    return tuple(result + 1e-3 * torch.rand_like(result) for result in results)


BROKEN = {
    "output": ("forward", lambda results: (results[0] * 1.001, results[1]), "y has error"),
    "nan": ("forward", lambda results: (results[0] * float("nan"), results[1]), "y"),
    "random": ("forward", _noisy, "y differs between two runs"),
    "shape": ("forward", lambda results: (results[0][:, :-1], results[1]), "RuntimeError"),
    "grad x": ("backward", lambda grads: (grads[0] * 1.01, *grads[1:]), "gradient of x"),
    "grad A": ("backward", lambda grads: (*grads[:3], grads[3] * 1.01, grads[4]), "gradient of lora_A"),
    "grad B": ("backward", lambda grads: (*grads[:4], -grads[4]), "gradient of lora_B"),
    "crash": ("backward", lambda grads: 1 // 0, "ZeroDivisionError"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_lora_linear_is_found(fault, monkeypatch):
    name, change, message = BROKEN[fault]
    monkeypatch.setattr(composed, name, _after(getattr(composed, name), change))
    outcome = _check("lora_linear", "composed")
    assert outcome.failure is not None
    assert message in outcome.failure


def test_another_dropout_mask_is_found(monkeypatch):
    monkeypatch.setattr(philox_dropout, "forward", lambda x, p, seed, offset=0: torch.nn.functional.dropout(x, p))
    assert "y differs between two runs" in _check("philox_dropout", "reference").failure
    monkeypatch.setattr(philox_dropout, "forward", lambda x, p, seed, offset=0: x.clone())
    assert "y has error" in _check("philox_dropout", "reference").failure


def test_a_reduction_that_loses_a_part_is_found(monkeypatch):
    reduce = splitk_reduce.forward
    monkeypatch.setattr(
        splitk_reduce,
        "forward",
        lambda partials, *rest: reduce(partials[:-1] if len(partials) > 1 else partials, *rest),
    )
    assert "y has error" in _check("splitk_reduce", "reference").failure


def _swapped(q, numbers):
    """Each pair of weights in the wrong order."""
    return _ELEMENTS(q, numbers ^ 1 if q.packed.numel() * 2 > int(numbers.max()) + 1 else numbers)


def _of_the_row(q, numbers):
    """As if each row began a block."""
    k = q.layout[1]
    per_row = -(-k // q.blocksize)
    blocks = numbers // k * per_row + numbers % k // q.blocksize
    return (
        _ELEMENTS(q, numbers)
        / nf4_dequantize.absmax(q, numbers // q.blocksize)
        * nf4_dequantize.absmax(q, blocks.clamp(max=q.absmax.numel() - 1))
    )


_ELEMENTS = nf4_dequantize.elements


@pytest.mark.parametrize("wrong", [_swapped, _of_the_row])
@pytest.mark.parametrize("op", ["nf4_dequantize", "nf4_linear", "nf4_lora_linear"])
def test_wrong_weights_of_4_bits_are_found(op, wrong, monkeypatch):
    monkeypatch.setattr(nf4_dequantize, "elements", wrong)
    assert "y has error" in _check(op, "reference").failure


def test_one_wrong_index_in_a_quantised_weight_is_found(monkeypatch):
    quantize = nf4_quantize.forward

    def off_by_one(weight, blocksize):
        packed, absmax = quantize(weight, blocksize)
        packed[7] ^= 1
        return packed, absmax

    monkeypatch.setattr(nf4_quantize, "forward", off_by_one)
    assert "y has error" in _check("nf4_quantize", "reference").failure


def test_doctor_fails_when_an_implementation_is_wrong(tmp_path, monkeypatch, capsys):
    forward = composed.forward
    monkeypatch.setattr(composed, "forward", lambda *arguments: (forward(*arguments)[0] * 1.01, forward(*arguments)[1]))
    check = selfcheck.check  # of all ops: above
    monkeypatch.setattr(selfcheck, "check", lambda: check(["splitk_reduce", "lora_linear"]))
    file = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(file)]) == 1
    shown = capsys.readouterr().out
    assert "WRONG" in shown
    assert "FAILED" in shown
    assert json.loads(file.read_text())["ok"] is False


def test_a_json_file_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "check", lambda: [selfcheck.Outcome("lora_linear", "triton", "cpu", failure="no")])
    assert main(["doctor", "--json", str(tmp_path / "missing" / "file.json")]) == 2
    assert "cannot write" in capsys.readouterr().err
