"""`dispatch`: which implementation runs, the reasons, forcing one, and that an unknown GPU never raises."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import threading
import types

import pytest
import torch

import peft_kernels
from peft_kernels import dispatch, functional
from peft_kernels.ops import lora_linear, nf4_linear
from peft_kernels.problems import Draw, nf4_weight
from tests.backends import probe
from tests.helpers import LoraProblem
from tests.problems import PLAIN

ARGUMENTS = {
    "lora_linear": lambda: (torch.ones(4, 8), torch.ones(6, 8), torch.ones(2, 8), torch.ones(6, 2)),
    "philox_dropout": lambda: (torch.ones(4, 8), 0.5),
}


@pytest.fixture(autouse=True)
def _fresh_choices():
    dispatch.forget()
    yield
    dispatch.forget()


def fake_implementation(monkeypatch, op, backend, **functions):
    """Puts a module of these functions in the place of kernels/<backend>/<op>.py."""
    module = types.SimpleNamespace(unsupported=lambda problem: None, **functions)
    real = dispatch._implementation
    monkeypatch.setattr(dispatch, "_implementation", lambda o, b: module if (o, b) == (op, backend) else real(o, b))


def test_every_op_has_an_order_that_ends_in_the_reference():
    """The last one supports everything, so that no problem is without an implementation."""
    for op, order in dispatch.ORDER.items():
        assert order[-1] == "reference"
        assert set(order) <= set(dispatch.BACKENDS)
        assert len(set(order)) == len(order)
        assert dispatch.objection(op, "reference", probe(op, "cpu")) is None


@pytest.mark.parametrize("op", PLAIN)
def test_explain_takes_the_arguments_of_the_function(op):
    """All of them, by position and by name."""
    args, kwargs = PLAIN[op]("cpu").arguments(PLAIN[op]("cpu").tensors)
    choice = peft_kernels.explain(op, *args, **kwargs)
    assert (choice.op, choice.backend in dispatch.ORDER[op]) == (op, True)
    names = inspect.signature(getattr(functional, op)).parameters
    assert peft_kernels.explain(op, **dict(zip(names, args, strict=False)), **kwargs) == choice


def test_reasons_name_what_was_passed_over():
    choice = peft_kernels.explain("lora_linear", *ARGUMENTS["lora_linear"]())
    passed_over = dict(choice.rejected)
    order = dispatch.ORDER["lora_linear"]
    assert list(passed_over) == list(order[: order.index(choice.backend)])
    assert all(reason.strip() for reason in passed_over.values())
    text = str(choice).splitlines()
    assert text[0].startswith(f"lora_linear: {choice.backend} (")
    assert text[1:] == [f"  not {name}: {reason}" for name, reason in choice.rejected]


def test_explain_computes_nothing():
    """It answers for sizes that could not be allocated, from meta tensors."""
    huge = [torch.empty(*shape, device="meta") for shape in ((2**20, 2**16), (2**16, 2**16), (16, 2**16), (2**16, 16))]
    assert peft_kernels.explain("lora_linear", *huge, dropout_p=0.1).op == "lora_linear"


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown op 'lora'; expected one of lora_linear, "):
        peft_kernels.explain("lora", torch.ones(1))
    with (
        pytest.raises(ValueError, match="unknown backend 'tritn'; expected one of reference, "),
        peft_kernels.use_backend("tritn"),
    ):
        pass
    assert dispatch._forced is None


def test_use_backend_forces_and_restores():
    with peft_kernels.use_backend("reference"):
        choice = peft_kernels.explain("lora_linear", *ARGUMENTS["lora_linear"]())
        assert (choice.backend, choice.rejected) == ("reference", ())
        with peft_kernels.use_backend("composed"):
            assert peft_kernels.explain("lora_linear", *ARGUMENTS["lora_linear"]()).backend == "composed"
            with peft_kernels.use_backend(None):
                assert dispatch._forced is None
        assert dispatch._forced == "reference"
    assert dispatch._forced is None
    with pytest.raises(KeyError), peft_kernels.use_backend("reference"):
        raise KeyError
    assert dispatch._forced is None


@pytest.mark.parametrize("name", ["reference", "composed"])
def test_the_forced_implementation_really_runs(name, monkeypatch):
    """Forward and backward of the named module are called, those of the other are not."""
    calls = []
    for backend in ("reference", "composed"):
        module = dispatch.implementation("lora_linear", backend)
        for function in ("forward", "backward"):
            original = getattr(module, function)
            monkeypatch.setattr(
                module, function,
                lambda *a, _o=original, _n=(backend, function): calls.append(_n) or _o(*a),
            )  # fmt: skip
    with peft_kernels.use_backend(name):
        LoraProblem(3, 8, 6, 2).run()
    assert calls == [(name, "forward"), (name, "backward")]


def test_an_op_without_that_backend_keeps_its_choice():
    with peft_kernels.use_backend("composed"):
        assert peft_kernels.explain("philox_dropout", *ARGUMENTS["philox_dropout"]()).backend != "composed"


def test_forced_but_unsupported_raises(monkeypatch):
    fake_implementation(monkeypatch, "lora_linear", "triton")
    dispatch._implementation("lora_linear", "triton").unsupported = lambda problem: "r is 2, expected a prime above 7"
    with (
        peft_kernels.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"lora_linear: backend 'triton' was asked for .* r is 2, expected a prime"),
    ):
        LoraProblem(3, 8, 6, 2).run()
    LoraProblem(3, 8, 6, 2).run()  # without force it falls back


def test_unproven_is_passed_over_by_default_and_forced_on_request(monkeypatch):
    reference = dispatch.implementation("lora_linear", "reference")
    fake_implementation(
        monkeypatch, "lora_linear", "triton",
        forward=reference.forward, backward=reference.backward, unproven=lambda problem: "never measured here",
    )  # fmt: skip
    choice = peft_kernels.explain("lora_linear", *ARGUMENTS["lora_linear"]())
    assert ("triton", "never measured here") in choice.rejected
    with peft_kernels.use_backend("triton"):
        assert peft_kernels.explain("lora_linear", *ARGUMENTS["lora_linear"]()).backend == "triton"
        LoraProblem(3, 8, 6, 2).run()


def test_implementation_that_cannot_be_imported_is_passed_over(monkeypatch):
    def missing(op, backend):
        if backend == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return real(op, backend)

    real = dispatch._implementation
    monkeypatch.setattr(dispatch, "_implementation", missing)
    rejected = dict(peft_kernels.explain("lora_linear", *ARGUMENTS["lora_linear"]()).rejected)
    assert rejected["triton"] == "not importable: No module named 'triton'"


def test_forced_in_threads():
    """Autograd's backward threads and data-parallel threads see the forced backend too."""
    seen = []
    with peft_kernels.use_backend("reference"):
        thread = threading.Thread(
            target=lambda: seen.append(peft_kernels.explain("lora_linear", *ARGUMENTS["lora_linear"]()).backend)
        )
        thread.start()
        thread.join(30)
    assert seen == ["reference"]


def test_choice_is_remembered_per_bucket_of_rows():
    """Batches of 33 and 64 rows ask once; another rank or dtype asks again."""
    arguments = [torch.ones(64, 8), torch.ones(6, 8), torch.ones(2, 8), torch.ones(6, 2)]
    first = lora_linear.problem(*arguments)
    assert lora_linear.problem(arguments[0][:33], *arguments[1:]) == first
    assert lora_linear.problem(arguments[0][:32], *arguments[1:]) != first
    assert lora_linear.problem(*[tensor.bfloat16() for tensor in arguments]) != first
    assert lora_linear.problem(*arguments, dropout_p=0.5) != first
    assert lora_linear.problem(*arguments, dropout_p=0.5, training=False) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_unknown_gpu_never_raises(dtype):
    """A GPU nobody has measured, or none that torch can see: a choice with reasons, not an exception."""
    for index in (0, 7):
        problem = lora_linear.Problem("cuda", index, dtype, torch.float32, 1 << 40, 12289, 4097, 511, True)
        choice = dispatch.choose("lora_linear", problem)
        assert choice.backend in ("triton", "composed", "reference")
    assert dispatch.choose("lora_linear", problem._replace(device="xpu")).backend == "composed"
    if not torch.cuda.is_available():
        assert choice.backend == "composed"


QUANTISED = ("nf4_linear", "nf4_lora_linear", "nf4_dequantize", "nf4_quantize")


@pytest.mark.parametrize("op", QUANTISED)
def test_an_unknown_gpu_takes_weights_of_4_bits(op):
    """One that nobody measured, or of another maker: a choice with a reason for each that was passed over."""
    plain = probe(op, "cpu")
    for device, index in (("cuda", 0), ("cuda", 7), ("xpu", 0)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for sizes in ({}, {"n": 12289, "k": 4097}):
                known = {name: size for name, size in sizes.items() if name in plain._fields}
                problem = plain._replace(device=device, device_index=index, dtype=dtype, **known)
                choice = dispatch.choose(op, problem)
                assert choice.backend in dispatch.ORDER[op]
                assert all(reason.strip() for _, reason in choice.rejected)


def test_a_weight_of_4_bits_is_explained_without_memory():
    """From the meta device, by position and by name, forced and not."""
    q = nf4_weight(Draw("meta"), 2**16, 2**16)
    x, a, b = (torch.empty(*shape, device="meta") for shape in ((2**20, 2**16), (16, 2**16), (2**16, 16)))
    assert peft_kernels.explain("nf4_linear", x, q).op == "nf4_linear"
    assert peft_kernels.explain("nf4_lora_linear", x, q=q, lora_A=a, lora_B=b, dropout_p=0.1).op == "nf4_lora_linear"
    assert peft_kernels.explain("nf4_dequantize", q, torch.float16).op == "nf4_dequantize"
    assert peft_kernels.explain("nf4_quantize", x, blocksize=128).op == "nf4_quantize"
    with peft_kernels.use_backend("composed"):
        assert peft_kernels.explain("nf4_linear", x, q).backend == "composed"
        assert peft_kernels.explain("nf4_dequantize", q).backend != "composed"


def test_the_choice_for_4_bits_depends_on_rows_blocks_and_nesting():
    """Kernels exist for some of them only; batches of 9 and 16 rows ask once."""
    q, x = nf4_weight(Draw("cpu"), 64, 64), torch.ones(16, 64)
    first = nf4_linear.problem(x, q)
    assert nf4_linear.problem(x[:9], q) == first == nf4_linear.problem(x, q.rows(0, 64))
    others = [nf4_linear.problem(x[:8], q), nf4_linear.problem(x.bfloat16(), q), nf4_linear.problem(x, q.rows(0, 9))]
    others += [
        nf4_linear.problem(x, nf4_weight(Draw("cpu"), 64, 64, **o)) for o in ({"nested": False}, {"blocksize": 32})
    ]
    assert len({first, *others}) == 6


def test_environment_variable_forces_a_process():
    code = (
        "import torch, peft_kernels;"
        "t = torch.ones;"
        "print(peft_kernels.explain('lora_linear', t(4, 8), t(6, 8), t(2, 8), t(6, 2)).backend)"
    )
    environment = {**os.environ, "PEFT_KERNELS_BACKEND": "reference"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "reference"), result.stderr


def test_environment_variable_with_a_typo_says_so(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "refrence")
    with pytest.raises(ValueError, match="unknown backend 'refrence'; expected one of reference, composed"):
        dispatch._from_environment()
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "")
    assert dispatch._from_environment() is None


def test_backward_runs_under_the_automatic_choice_after_a_forced_forward():
    """Leaving `use_backend` between forward and backward is legal and gives the same gradients."""
    problem = LoraProblem(9, 31, 17, 3)
    t = problem.tensors
    with peft_kernels.use_backend("reference"):
        y = functional.lora_linear(t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"], scaling=1.5)
    grads = torch.autograd.grad(y, list(t.values()), problem.grad_y)
    _, plain = problem.run()
    for name, grad in zip(t, grads, strict=True):
        torch.testing.assert_close(grad, plain[name])
