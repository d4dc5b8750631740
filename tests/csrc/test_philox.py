"""csrc/philox.h and csrc/philox_dropout.cpp against the specification, bit for bit, at every vector width."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import functional, use_backend
from peft_kernels.kernels.cpu import philox_dropout as cpu_kernel
from peft_kernels.kernels.reference import philox_dropout as reference

SEEDS = (0, 1, -1, 1234, 2**32, 2**40 + 3, -(2**63), 2**63 - 1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def seed_tensor(seed: int) -> torch.Tensor:
    return torch.tensor([seed], dtype=torch.int64)


@pytest.mark.parametrize("seed", SEEDS)
def test_words_of_a_counter(cpu, seed):
    counters = torch.tensor([0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**45 + 7, 2**63 - 1])
    expected = torch.stack(reference.philox4x32(seed_tensor(seed).reshape(()), counters), dim=-1)
    assert [list(cpu.philox4x32(seed, int(c))) for c in counters] == expected.tolist()


def test_known_answer(cpu):
    """The vector that Random123 publishes for counter 0 under key 0."""
    assert cpu.philox4x32(0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99999, 1.0])
def test_bits_of_the_specification(width, dtype, p):
    for m, k in ((1, 1), (3, 5), (2, 8), (5, 129), (3, 1024), (2, 1025), (2, 2500)):
        x = torch.randn(m, k).to(dtype)
        for seed in (7, -5, 2**40 + 3):
            got = cpu_kernel.forward(x, p, seed_tensor(seed))
            assert torch.equal(got, reference.forward(x, p, seed_tensor(seed))), (m, k, seed)


@pytest.mark.parametrize("row_offset", [1, 1000, 2**33, 2**50])
def test_row_offset(width, row_offset):
    x = torch.randn(4, 77)
    got = cpu_kernel.forward(x, 0.3, seed_tensor(11), row_offset)
    assert torch.equal(got, reference.forward(x, 0.3, seed_tensor(11), row_offset))


def test_row_offset_continues_the_mask(width):
    x = torch.randn(50, 33)
    whole = cpu_kernel.forward(x, 0.4, seed_tensor(3))
    parts = [cpu_kernel.forward(x[i : i + 20], 0.4, seed_tensor(3), i) for i in (0, 20, 40)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded", "offset"])
def test_strides(width, layout):
    x = {
        "rows": torch.randn(24, 40)[::3],
        "columns": torch.randn(40, 24).t(),
        "expanded": torch.randn(1, 40).expand(24, 40),
        "offset": torch.randn(24 * 41 + 3)[3:].view(24, 41)[:, 1:],
    }[layout]
    got = cpu_kernel.forward(x, 0.5, seed_tensor(9))
    assert got.is_contiguous()
    assert torch.equal(got, reference.forward(x, 0.5, seed_tensor(9)))


def test_special_values(width):
    """What is dropped becomes +0, infinities and NaN included; what is kept stays infinite, NaN or -0."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 1e-40] * 40).view(2, 100)
    for dtype in DTYPES:
        got, expected = (f.forward(x.to(dtype), 0.5, seed_tensor(4)) for f in (cpu_kernel, reference))
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(got) & ~got.isnan(), torch.signbit(expected) & ~expected.isnan())


def test_number_of_threads_does_not_matter(cpu):
    x, before = torch.randn(37, 3000), torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(cpu_kernel.forward(x, 0.2, seed_tensor(8)))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_it_is_what_the_op_runs(cpu):
    x = torch.randn(3, 20, requires_grad=True)
    with use_backend("cpu"):
        y = functional.philox_dropout(x, 0.5, seed=6)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y, reference.forward(x.detach(), 0.5, seed_tensor(6)))
    assert torch.equal(grad, reference.forward(torch.ones(3, 20), 0.5, seed_tensor(6)))
