"""Every registered op: schema, fake kernel and aliasing are true, checked by torch.library.opcheck and by hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from peft_kernels import ops
from tests.ops.arguments import ARGUMENTS, POOL, lora_arguments

CASES = [pytest.param(name, args, id=f"{name}-{i}") for name, many in ARGUMENTS.items() for i, args in enumerate(many)]


def test_every_op_has_cases():
    """A new op without arguments here is a new op without opcheck."""
    assert set(ARGUMENTS) == set(ops.SCHEMAS)
    for name in ops.SCHEMAS:
        assert hasattr(torch.ops.peft_kernels, name)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_opcheck(name, arguments):
    op = getattr(torch.ops.peft_kernels, name).default
    if any(argument is POOL[0] for argument in arguments):
        # Its table holds addresses of its memory: the other tests of opcheck run the op on copies of it. What they
        # find, the tests below find as well, but for an argument that is written into.
        torch.library.opcheck(op, arguments, test_utils="test_autograd_registration")
    elif arguments is ARGUMENTS[name][0]:
        torch.library.opcheck(op, arguments)
    else:  # traced once for each op: of the other arguments the fake kernel is all that a compiler could see
        torch.library.opcheck(
            op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


def flat(values) -> list:
    """What is in nested lists, one after another; nothing of an op that returns nothing."""
    if values is None:
        return []
    if not isinstance(values, (tuple, list)):
        return [values]
    return [one for value in values for one in flat(value)]


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_fake_kernel_tells_the_truth(name, arguments):
    """Shapes, dtypes, devices and strides of the fake results are those of the real ones."""
    op = getattr(torch.ops.peft_kernels, name).default
    with FakeTensorMode() as mode:
        fakes = op(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    for fake, real in zip(flat(fakes), flat(op(*arguments)), strict=True):
        assert (fake.shape, fake.dtype, fake.device, fake.stride()) == (
            real.shape, real.dtype, real.device, real.stride(),
        )  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_results_own_their_memory(name, arguments):
    """No result is a view of an argument or of another result, so a caller may write into it."""
    results = flat(getattr(torch.ops.peft_kernels, name).default(*arguments))
    tensors = [t for t in (*flat(arguments), *results) if isinstance(t, torch.Tensor) and t.numel()]
    addresses = [t.untyped_storage().data_ptr() for t in tensors]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_autocast_does_not_reach_into_an_op(name, arguments):
    """Called directly under autocast an op computes what it computes outside, in the dtypes that its fake says."""
    op = getattr(torch.ops.peft_kernels, name).default
    expected = op(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        results = op(*arguments)
    for value, truth in zip(flat(results), flat(expected), strict=True):
        assert value.dtype == truth.dtype
        assert torch.equal(value, truth)


def test_ops_are_tagged_for_the_compiler():
    for name in ops.SCHEMAS:
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.peft_kernels, name).default.tags


def test_registered_ops_run_on_the_meta_device():
    arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in lora_arguments(batch=(6, 2), seed=1)]
    y, s = torch.ops.peft_kernels.lora_linear(*arguments)
    assert (y.device.type, y.shape, s.shape) == ("meta", (6, 2, 17), (6, 2, 4))
