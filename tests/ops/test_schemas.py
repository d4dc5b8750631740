"""Every registered op: schema, fake kernel and aliasing are true, checked by torch.library.opcheck and by hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_kernels import ops

F32, BF16 = torch.float32, torch.bfloat16
ALL = (True,) * 5


def lora_arguments(batch=(3, 5), dtype=F32, adapter_dtype=F32, seed=None, bias=True, strided=False):
    x = torch.randn(*batch, 31).to(dtype)
    if strided:
        x = torch.randn(*batch[:-1], 31, batch[-1]).to(dtype).transpose(-1, -2)
    weight, vector = torch.randn(17, 31).to(dtype), torch.randn(17).to(dtype) if bias else None
    a, b = torch.randn(4, 31).to(adapter_dtype), torch.randn(17, 4).to(adapter_dtype)
    p = 0.25 if seed is not None else 0.0
    return x, weight, vector, a, b, 1.5, p, None if seed is None else torch.tensor([seed])


def backward_arguments(needs=ALL, **options):
    x, weight, _, a, b, scaling, p, seed = lora_arguments(**options)
    batch, r = x.shape[:-1], a.shape[0]
    grad_y, s = torch.randn(*batch, 17).to(x.dtype), torch.randn(*batch, r).to(x.dtype)
    x = x if needs[1] or needs[3] else None
    return grad_y, x, s if needs[4] else None, weight, a, b, scaling, p, seed, needs


# Per op, arguments on the CPU without autograd (autograd lives outside the registered op).
ARGUMENTS = {
    "lora_linear": [
        lora_arguments(),
        lora_arguments(batch=()),
        lora_arguments(batch=(0,)),
        lora_arguments(batch=(2, 3, 4), seed=3, bias=False),
        lora_arguments(dtype=BF16, seed=3, strided=True),
        lora_arguments(dtype=F32, adapter_dtype=BF16),
    ],
    "lora_linear_backward": [
        backward_arguments(),
        backward_arguments(batch=()),
        backward_arguments(batch=(0,)),
        backward_arguments(needs=(False, False, False, True, True), seed=3),
        backward_arguments(needs=(True, False, False, False, False), dtype=BF16, seed=3),
        backward_arguments(needs=(False, True, True, False, False), strided=True),
        backward_arguments(dtype=BF16, adapter_dtype=F32),
    ],
    "philox_dropout": [
        (torch.randn(5, 33), 0.3, torch.tensor([1]), 0),
        (torch.randn(2, 3, 16).transpose(0, 1), 0.3, torch.tensor([1]), 4),
        (torch.randn(0, 16), 0.3, torch.tensor([1]), 0),
        (torch.randn(7).bfloat16(), 0.0, torch.tensor([1]), 0),
    ],
    "splitk_reduce": [
        (torch.randn(4, 5, 6), 2.0, BF16),
        (torch.randn(0, 5), 1.0, F32),
        (torch.randn(5, 4).t(), 1.0, F32),
    ],
}
CASES = [pytest.param(name, args, id=f"{name}-{i}") for name, many in ARGUMENTS.items() for i, args in enumerate(many)]


def test_every_op_has_cases():
    """A new op without arguments here is a new op without opcheck."""
    assert set(ARGUMENTS) == set(ops.SCHEMAS)
    for name in ops.SCHEMAS:
        assert hasattr(torch.ops.peft_kernels, name)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_opcheck(name, arguments):
    op = getattr(torch.ops.peft_kernels, name).default
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_fake_kernel_tells_the_truth(name, arguments):
    """Shapes, dtypes, devices and strides of the fake results are those of the real ones."""
    op = getattr(torch.ops.peft_kernels, name).default
    with FakeTensorMode() as mode:
        fakes = op(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
    reals = op(*arguments)
    many = isinstance(reals, (tuple, list))
    for fake, real in zip(fakes if many else [fakes], reals if many else [reals], strict=True):
        assert (fake.shape, fake.dtype, fake.device, fake.stride()) == (
            real.shape, real.dtype, real.device, real.stride(),
        )  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_results_own_their_memory(name, arguments):
    """No result is a view of an argument or of another result, so a caller may write into it."""
    results = getattr(torch.ops.peft_kernels, name).default(*arguments)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    tensors = [t for t in (*arguments, *results) if isinstance(t, torch.Tensor) and t.numel()]
    addresses = [t.untyped_storage().data_ptr() for t in tensors]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_autocast_does_not_reach_into_an_op(name, arguments):
    """Called directly under autocast an op computes what it computes outside, in the dtypes that its fake says."""
    op = getattr(torch.ops.peft_kernels, name).default
    expected = op(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        results = op(*arguments)
    many = isinstance(results, (tuple, list))
    for value, truth in zip(results if many else [results], expected if many else [expected], strict=True):
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)


def test_ops_are_tagged_for_the_compiler():
    for name in ops.SCHEMAS:
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.peft_kernels, name).default.tags


def test_registered_ops_run_on_the_meta_device():
    arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in lora_arguments(batch=(6, 2), seed=1)]
    y, s = torch.ops.peft_kernels.lora_linear(*arguments)
    assert (y.device.type, y.shape, s.shape) == ("meta", (6, 2, 17), (6, 2, 4))
