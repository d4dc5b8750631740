"""`lora_linear` on a GPU at sizes of many tiles: accuracy, alignment, 64-bit offsets, determinism, memory.

Small awkward shapes are in tests/ops, which runs on the GPU too.
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels import dispatch, functional
from peft_kernels.kernels.reference import philox_dropout
from peft_kernels.ops import lora_linear as op
from tests.gpu.conftest import on_gpu
from tests.helpers import GRADS, LoraProblem, assert_as_accurate_as_eager, relative_error

pytestmark = pytest.mark.gpu
ONE_AT_A_TIME = pytest.mark.xdist_group("memory")  # parallel tests would take the memory from one another
EVERY = pytest.mark.parametrize("backend", on_gpu("lora_linear"), indirect=True)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = ((F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, F32))
SIZES = ((1000, 1032, 2056, 16), (2048, 1024, 512, 64), (777, 1001, 999, 7), (1, 4096, 4096, 16), (16, 4096, 1024, 128))


def run(backend, problem: LoraProblem, **changes):
    backend.skip_unless_lora_linear(problem)
    return problem.run(**changes)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@EVERY
def test_as_accurate_as_eager(backend, dropout_p, size, dtypes):
    m, k, n, r = size
    problem = LoraProblem(
        m, k, n, r, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=dropout_p, device=backend.device
    )
    assert_as_accurate_as_eager(problem, run(backend, problem))


@pytest.mark.parametrize("name", ["x", "weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("offset", [1, 3, 8])
@EVERY
def test_rows_at_any_alignment(backend, offset, name):
    """Vector loads and bulk copies need 16-byte alignment; a slice of a larger tensor has none, and NaN around it."""
    problem = LoraProblem(300, 264, 136, 16, dtype=BF16, device=backend.device)
    tensor = problem.tensors[name].detach()
    wide = tensor.new_full((tensor.shape[0], tensor.shape[1] + offset + 1), float("nan"))
    sliced = wide[:, offset:-1]
    sliced.copy_(tensor)
    assert_as_accurate_as_eager(problem, run(backend, problem, **{name: sliced.requires_grad_()}))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@EVERY
def test_same_bits_every_time(backend, dropout_p):
    """Ten runs at a size that fills the GPU, another kernel running beside them: reductions have one order."""
    problem = LoraProblem(
        4096, 4096, 2048, 16, dtype=BF16, adapter_dtype=F32, dropout_p=dropout_p, device=backend.device
    )
    first_y, first = run(backend, problem)
    noise, side = torch.randn(2048, 2048, device=backend.device), torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(side):
            torch.mm(noise, noise)
        y, grads = run(backend, problem)
        assert torch.equal(y, first_y)
        for name in GRADS:
            assert torch.equal(grads[name], first[name]), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("wide", ["in_features", "out_features"])
@ONE_AT_A_TIME
@EVERY
def test_offsets_beyond_32_bits(backend, wide, dropout_p, needs_memory):
    """x, or y and its gradient, has more than 2^31 elements: the last rows are what they are in a problem of their own,
    and the sums over all rows equal those of float64 (F05, F10: grids of half a million rows)."""
    if backend.name == "reference":
        pytest.skip("the specification holds whole masks in 64-bit integers: too much memory at this size")
    rows, tail = (1 << 19) + 40, 40
    k, n = (4096, 64) if wide == "in_features" else (64, 4096)
    assert rows * max(k, n) > 2**31
    needs_memory(40 << 30)
    problem = LoraProblem(tail, k, n, 8, dtype=BF16, bias=False, dropout_p=dropout_p, device=backend.device)
    backend.skip_unless_lora_linear(problem)
    t = {name: problem.tensors[name].detach() for name in ("weight", "lora_A", "lora_B")}
    seed = torch.tensor([problem.seed], device=backend.device)
    generator = torch.Generator(backend.device).manual_seed(3)
    x = torch.randn(rows, k, dtype=BF16, device=backend.device, generator=generator)
    grad_y = torch.randn(rows, n, dtype=BF16, device=backend.device, generator=generator)
    arguments = (t["weight"], t["lora_A"], t["lora_B"], problem.scaling, dropout_p, seed if dropout_p else None)
    y, s = op.kernel(x, t["weight"], None, *arguments[1:])
    needs = (True, False, False, True, True)
    grad_x, grad_a, grad_b = op.backward_kernel(grad_y, x, s, *arguments, needs)
    truth = _in_blocks(x, grad_y, t, problem, seed)
    assert relative_error(y[-tail:], truth["y"][-tail:]) < 1e-2
    assert relative_error(grad_x[-tail:], truth["x"][-tail:]) < 1e-2
    assert relative_error(grad_a, truth["lora_A"]) < 1e-2
    assert relative_error(grad_b, truth["lora_B"]) < 1e-2


def _in_blocks(x, grad_y, t, problem: LoraProblem, seed) -> dict[str, torch.Tensor]:
    """The formula in float32 over blocks of rows, sums in float64; y and dx of the last block only."""
    weight, a, b = (t[name].float() for name in ("weight", "lora_A", "lora_B"))
    grad_a, grad_b = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
    step = 1 << 14
    for start in range(0, x.shape[0], step):
        rows, grads = x[start : start + step].float(), grad_y[start : start + step].float()
        mask = torch.ones_like(rows)
        if problem.dropout_p:
            mask = philox_dropout.forward(mask, problem.dropout_p, seed, start)
        s, grad_s = (rows * mask) @ a.t(), problem.scaling * grads @ b
        grad_a += (grad_s.t() @ (rows * mask)).double()
        grad_b += (problem.scaling * grads.t() @ s).double()
    y = rows @ weight.t() + problem.scaling * s @ b.t()
    return {"y": y, "x": grads @ weight + mask * (grad_s @ a), "lora_A": grad_a, "lora_B": grad_b}


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@ONE_AT_A_TIME
@EVERY
def test_memory_that_forward_leaves_and_training_needs(backend, dropout_p, needs_memory):
    """Forward leaves y and S [M, r]. Forward + backward never holds a second x besides dx: no mask, no dropped-out or
    float32 copy, no dequantised weight."""
    if backend.name == "reference":
        pytest.skip("the specification is written to be read; it keeps what it likes while it runs")
    m, k, n, r = 1 << 16, 4096, 1024, 16
    needs_memory(16 << 30)
    problem = LoraProblem(8, k, n, r, dtype=BF16, adapter_dtype=F32, bias=False, dropout_p=dropout_p, device="cuda")
    backend.skip_unless_lora_linear(problem)
    t = problem.tensors
    weight, x = t["weight"].detach(), torch.randn(m, k, dtype=BF16, device="cuda").requires_grad_()
    grad_y = torch.randn(m, n, dtype=BF16, device="cuda")

    def forward():
        return functional.lora_linear(x, weight, t["lora_A"], t["lora_B"], dropout_p=dropout_p)

    def step():
        return torch.autograd.grad(forward(), (x, t["lora_A"], t["lora_B"]), grad_y)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = forward()
    kept = torch.cuda.memory_allocated() - before - y.nbytes
    assert kept <= m * r * 2 + 4096, f"forward keeps {kept} bytes besides y"
    del y
    torch.cuda.reset_peak_memory_stats()
    step()
    extra = torch.cuda.max_memory_allocated() - before - x.nbytes - grad_y.nbytes
    # y (which the caller holds) is as large as grad_y; dx as large as x. What remains is scratch of bounded size.
    assert extra <= x.nbytes // 2, f"{extra / 2**20:.0f} MiB of scratch, x has {x.nbytes / 2**20:.0f}"


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
def test_the_automatic_choice_takes_any_shape(dtypes):
    """No shape raises, and explain names each implementation that was passed over with a reason."""
    for m, k, n, r in ((0, 64, 64, 4), (1, 1, 1, 1), (5, 4097, 3, 512), (513, 40, 7000, 24)):
        problem = LoraProblem(m, k, n, r, dtype=dtypes[0], adapter_dtype=dtypes[1], device="cuda")
        t = problem.tensors
        y, grads = problem.run()
        assert y.shape == (m, n)
        assert all(grads[name].shape == t[name].shape for name in GRADS)
        choice = dispatch.explain("lora_linear", t["x"], t["weight"], t["lora_A"], t["lora_B"])
        passed_over = dispatch.ORDER["lora_linear"][: dispatch.ORDER["lora_linear"].index(choice.backend)]
        assert tuple(name for name, _ in choice.rejected) == passed_over
        assert all(reason for _, reason in choice.rejected)
