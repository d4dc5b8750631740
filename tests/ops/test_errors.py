"""Bad input: the right exception before anything is computed, naming the argument, what it is and what it should be."""

from __future__ import annotations

import fractions
import math

import pytest
import torch

from peft_kernels import FusedLoRALinear, functional
from tests.helpers import LoraProblem

NAN, INF = math.nan, math.inf


def good() -> dict:
    """x [2, 3, 16], weight [12, 16], lora_A [4, 16], lora_B [12, 4], bias [12], with dropout."""
    return {
        "x": torch.ones(2, 3, 16), "weight": torch.ones(12, 16), "lora_A": torch.ones(4, 16),
        "lora_B": torch.ones(12, 4), "bias": torch.ones(12), "scaling": 2.0, "dropout_p": 0.5, "seed": 3,
    }  # fmt: skip


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


# (what is changed, exception, message after "lora_linear: ")
LORA_LINEAR = [
    # shapes
    ({"x": zeros(())}, ValueError, "x has no dimensions; expected (..., in_features)"),
    ({"x": zeros(2, 15)}, ValueError, "weight has shape (12, 16), but x has 15 features; expected (out_features, 15)"),
    ({"weight": zeros(16, 12)}, ValueError, "weight has shape (16, 12), but x has 16 features; expected (out_features"),
    ({"weight": zeros(16)}, ValueError, "weight has shape (16,), but x has 16 features; expected (out_features, 16)"),
    ({"weight": zeros(1, 12, 16)}, ValueError, "weight has shape (1, 12, 16), but"),
    ({"lora_A": zeros(16, 4)}, ValueError, "lora_A has shape (16, 4), but x has 16 features; expected (r, 16)"),
    ({"lora_A": zeros(16)}, ValueError, "lora_A has shape (16,), but x has 16 features; expected (r, 16)"),
    ({"lora_B": zeros(4, 12)}, ValueError, "lora_B has shape (4, 12), but weight has 12 output features and lora_A "
     "rank 4; expected (12, 4)"),
    ({"lora_B": zeros(12, 3)}, ValueError, "lora_B has shape (12, 3), but"),
    ({"bias": zeros(16)}, ValueError, "bias has shape (16,), but weight has 12 output features; expected (12,)"),
    ({"bias": zeros(1, 12)}, ValueError, "bias has shape (1, 12), but"),
    # ranks
    ({"lora_A": zeros(0, 16), "lora_B": zeros(12, 0)}, ValueError, "r is 0; expected 1 <= r <= 512"),
    ({"lora_A": zeros(513, 16), "lora_B": zeros(12, 513)}, ValueError, "r is 513; expected 1 <= r <= 512"),
    # dtypes
    ({"x": zeros(2, 16, dtype=torch.int64)}, TypeError, "x has dtype torch.int64; expected float32, float16, bfloat16"),
    ({"weight": zeros(12, 16, dtype=torch.uint8)}, TypeError, "weight has dtype torch.uint8; expected float32"),
    ({"lora_A": zeros(4, 16, dtype=torch.int8)}, TypeError, "lora_A has dtype torch.int8; expected float32"),
    ({"lora_B": zeros(12, 4, dtype=torch.complex64)}, TypeError, "lora_B has dtype torch.complex64; expected float32"),
    ({"bias": zeros(12, dtype=torch.bool)}, TypeError, "bias has dtype torch.bool; expected float32"),
    ({"x": zeros(2, 16, dtype=torch.float8_e4m3fn)}, TypeError, "x has dtype torch.float8_e4m3fn; expected float32"),
    ({"weight": zeros(12, 16).half(), "bias": None}, TypeError, "weight has dtype torch.float16, but x has "
     "torch.float32; expected the same"),
    ({"bias": zeros(12).half()}, TypeError, "bias has dtype torch.float16, but weight has torch.float32; expected the"),
    ({"lora_B": zeros(12, 4).half()}, TypeError, "lora_B has dtype torch.float16, but lora_A has torch.float32"),
    # devices
    *[
        ({name: tensor.to("meta")}, ValueError, f"{name} is on meta, but x is on cpu; expected all on one device")
        for name, tensor in good().items()
        if isinstance(tensor, torch.Tensor) and name != "x"
    ],
    ({"x": zeros(2, 16, device="meta")}, ValueError, "weight is on cpu, but x is on meta; expected all on one device"),
    ({"seed": torch.tensor([3], device="meta")}, ValueError, "seed is on meta, but x is on cpu"),
    # not tensors
    ({"x": [[1.0] * 16]}, TypeError, "x is list; expected a torch.Tensor"),
    ({"x": None}, TypeError, "x is NoneType; expected a torch.Tensor"),
    ({"weight": None}, TypeError, "weight is NoneType; expected a torch.Tensor"),
    ({"lora_A": torch.nn.Linear(16, 4)}, TypeError, "lora_A is Linear; expected a torch.Tensor"),
    ({"bias": True}, TypeError, "bias is bool; expected a torch.Tensor"),
    # numbers
    *[({"scaling": value}, ValueError, f"scaling is {value}; expected a finite number") for value in (NAN, INF, -INF)],
    ({"scaling": "2"}, TypeError, "scaling is str; expected a number"),
    ({"scaling": None}, TypeError, "scaling is NoneType; expected a number"),
    ({"scaling": True}, TypeError, "scaling is bool; expected a number"),
    ({"scaling": 1j}, TypeError, "scaling is complex; expected a number"),
    ({"scaling": torch.ones(())}, TypeError, "scaling is Tensor; expected a number"),
    *[
        ({"dropout_p": value}, ValueError, f"dropout_p is {value}; expected a probability in [0, 1]")
        for value in (-0.1, 1.5, NAN, INF, -1)
    ],
    ({"dropout_p": "0.1"}, TypeError, "dropout_p is str; expected a number"),
    # seeds
    ({"seed": NAN}, TypeError, "seed is nan; expected an integer"),
    ({"seed": 3.0}, TypeError, "seed is 3.0; expected an integer"),
    ({"seed": "3"}, TypeError, "seed is '3'; expected an integer"),
    ({"seed": True}, TypeError, "seed is True; expected an integer"),
    ({"seed": 2**63}, ValueError, "seed is 9223372036854775808; expected a signed 64-bit integer"),
    ({"seed": torch.tensor([NAN])}, TypeError, "seed has dtype torch.float32; expected torch.int64"),
    ({"seed": torch.tensor([3], dtype=torch.int32)}, TypeError, "seed has dtype torch.int32; expected torch.int64"),
    ({"seed": torch.tensor([3, 4])}, ValueError, "seed has shape (2,); expected (1,)"),
]  # fmt: skip


def refused(op: str, call, arguments: dict, error: type, message: str) -> None:
    """The call raises exactly that, and leaves its arguments and torch's generator as they were."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    before = {name: (t._version, None if t.is_meta else t.clone()) for name, t in tensors.items()}
    state = torch.get_rng_state()
    with pytest.raises(error) as raised:
        call(**arguments)
    assert type(raised.value) is error
    assert str(raised.value).startswith(f"{op}: {message}")
    assert "expected" in str(raised.value)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in tensors.items():
        version, values = before[name]
        assert tensor._version == version
        if values is not None:
            torch.testing.assert_close(tensor, values, rtol=0, atol=0, equal_nan=True)


def test_the_good_arguments_are_good():
    assert functional.lora_linear(**good()).shape == (2, 3, 12)


@pytest.mark.parametrize(("changes", "error", "message"), LORA_LINEAR, ids=[case[2][:45] for case in LORA_LINEAR])
def test_lora_linear(changes, error, message):
    refused("lora_linear", functional.lora_linear, {**good(), **changes}, error, message)


@pytest.mark.parametrize("scaling", [2, fractions.Fraction(3, 2), -1.5, 0.0])
def test_numbers_of_other_kinds_are_taken(scaling):
    expected = functional.lora_linear(**{**good(), "scaling": float(scaling)})
    assert torch.equal(functional.lora_linear(**{**good(), "scaling": scaling}), expected)


def test_keyword_only():
    """Positional scaling or bias would be mistaken for one another."""
    g = good()
    with pytest.raises(TypeError, match="positional"):
        functional.lora_linear(g["x"], g["weight"], g["lora_A"], g["lora_B"], 2.0)


def test_refused_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16):
        refused(
            "lora_linear", functional.lora_linear, {**good(), "lora_A": zeros(4, 15)}, ValueError,
            "lora_A has shape (4, 15), but x has 16 features; expected (r, 16)",
        )  # fmt: skip


PHILOX = [
    ({"x": zeros(())}, ValueError, "x has no dimensions; expected (..., K)"),
    ({"x": zeros(3, dtype=torch.int32)}, TypeError, "x has dtype torch.int32; expected float32"),
    ({"x": 1.0}, TypeError, "x is float; expected a torch.Tensor"),
    ({"p": -0.5}, ValueError, "p is -0.5; expected a probability in [0, 1]"),
    ({"p": NAN}, ValueError, "p is nan; expected a probability in [0, 1]"),
    ({"p": None}, TypeError, "p is NoneType; expected a number"),
    ({"seed": 0.5}, TypeError, "seed is 0.5; expected an integer"),
    ({"seed": torch.tensor([], dtype=torch.int64)}, ValueError, "seed has shape (0,); expected (1,)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), PHILOX, ids=[case[2][:45] for case in PHILOX])
def test_philox_dropout(changes, error, message):
    arguments = {"x": torch.ones(3, 8), "p": 0.5, "seed": 1, **changes}
    refused("philox_dropout", functional.philox_dropout, arguments, error, message)


SPLITK = [
    ({"partials": zeros(())}, ValueError, "partials has no dimensions; expected (P, ...)"),
    ({"partials": zeros(2, 3, dtype=torch.int64)}, TypeError, "partials has dtype torch.int64; expected float32"),
    ({"partials": [zeros(3)]}, TypeError, "partials is list; expected a torch.Tensor"),
    ({"scale": INF}, ValueError, "scale is inf; expected a finite number"),
    ({"scale": "1"}, TypeError, "scale is str; expected a number"),
    ({"dtype": torch.int8}, TypeError, "dtype is torch.int8; expected a floating-point dtype"),
]


@pytest.mark.parametrize(("changes", "error", "message"), SPLITK, ids=[case[2][:45] for case in SPLITK])
def test_splitk_reduce(changes, error, message):
    arguments = {"partials": torch.ones(2, 3), "scale": 1.0, **changes}
    refused("splitk_reduce", functional.splitk_reduce, arguments, error, message)


def test_module_refuses_an_input_that_does_not_fit():
    """The message of a layer deep in a model still names the argument and both sizes."""
    layer = FusedLoRALinear(16, 12, r=4)
    with pytest.raises(ValueError, match=r"weight has shape \(12, 16\), but x has 15 features"):
        layer(torch.ones(2, 15))


def test_no_gradient_is_half_written():
    """A backward pass that is refused leaves every .grad as it was."""
    problem = LoraProblem(4, 16, 12, 4)
    y = functional.lora_linear(*(problem.tensors[name] for name in ("x", "weight", "lora_A", "lora_B")))
    with pytest.raises(RuntimeError, match="shape"):
        y.backward(torch.ones(5, 12))
    assert all(tensor.grad is None for tensor in problem.tensors.values())
