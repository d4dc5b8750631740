"""bfloat16 in the interpreter, with what it does wrong put right for the length of a test.

Triton's interpreter multiplies the bit patterns of bfloat16 and truncates where the GPU rounds. Here PyTorch converts,
and `tl.dot` multiplies float32 values. What only bfloat16 takes runs for itself: the low-rank step last, no pass of two
results over dY.
"""

from __future__ import annotations

import numpy
import pytest
import torch

from peft_kernels import dispatch
from peft_kernels.kernels.triton import _launch
from tests.helpers import LoraProblem, assert_as_accurate_as_eager

BF16, F32 = torch.bfloat16, torch.float32


def _widened(bits: numpy.ndarray) -> numpy.ndarray:
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def _rounded(values: numpy.ndarray) -> numpy.ndarray:
    tensor = torch.from_numpy(numpy.ascontiguousarray(values)).to(BF16)
    return tensor.view(torch.int16).numpy().view(numpy.uint16)


@pytest.fixture(autouse=True)
def _right_bfloat16(monkeypatch):
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def right_cast(self, source, target):
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.bfloat16, tl.float32):
            return handle(_widened(source.data), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return handle(_rounded(source.data), tl.bfloat16)
        return cast(self, source, target)

    def right_dot(self, a, b, *others):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(_widened(operand.data), tl.float32) for operand in (a, b))
        return dot(self, a, b, *others)

    monkeypatch.setattr(builder, "cast_impl", right_cast)
    monkeypatch.setattr(builder, "create_fp_to_fp", lambda self, source, target, _: right_cast(self, source, target))
    monkeypatch.setattr(builder, "create_dot", right_dot)
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_launch, "unavailable", lambda *_: None)
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    names, launch = [], _launch.launch

    def record(kernel, *arguments, **options):
        names.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(_launch, "launch", record)
    return names


@pytest.mark.parametrize(
    ("m", "k", "n", "r", "scaling"),
    [(131, 136, 264, 3, 1.7), (300, 72, 264, 16, -0.3), (90, 136, 136, 96, 5.3)],
)
def test_as_accurate_as_eager(m, k, n, r, scaling, launched):
    problem = LoraProblem(m, k, n, r, dtype=BF16, scaling=scaling)
    assert_as_accurate_as_eager(problem, problem.run())
    assert launched.count("_extended_gemm_persistent") == 2


def test_two_launches_forward_and_four_backward(launched):
    """Above 512 rows; sums of partials are not counted."""
    problem = LoraProblem(520, 72, 136, 16, dtype=BF16, adapter_dtype=F32)
    assert_as_accurate_as_eager(problem, problem.run())
    named = [name for name in launched if name != "splitk_reduce"]
    gemm = ["_down_projection", "_extended_gemm_persistent"]
    assert named == [*gemm, *gemm, "_sum_over_rows", "_sum_over_rows"]


@pytest.mark.parametrize(("m", "r"), [(140, 8), (70, 40)])
def test_dropout(m, r):
    problem = LoraProblem(m, 72, 136, r, dtype=BF16, dropout_p=0.3)
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize(("m", "r"), [(1, 16), (40, 3)])
def test_single_pass(m, r, launched):
    problem = LoraProblem(m, 200, 130, r, dtype=BF16, scaling=1.7)
    assert_as_accurate_as_eager(problem, problem.run())
    assert "_single_pass" in launched
