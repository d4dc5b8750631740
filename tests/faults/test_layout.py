"""Faults of others in layout, shape and index width: F01 to F15 (README.md lists what arrives with later ops)."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import FusedLoRALinear, functional
from tests.faults.problems import EVERYWHERE, ON_GPU, assert_close, gradients, lora, operands, plain

NAN = float("nan")


@pytest.mark.parametrize("how", ["transposed", "sliced", "split", "reversed"])
@EVERYWHERE
def test_f01_non_contiguous_input(backend, how):
    """x as a transpose, a column slice, a chunk of fused qkv, a flipped sequence: never read in physical order."""
    big, weight, a, b = operands(24, 72, 20, 3, backend.device)
    x = {
        "transposed": big[:, :24].t(),
        "sliced": big[:, 5:67:3][:, :20].repeat(1, 2)[:, ::2],
        "split": big.split(24, dim=1)[1],
        "reversed": big.flip(1)[:, ::3],
    }[how]
    k = x.shape[1]
    tensors = [x, weight[:, :k], a[:, :k], b]
    assert how == "reversed" or not x.is_contiguous()
    assert_close([lora(*tensors)], [plain(*[t.contiguous() for t in tensors])])
    assert_close(gradients(lora, tensors), gradients(plain, [t.contiguous() for t in tensors]))


@EVERYWHERE
def test_f02_row_stride_of_a_padded_weight(backend):
    """A vocabulary padded to 64 rows and columns, sliced to its real size: right dtype and rank, odd stride(0)."""
    x, _, a, b = operands(9, 30, 50, 4, backend.device)
    padded = torch.full((64, 64), NAN, device=backend.device)
    weight = padded[:50, :30]
    weight.copy_(operands(9, 30, 50, 4, backend.device)[1])
    rows = torch.full((9, 37), NAN, device=backend.device)[:, 4:34]
    rows.copy_(x)
    assert_close([lora(rows, weight, a, b)], [plain(x, weight.clone(), a, b)])
    assert_close(gradients(lora, (rows, weight, a, b)), gradients(plain, (x, weight.clone(), a, b)))


@EVERYWHERE
def test_f03_expanded_gradient(backend):
    """`.sum().backward()` hands over strides (0, 0); a mean over one dimension hands over (1, 0)."""
    tensors = operands(10, 24, 18, 3, backend.device)
    strides = []
    for reduce in (torch.sum, lambda y: y.mean(0)[3], lambda y: y.t().contiguous()[2].sum()):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = lora(*leaves)
        y.register_hook(lambda grad: strides.append(grad.stride()))
        expected = [t.clone().requires_grad_() for t in tensors]
        reduce(y).backward()
        reduce(plain(*expected)).backward()
        assert_close([t.grad for t in leaves], [t.grad for t in expected])
    assert (0, 0) in strides


@EVERYWHERE
def test_f04_gradient_per_token(backend):
    """Every token has its own loss weight: multiplying by grad_output[0] alone would pass for a mean loss."""
    tensors = operands(13, 24, 18, 3, backend.device)
    weights = torch.linspace(-2, 5, 13, device=backend.device)[:, None]
    assert_close(gradients(lora, tensors, weights), gradients(plain, tensors, weights))


@pytest.mark.parametrize("row", [2**31 // 24 - 1, 2**31 // 24 + 5, 2**32 // 24, 2**40])
def test_f05_offsets_of_the_mask_beyond_32_bits(row):
    """The dropout counter of rows past 2^31 and 2^32 elements does not wrap around to that of earlier rows."""
    seed = torch.tensor([5])
    ones = torch.ones(64, 24)
    there = torch.ops.peft_kernels.philox_dropout(ones, 0.5, seed, row)
    for wrapped in (0, row % 2**31, row % (2**31 // 24), row * 24 % 2**32 // 24):
        if wrapped != row:
            assert not torch.equal(there, torch.ops.peft_kernels.philox_dropout(ones, 0.5, seed, wrapped))
    assert torch.equal(there[7:], torch.ops.peft_kernels.philox_dropout(ones[7:], 0.5, seed, row + 7))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@ON_GPU
def test_f05_row_offsets_beyond_32_bits(backend, dropout_p):
    """87,383 rows of 24,576 elements pass 2^31: the last rows equal the same rows computed alone."""
    x, weight, a, b = operands(64, 24576, 64, 16, "cuda", torch.bfloat16)
    many = torch.zeros(87383 + 64, 24576, device="cuda", dtype=torch.bfloat16)
    many[-64:] = x
    y = lora(many, weight, a, b, dropout_p=dropout_p, seed=3 if dropout_p else None)
    assert not y[:-64].any()
    if dropout_p:
        dropped = torch.ops.peft_kernels.philox_dropout(x, dropout_p, torch.tensor([3], device="cuda"), 87383)
        expected = torch.nn.functional.linear(x, weight) + (dropped @ a.t()) @ b.t()
    else:
        expected = plain(x, weight, a, b)
    torch.testing.assert_close(y[-64:].float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("k", [1, 7, 15, 17, 33, 63, 65, 130])
@EVERYWHERE
def test_f07_tails_with_poisoned_neighbours(backend, k):
    """K, N and r that fill no block, every operand surrounded by NaN in memory: no tail reads its neighbour."""

    def surrounded(tensor):
        pool = torch.full((tensor.numel() + 512,), NAN, device=backend.device, dtype=tensor.dtype)
        inside = pool[256 : 256 + tensor.numel()].view(tensor.shape)
        return inside.copy_(tensor)

    tensors = operands(11, k, k + 2, 3, backend.device)
    poisoned = [surrounded(t) for t in tensors]
    weights = surrounded(torch.ones(11, k + 2, device=backend.device))
    assert_close([lora(*poisoned)], [plain(*tensors)])
    assert_close(gradients(lora, poisoned, weights), gradients(plain, tensors))


@pytest.mark.parametrize("shape", [(1, 16, 16), (15, 31, 33), (17, 63, 65), (127, 40, 24)])
@EVERYWHERE
def test_f08_nothing_is_written_past_the_ends(backend, shape):
    """Shapes that divide by neither 16, 32 nor 64: the memory around every operand keeps its bytes."""
    m, k, n = shape
    pools, tensors = [], []
    for tensor in operands(m, k, n, 5, backend.device):
        pool = torch.full((tensor.numel() + 512,), 7.0, device=backend.device)
        inside = pool[256 : 256 + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        pools.append((pool, pool.clone()))
        tensors.append(inside)
    gradients(lora, tensors)
    gradients(lambda *t: lora(*t, dropout_p=0.5, seed=1), tensors)
    assert all(torch.equal(pool, before) for pool, before in pools)


@pytest.mark.parametrize("r", [1, 2, 7, 8, 16, 32, 33, 64, 96, 257, 384, 512])
@EVERYWHERE
def test_f09_every_rank(backend, r):
    """Rank 32 wrong, rank 8 too small, h_out 7392 "no suitable kernel": here every rank and width computes."""
    tensors = operands(5, 40, 7392 if r in (8, 33) else 44, r, backend.device)
    assert_close([lora(*tensors)], [plain(*tensors)])
    assert_close(gradients(lora, tensors), gradients(plain, tensors), factor=5)


@EVERYWHERE
def test_f10_more_rows_than_a_grid_dimension(backend):
    """More than 65,535 rows: neither an error nor a kernel that silently does nothing."""
    tensors = operands(70001, 8, 5, 2, backend.device)
    assert_close([lora(*tensors)], [plain(*tensors)])
    assert_close(gradients(lora, tensors), gradients(plain, tensors), factor=50)


@pytest.mark.gpu
@ON_GPU
def test_f10_more_tiles_than_a_grid_dimension(backend):
    """2^23 + 1 rows are more than 65,535 tiles of 128 rows."""
    x, weight, a, b = operands(2**23 + 1, 16, 16, 2, "cuda")
    assert_close([lora(x, weight, a, b)], [plain(x, weight, a, b)])
    (grad,) = torch.autograd.grad(lora(x.requires_grad_(), weight, a, b)[-1].sum(), x)
    assert not grad[:-1].any()
    assert_close([grad[-1]], [(weight + b @ a).sum(0)])


@pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24), (0, 0, 24)])
@EVERYWHERE
def test_f11_no_rows(backend, shape):
    """An empty batch gives an empty result and zero gradients for the parameters, not None and no launch error."""
    _, weight, a, b = operands(1, 24, 18, 3, backend.device)
    x = torch.empty(shape, device=backend.device)
    for options in ({}, {"dropout_p": 0.5, "seed": 1}):
        leaves = [t.detach().requires_grad_() for t in (x, weight, a, b)]
        y = lora(*leaves, **options)
        assert y.shape == (*shape[:-1], 18)
        grads = torch.autograd.grad(y.sum(), leaves)
        assert [g.shape for g in grads] == [t.shape for t in leaves]
        assert all(not g.any() for g in grads)


@pytest.mark.parametrize(("k", "n"), [(0, 6), (6, 0), (0, 0)])
@EVERYWHERE
def test_f11_no_features(backend, k, n):
    """K = 0 sums nothing: the bias remains. N = 0 has no output."""
    x, weight, a, b = operands(4, k, n, 2, backend.device)
    bias = torch.arange(float(n), device=backend.device)
    leaves = [t.detach().requires_grad_() for t in (x, weight, a, b, bias)]
    y = functional.lora_linear(*leaves[:4], bias=leaves[4])
    assert torch.equal(y.detach(), bias.expand(4, n))
    grads = torch.autograd.grad(y.sum(), leaves)
    assert torch.equal(grads[4], torch.full((n,), 4.0, device=backend.device))
    assert all(not g.any() for g in grads[:4])


def test_f12_weight_stored_in_by_out():
    """GPT-2's Conv1D keeps [in, out]. Square weights raise no shape error anywhere: only values can tell."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    conv = conv1d(24, 24)
    torch.nn.init.normal_(conv.weight)
    layer = FusedLoRALinear.from_linear(conv, r=3)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), conv(x))
    torch.nn.init.normal_(layer.lora_B)
    update = layer.scaling * (x @ layer.lora_A.t()) @ layer.lora_B.t()
    torch.testing.assert_close(layer(x), conv(x) + update, rtol=1e-4, atol=1e-4)
    layer.merge()
    torch.testing.assert_close(layer(x), conv(x) + update, rtol=1e-4, atol=1e-4)
    assert layer.weight.shape == (24, 24)


@pytest.mark.parametrize("m", [2, 5, 16, 17, 64])
@EVERYWHERE
def test_f15_a_row_alone_and_in_a_batch(backend, m):
    """Decode (one row) and prefill (many) are one function: each row alone gives what it gives in the batch."""
    x, weight, a, b = operands(m, 40, 24, 4, backend.device)
    together = lora(x, weight, a, b)
    alone = torch.cat([lora(row[None], weight, a, b) for row in x])
    vectors = torch.stack([lora(row, weight, a, b) for row in x])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vectors, together, rtol=1e-5, atol=1e-6)
