"""`philox_dropout`: the generator is Philox 4x32-10, the layout is the documented one, every implementation agrees."""

from __future__ import annotations

import math

import pytest
import torch

from peft_kernels import functional
from peft_kernels.kernels.reference import philox_dropout as reference
from tests.backends import everywhere

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("philox_dropout"), indirect=True)

# (counter, key, output) of philox4x32 with 10 rounds, from the kat_vectors file of Random123 (D. E. Shaw Research).
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """Philox 4x32-10 on Python integers, written from the paper: the oracle for the tensor version."""
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = (
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        )
        key = ((key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF)
    return counter


def lane(seed: int, row: int, column: int, columns: int) -> int:
    """The 16 bits that decide about element (row, column), as the specification words it."""
    call = row * math.ceil(columns / 8) + column // 8
    words = philox((call & 0xFFFFFFFF, call >> 32, 0, 0), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return words[column % 8 // 2] >> (16 * (column % 2)) & 0xFFFF


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    assert philox(counter, key) == output


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x243F6A8885A308D3])
@pytest.mark.parametrize("counter", [0, 1, 2**32 - 1, 2**32, 2**62 + 12345])
def test_tensor_version_is_philox(seed, counter):
    words = reference.philox4x32(torch.tensor(seed), torch.tensor([counter]))
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    assert tuple(int(word) for word in words) == philox((counter & 0xFFFFFFFF, counter >> 32, 0, 0), key)


@pytest.mark.parametrize(("rows", "columns"), [(3, 8), (4, 13), (5, 1), (2, 31), (1, 64)])
@EVERYWHERE
def test_layout(backend, rows, columns):
    """Element (m, k) is kept where its lane reaches round(65536 p), element by element."""
    seed, p = -123456789012345, 0.37
    x = torch.arange(1.0, rows * columns + 1, device=backend.device).view(rows, columns)
    y = functional.philox_dropout(x, p, seed)
    for m in range(rows):
        for k in range(columns):
            kept = lane(seed, m, k, columns) >= round(65536 * p)
            expected = float(x[m, k]) / (1 - p) if kept else 0.0
            assert float(y[m, k]) == pytest.approx(expected, rel=1e-6), (m, k)


@EVERYWHERE
def test_threshold_is_inclusive(backend):
    """An element whose lane equals round(65536 p) is kept; one step of p later it is dropped."""
    x = torch.ones(4, 24, device=backend.device)
    for m, k in ((0, 0), (1, 7), (2, 13), (3, 23)):
        p = lane(5, m, k, 24) / 65536
        assert functional.philox_dropout(x, p, 5)[m, k] != 0
        assert functional.philox_dropout(x, p + 1 / 65536, 5)[m, k] == 0


@pytest.mark.parametrize("offset", [1, 7, 2**31, 2**33 + 5, 2**58])
@EVERYWHERE
def test_row_offset(backend, offset):
    """A block of rows draws what the whole would have drawn there, past 2^32 counters too."""
    columns, seed = 21, torch.tensor([77], device=backend.device)
    y = torch.ops.peft_kernels.philox_dropout(torch.ones(2, columns, device=backend.device), 0.5, seed, offset)
    expected = [[2.0 * (lane(77, offset + m, k, columns) >= 32768) for k in range(columns)] for m in range(2)]
    assert y.tolist() == expected


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((1,), (8,), (0, 8), (8, 0), (5, 33), (2, 3, 40), (129, 257))
PROBABILITIES = (0.0, 1e-6, 0.1, 0.5, 0.999, 1.0)


# Each p with each shape, in one dtype of four by turns; the large one, which has all kinds of rows, in each dtype.
@pytest.mark.parametrize(
    ("p", "shape", "dtype"),
    [
        *(
            (p, shape, DTYPES[(i + j + i // 4) % 4])
            for i, p in enumerate(PROBABILITIES)
            for j, shape in enumerate(SHAPES[:-1])
        ),
        *((p, SHAPES[-1], dtype) for p in (0.1, 0.999) for dtype in DTYPES),
        *((p, SHAPES[-1], torch.float32) for p in (0.0, 1e-6, 0.5, 1.0)),
    ],
    ids=str,
)
@EVERYWHERE
def test_same_bits_as_the_reference(backend, p, shape, dtype):
    from peft_kernels.ops.philox_dropout import problem

    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    backend.skip_unless_runnable(problem(x.to(backend.device)))
    y = functional.philox_dropout(x.to(backend.device), p, 31)
    rows = x.reshape(-1, shape[-1]) if x.numel() else x.new_zeros(0, 1)
    expected = reference.forward(rows, p, torch.tensor([31])).view(shape)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert torch.equal(y.cpu(), expected)


@EVERYWHERE
def test_strided_and_expanded_input(backend):
    wide = torch.randn(12, 66, device=backend.device)
    for x in (wide.t(), wide[:, 1::2], wide[::3], wide[:1].expand(12, 66), wide.view(3, 4, 66).transpose(0, 1)):
        expected = functional.philox_dropout(x.clone(memory_format=torch.contiguous_format), 0.4, 2)
        assert torch.equal(functional.philox_dropout(x, 0.4, 2), expected)


@EVERYWHERE
def test_gradient_is_the_same_mask(backend):
    x = torch.randn(9, 33, device=backend.device, dtype=torch.float64, requires_grad=True)
    from peft_kernels.ops.philox_dropout import problem

    backend.skip_unless_runnable(problem(x))
    assert torch.autograd.gradcheck(lambda t: functional.philox_dropout(t, 0.3, 5), x)
    y = functional.philox_dropout(x, 0.3, 5)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y).t().contiguous().t())
    assert torch.equal(grad, functional.philox_dropout(torch.ones_like(x), 0.3, 5).detach())


@EVERYWHERE
def test_what_is_dropped_is_zero(backend):
    """Dropped infinities and NaN become 0, kept ones stay: nothing is multiplied by a zero mask."""
    ones = torch.ones(16, 40, device=backend.device)
    kept = functional.philox_dropout(ones, 0.5, 6) != 0
    for bad in (float("inf"), float("nan")):
        y = functional.philox_dropout(ones * bad, 0.5, 6)
        assert not y[~kept].any()
        assert not y[kept].isfinite().any()


@EVERYWHERE
def test_nothing_is_stored_but_the_seed(backend):
    saved = []
    x = torch.randn(64, 64, device=backend.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.philox_dropout(x, 0.5)
    assert sum(tensor.nbytes for tensor in saved) == 8


@EVERYWHERE
def test_follows_torch_manual_seed(backend):
    x = torch.ones(16, 64, device=backend.device)
    torch.manual_seed(4)
    first, second = functional.philox_dropout(x, 0.5), functional.philox_dropout(x, 0.5)
    torch.manual_seed(4)
    assert torch.equal(functional.philox_dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_seeds_are_spread():
    """Neighbouring seeds give unrelated masks: each pair agrees on half of the elements, within 5 sigma."""
    x = torch.ones(64, 64)
    masks = [functional.philox_dropout(x, 0.5, seed) != 0 for seed in range(8)]
    for i in range(8):
        for j in range(i):
            agreement = float((masks[i] == masks[j]).double().mean())
            assert abs(agreement - 0.5) < 5 * 0.5 / 64
