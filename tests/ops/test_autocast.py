"""The new ops under torch.autocast and GradScaler: dtypes and accuracy of F.linear's composition."""

from __future__ import annotations

import pytest
import torch

from tests.backends import across
from tests.helpers import RATIO, named, relative_error
from tests.ops.cases import BF16, F16, F32, F64, LINEAR, over, problem_of

OF_AN_X = pytest.mark.parametrize("backend", across(*LINEAR), indirect=True)


@over(
    "x_dtype,adapter_dtype",
    LINEAR,
    [(F32, F32), (BF16, F32), (F32, BF16)],
    composed=[(F32, F32), (BF16, BF16)],
    reference=[(F32, F32), (BF16, BF16)],
)
def test_as_the_composition_under_autocast(backend, x_dtype, adapter_dtype):
    """x, W and b take the autocast dtype as in F.linear, also where their dtypes differ; gradients come back in each
    tensor's own dtype, with errors at most those of the composition of tensors cast like that."""
    problem = problem_of(backend.op, 70, 66, 301, 36, adapter_dtype=adapter_dtype, dropout_p=0.2, device=backend.device)
    problem.tensors["x"] = problem.tensors["x"].detach().to(x_dtype).requires_grad_()
    if backend.op == "dora_linear":
        problem.weight_norm = problem.norm({name: t.double() for name, t in problem.tensors.items()}).float()
    truth = named(problem.eager(F64))
    with torch.autocast(backend.device, BF16):
        y = problem.call()
    adapters = ("lora_", "magnitude")
    eager_y = problem.compose({n: t if n.startswith(adapters) else t.to(BF16) for n, t in problem.tensors.items()})
    ours = named((y, problem.gradients(y, problem.tensors)))
    eagers = named((eager_y, problem.gradients(eager_y, problem.tensors)))
    for name, value in ours.items():
        assert value.dtype == (BF16 if name.startswith("y") else eagers[name].dtype), name
        error, allowed = relative_error(value.detach(), truth[name]), relative_error(eagers[name].detach(), truth[name])
        assert error <= max(RATIO * allowed, torch.finfo(value.dtype).eps / 4), f"{name}: {error:.3e}, {allowed:.3e}"


@OF_AN_X
def test_backward_inside_the_region_keeps_float32_sums(backend):
    """Calling backward under autocast must not round the gradients' sums: the same bits as outside."""
    problem = problem_of(backend.op, device=backend.device)
    with torch.autocast(backend.device, BF16):
        y = problem.call()
        ys = (y,) if isinstance(y, torch.Tensor) else y
        total = sum(out.float().square().sum() for out in ys)
        inside = torch.autograd.grad(total, list(problem.tensors.values()), retain_graph=True)
    outside = torch.autograd.grad(total, list(problem.tensors.values()))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("op", LINEAR)
def test_grad_scaler_over_a_half_precision_base(op):
    """float32 adapters over a float16 base unscale without complaint, and an overflow skips the step."""
    ids = [row % 5 for row in range(34)]  # of many adapters: each has rows
    problem = problem_of(op, dtype=F16, adapter_dtype=F32, ids=ids)
    problem.freeze_all_but("lora_A", "lora_B", "lora_As", "lora_Bs", "magnitude")
    wanted = [tensor for tensor in problem.tensors.values() if tensor.requires_grad]
    optimizer, scaler = torch.optim.SGD(wanted, lr=0.5), torch.amp.GradScaler("cpu", init_scale=64.0)

    def loss():
        y = problem.call()
        return sum(out.float().square().mean() for out in ((y,) if isinstance(y, torch.Tensor) else y))

    expected = torch.autograd.grad(loss(), wanted)
    before = [tensor.detach().clone() for tensor in wanted]
    scaler.scale(loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    for tensor, start, grad in zip(wanted, before, expected, strict=True):
        assert grad.any()
        assert relative_error((start - tensor.detach()) / 0.5, grad) < 5e-3
    before = [tensor.detach().clone() for tensor in wanted]
    optimizer.zero_grad()
    scaler.scale(loss() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(tensor, start) for tensor, start in zip(wanted, before, strict=True))
    assert scaler.get_scale() == 32.0
