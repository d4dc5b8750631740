"""csrc/nf4_linear.cpp: right to rounding at every vector width, the same weights at every number of rows and in both
directions, and bits that depend on nothing but the inputs. The grid of shapes is in tests/ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels import _native, use_backend
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.cpu import nf4_linear, nf4_lora_linear
from peft_kernels.kernels.reference import nf4_dequantize as decoded
from tests.allocations import forget_peak, memory_of_process, peak_bytes
from tests.helpers import assert_within_rounding
from tests.problems import Nf4Problem
from tests.problems.nf4 import PARTS, part_of

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
SIZES = ((1, 1), (96, 50), (65, 7), (3420, 3), (700, 97), (40, 210))  # (k, n)
ROWS = (1, 2, 3, 4, 5, 8, 9, 13, 16, 17, 37)


# The 16-bit types differ in how an element is read and rounded, not in how rows are taken: they share the rows out.
@pytest.mark.parametrize(
    ("m", "dtype"), [*((m, F32) for m in ROWS), *((m, (BF16, F16)[i % 2]) for i, m in enumerate(ROWS))], ids=str
)
def test_every_element_is_right_to_rounding(nf4_width, m, dtype):
    for i, (k, n) in enumerate(SIZES):
        options = {"blocksize": (32, 64, 512)[(i + m) % 3], "nested": i % 2 == 0, "part": PARTS[(i + m) % len(PARTS)]}
        problem = Nf4Problem(m, k, n, dtype, bias=i % 3 > 0, **options)
        with use_backend("cpu"):
            assert_within_rounding(problem, problem.run())


def test_more_rows_than_are_taken_at_a_time(nf4_width):
    problem = Nf4Problem(490, 33, 20)
    with use_backend("cpu"):
        assert_within_rounding(problem, problem.run())


def recovered(q: NF4Weight, rows: int) -> tuple[Tensor, Tensor]:
    """The weight as forward and as backward see it, from rows of the unit matrix, `rows` at a time."""
    n, k, *_ = q.layout
    columns = [nf4_linear.forward(x, q, None) for x in torch.eye(k, dtype=q.dtype).split(rows)]
    lines = [nf4_linear.backward(grad_y, q) for grad_y in torch.eye(n, dtype=q.dtype).split(rows)]
    return torch.cat(columns).t(), torch.cat(lines)


@DTYPES
@pytest.mark.parametrize("part", PARTS)
def test_the_same_weights_at_every_number_of_rows_and_in_both_directions(nf4_width, part, dtype):
    """A product with a row of the unit matrix is a weight, exactly."""
    q = part_of(part, 21, 130, blocksize=32 if part == "rows" else 64)._replace(dtype=dtype)
    weight = decoded.forward(q)
    for rows in (1, 2, 3, 4, 5, 16, 17, 33):
        for direction in recovered(q, rows):
            assert torch.equal(direction, weight), rows


@pytest.mark.parametrize("m", [1, 4, 16, 60])
def test_bits_do_not_depend_on_the_number_of_threads(nf4_width, m, monkeypatch):
    q = part_of("corner", 300, 1100)._replace(dtype=BF16)
    x, grad_y, bias = torch.randn(m, 1100).to(BF16), torch.randn(m, 300).to(BF16), torch.randn(300).to(BF16)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append((nf4_linear.forward(x, q, bias), nf4_linear.backward(grad_y, q)))
    for y, grad_x in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad_x, results[0][1])


@pytest.mark.parametrize("m", [1, 3, 16, 30])
def test_rows_do_not_touch_one_another(nf4_width, m):
    """NaN in one row of x or dY stays in that row; beyond K and N nothing is read."""
    q = part_of("columns", 37, 75)._replace(dtype=F32)
    x, grad_y = torch.randn(m, 75), torch.randn(m, 37)
    y, grad_x = nf4_linear.forward(x, q, None), nf4_linear.backward(grad_y, q)
    x[m // 2, 40] = grad_y[m // 2, 20] = float("nan")
    others = torch.arange(m) != m // 2
    for before, after in ((y, nf4_linear.forward(x, q, None)), (grad_x, nf4_linear.backward(grad_y, q))):
        assert torch.equal(before[others], after[others])
        assert after[m // 2].isnan().all()


@pytest.mark.parametrize("m", [1, 5, 20])
def test_a_block_without_absmax_spoils_its_own_outputs(nf4_width, m):
    q = part_of("whole", 50, 96, nested=False)._replace(dtype=BF16)
    absmax = q.absmax.clone()
    absmax[20] = float("nan")  # elements 1280 .. 1343: row 13 from column 32 on
    q = q._replace(absmax=absmax)
    y = nf4_linear.forward(torch.ones(m, 96, dtype=BF16), q, None)
    assert y.isnan().any(0).nonzero().flatten().tolist() == [13]
    grad_x = nf4_linear.backward(torch.ones(m, 50, dtype=BF16), q)
    assert grad_x.isnan().any(0).nonzero().flatten().tolist() == list(range(32, 96))


@pytest.mark.parametrize("m", [1, 3, 5, 20])
def test_infinite_weights_give_infinite_outputs(nf4_width, m):
    """What lies beyond K in the last vector is no weight: 0 times an infinite one would be NaN."""
    packed, absmax = torch.full((5 * 33 + 1,), 0xFF, dtype=torch.uint8), torch.full((6,), float("inf"))
    q = NF4Weight(packed, absmax, None, None, None, torch.Size((10, 33)), BF16, 64)
    y = nf4_linear.forward(torch.ones(m, 33, dtype=BF16), q, None)
    grad_x = nf4_linear.backward(torch.ones(m, 10, dtype=BF16), q)
    assert (y == float("inf")).all()
    assert (grad_x == float("inf")).all()


@DTYPES
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(cpu, layout, dtype):
    q = part_of("whole", 24, 70)._replace(dtype=dtype)

    def laid_out(rows: int, columns: int) -> Tensor:
        if layout == "transposed":
            return torch.randn(columns, rows).to(dtype).t()
        if layout == "sliced":
            return torch.randn(rows, 2 * columns + 3).to(dtype)[:, 2 : 2 + columns]
        return torch.randn(1, columns).to(dtype).expand(rows, columns)

    x, grad_y = laid_out(9, 70), laid_out(9, 24)
    assert torch.equal(nf4_linear.forward(x, q, None), nf4_linear.forward(x.contiguous(), q, None))
    assert torch.equal(nf4_linear.backward(grad_y, q), nf4_linear.backward(grad_y.contiguous(), q))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 64), (3, 0, 64), (3, 5, 0), (20, 0, 64), (20, 5, 0)])
def test_nothing_to_sum_or_to_give(cpu, m, n, k):
    q = part_of("whole", n, k)._replace(dtype=F32)
    bias = torch.randn(n)
    y, grad_x = nf4_linear.forward(torch.randn(m, k), q, bias), nf4_linear.backward(torch.randn(m, n), q)
    assert y.shape == (m, n)
    assert k > 0 or torch.equal(y, bias.expand(m, n))
    assert torch.equal(grad_x, torch.zeros(m, k))


@pytest.mark.parametrize("m", [1, 16, 64])
def test_no_dense_weight_is_made(cpu, m):
    """Neither as a tensor nor behind PyTorch's back: the process grows by a small part of a dense 16-bit W."""
    n = k = 2048
    q = part_of("whole", n, k)._replace(dtype=BF16)
    x, grad_y = torch.randn(m, k).to(BF16), torch.randn(m, n).to(BF16)
    a, b = torch.randn(8, k).to(BF16), torch.randn(n, 8).to(BF16)

    def step() -> None:
        _, s = nf4_lora_linear.forward(x, q, None, a, b, 1.0, 0.0, None)
        nf4_lora_linear.backward(grad_y, x, s, q, a, b, 1.0, 0.0, None, (True, False, False, True, True))

    with use_backend("cpu"):
        step()
        assert peak_bytes(step) < 4 * m * (n + k) + 2 * 8 * (n + k) + 4096
        forget_peak()
        before = memory_of_process("VmRSS")
        step()
    assert memory_of_process("VmHWM") - before < n * k // 2


def test_processors_with_matrix_instructions_of_16_bits_leave_many_rows_to_pytorch(cpu, monkeypatch):
    problem = Nf4Problem(33, 64, 64, BF16).dispatched()
    assert nf4_linear.unproven(problem) is None or nf4_linear.matrix_instructions(BF16)
    monkeypatch.setattr(nf4_linear, "matrix_instructions", lambda dtype: ("amx_bf16",) if dtype == BF16 else ())
    assert "amx_bf16" in nf4_linear.unproven(problem)
    assert nf4_linear.unproven(problem._replace(m=16)) is None
    assert nf4_linear.unproven(problem._replace(dtype=F16)) is None
    assert "float32" in nf4_linear.unproven(problem._replace(dtype=F32, m=512))
    assert _native.why_not("_cpu") is None
