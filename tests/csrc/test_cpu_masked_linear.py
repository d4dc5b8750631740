"""csrc/masked_linear.cpp: right to rounding at every vector width, whole blocks and parts of them, in both directions,
and bits that depend on nothing but the inputs. The grid of situations is in tests/ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_kernels import use_backend
from peft_kernels.formats.mask import pack
from peft_kernels.formats.positions import positions
from peft_kernels.kernels.cpu import masked_linear, masked_lora_linear
from peft_kernels.kernels.reference import mask_apply, mask_unpack
from peft_kernels.kernels.reference import masked_linear as specification
from tests.allocations import forget_peak, memory_of_process, peak_bytes
from tests.helpers import assert_within_rounding
from tests.problems import MaskedLoraProblem, MaskedProblem
from tests.problems.masked import drawn_mask

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
# (m, k, n): one of each, parts of words and of register tiles, more than a block each way.
SIZES = ((1, 1, 1), (2, 31, 5), (3, 100, 33), (4, 33, 70), (5, 64, 40), (13, 600, 50), (300, 40, 20), (9, 50, 300))


def case(m: int, n: int, k: int, dtype: torch.dtype = F32, density: float = 0.5) -> tuple[Tensor, ...]:
    """x, W, dY and the mask's words, of a W that is not 0 outside the mask."""
    generator = torch.Generator().manual_seed(m + n + k)
    x, weight, grad_y = (torch.randn(*s, generator=generator).to(dtype) for s in ((m, k), (n, k), (m, n)))
    return x, weight, grad_y, pack(drawn_mask(n, k, density)).words


def both(x, weight, grad_y, words, bias=None) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW by csrc."""
    grad_x = masked_linear.grad_product(grad_y, masked_linear.operand(weight, words, False), masked_linear.NO_UPDATE)
    y = masked_linear.forward(x, weight, words, False, bias)
    return y, grad_x, masked_linear.masked_grad_weight(grad_y, x, words, torch.empty(weight.shape, dtype=weight.dtype))


@DTYPES
@pytest.mark.parametrize("options", [{}, {"nf4": True}, {"compact": True}, {"clean": True}], ids=str)
def test_every_element_is_right_to_rounding(width, dtype, options):
    for m, k, n in SIZES:
        problem = MaskedProblem(m, k, n, dtype, bias=m % 2 > 0, **options)
        with use_backend("cpu"):
            assert_within_rounding(problem, problem.run())


@DTYPES
@pytest.mark.parametrize("options", [{}, {"nf4": True}, {"clean": True}, {"dropout_p": 0.3}], ids=str)
def test_every_element_is_right_to_rounding_with_an_update_inside_the_mask(width, dtype, options):
    for (m, k, n), r in zip(SIZES, (1, 3, 8, 33, 5, 2, 4, 16), strict=True):
        problem = MaskedLoraProblem(m, k, n, r, dtype, adapter_dtype=F32, update_masked=True, **options)
        with use_backend("cpu"):
            assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("density", [0.0, 0.01, 1.0])
def test_gradients_are_exactly_zero_outside_the_mask(width, density):
    """Of a product in float32 too, which is PyTorch's with the mask after it."""
    for dtype in (F32, BF16):
        x, weight, grad_y, words = case(9, 300, 70, dtype, density)
        needs = (False, True, False, False)
        grad = masked_linear.backward(grad_y, x, weight, words, False, None, None, needs)[1]
        kept = mask_unpack.forward(words, 70)
        assert (grad[~kept] == 0).all()
        assert not grad[~kept].signbit().any()
        assert density == 0 or (grad[kept] != 0).float().mean() > 0.99


@pytest.mark.parametrize("weight_dtype", [F32, BF16, F16], ids=str)
@DTYPES
def test_a_weight_of_another_dtype_is_rounded_once(width, dtype, weight_dtype):
    """To the dtype of x, before the product: three times a weight is three times what was rounded."""
    _, weight, _, words = case(1, 40, 70, weight_dtype)
    columns = masked_linear.forward(3 * torch.eye(70, dtype=dtype), weight, words, False, None).t()
    operand = masked_linear.operand(weight, words, False)
    lines = masked_linear.grad_product(3 * torch.eye(40, dtype=dtype), operand, masked_linear.NO_UPDATE)
    expected = (3 * mask_apply.forward(weight, words, dtype).float()).to(dtype)
    assert torch.equal(columns, expected)
    assert torch.equal(lines, expected)


def test_what_the_mask_hides_may_be_anything(width):
    x, weight, grad_y, words = case(7, 300, 70)
    hidden = ~mask_unpack.forward(words, 70)
    for special in (float("nan"), float("inf")):
        spoilt = weight.masked_fill(hidden, special)
        for clean, dirty in zip(both(x, weight, grad_y, words), both(x, spoilt, grad_y, words), strict=True):
            assert torch.equal(clean, dirty)
    x[3, 40] = float("nan")  # of dW all of column 40, where it is kept
    grad = both(x, weight, grad_y, words)[2]
    assert torch.equal(grad.isnan(), ~hidden & (torch.arange(70) == 40))


@pytest.mark.parametrize(("m", "dtype"), [(1, F32), (60, BF16), (300, F32)], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(width, m, dtype, monkeypatch):
    x, weight, grad_y, words = case(m, 300, 600, dtype)
    places = positions(mask_unpack.forward(words, 600).flatten().nonzero().squeeze(1), weight.shape)
    a, b = torch.randn(4, 600), torch.randn(300, 4)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        values = masked_linear.backward(grad_y, x, weight, words, False, places, F32, (False, False, False, True))[3]
        arguments = (weight, words, False, a, b, 0.5, 0.0, None, True)
        y, _ = masked_lora_linear.forward(x, *arguments[:3], None, *arguments[3:])
        results.append((*both(x, weight, grad_y, words), values, y))
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


def test_a_row_does_not_depend_on_the_others(width):
    x, weight, grad_y, words = case(300, 70, 600)
    y, grad_x, _ = both(x, weight, grad_y, words)
    for rows in (slice(0, 1), slice(17, 30), slice(255, 258)):
        some, grad, _ = both(x[rows], weight, grad_y[rows], words)
        assert torch.equal(some, y[rows])
        assert torch.equal(grad, grad_x[rows])


@DTYPES
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides(cpu, layout, dtype):
    """Of x, dY, W and the words."""

    def laid_out(tensor: Tensor) -> Tensor:
        if layout == "transposed":
            return tensor.t().contiguous().t()
        if layout == "sliced":
            return torch.cat((tensor, tensor, tensor), 1)[:, tensor.shape[1] : 2 * tensor.shape[1]]
        return tensor[:1].expand(tensor.shape)

    made = [laid_out(t) for t in case(9, 24, 70, dtype)]
    for strided, plain in zip(both(*made), both(*(t.contiguous() for t in made)), strict=True):
        assert torch.equal(strided, plain)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 64), (3, 0, 64), (3, 5, 0)])
def test_nothing_to_sum_or_to_give(cpu, m, n, k):
    x, weight, grad_y, words = case(m, n, k, density=1.0)
    bias = torch.randn(n)
    y, grad_x, grad_weight = both(x, weight, grad_y, words, bias)
    assert torch.equal(y, bias.expand(m, n) if k == 0 else specification.forward(x, weight, words, False, bias))
    assert torch.equal(grad_x, torch.zeros(m, k))
    assert torch.equal(grad_weight, torch.zeros(n, k))


def test_few_places_of_a_large_matrix(cpu):
    """None in some strips and blocks, the first and the last place, 64-bit places."""
    x, weight, grad_y, _ = case(5, 200, 600)
    flat = torch.tensor([0, 255, 256, 599, 600, 63 * 600 + 599, 64 * 600, 130 * 600 + 300, 200 * 600 - 1])
    places = positions(flat, weight.shape)
    expected = (grad_y.t() @ x).flatten()[flat]
    for index in (torch.int32, torch.int64):
        some = places._replace(flat=places.flat.to(index))
        for dtype in (F32, BF16):
            values = masked_linear.backward(grad_y, x, weight, None, True, some, dtype, (False, False, False, True))[3]
            torch.testing.assert_close(values, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("options", [{"dtype": F32}, {"dtype": BF16}, {"dtype": BF16, "nf4": True}], ids=str)
def test_no_masked_weight_is_made(cpu, options):
    """Neither as a tensor nor behind PyTorch's back: a step grows the process by little more than what it returns."""
    m, n, k = 32, 1024, 4096
    problem = MaskedLoraProblem(m, k, n, 8, adapter_dtype=F32, update_masked=True, bias=False, **options)
    with use_backend("cpu"):
        problem.run()
        whole, outputs = 4 * n * k, 4 * (m * (n + k) + 8 * (n + k))
        assert peak_bytes(problem.run) < 3 * outputs + whole // 8
        forget_peak()
        before = memory_of_process("VmRSS")
        problem.run()
    assert memory_of_process("VmHWM") - before < 3 * outputs + whole // 4


def test_processors_with_matrix_instructions_of_16_bits_leave_many_rows_to_pytorch(cpu, monkeypatch):
    problem = MaskedProblem(33, 64, 64, BF16).dispatched()
    monkeypatch.setattr(masked_linear, "matrix_instructions", lambda dtype: ("amx_bf16",) if dtype == BF16 else ())
    assert "amx_bf16" in masked_linear.unproven(problem)
    assert masked_linear.unproven(problem._replace(m=16)) is None
    assert masked_linear.unproven(problem._replace(dtype=F16)) is None
