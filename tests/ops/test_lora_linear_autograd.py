"""`lora_linear` and autograd: what is saved, what is computed, and what a caller may do around it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from peft_kernels import functional, use_backend
from tests.backends import everywhere
from tests.helpers import GRADS, LoraProblem, assert_within_rounding

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("lora_linear"), indirect=True)
SUBSETS = [s for size in range(1, 6) for s in itertools.combinations(GRADS, size)]


def call(problem: LoraProblem, tensors=None, seed=None):
    t = tensors or problem.tensors
    return functional.lora_linear(
        t["x"], t["weight"], t["lora_A"], t["lora_B"], bias=t["bias"],
        scaling=problem.scaling, dropout_p=problem.dropout_p, seed=seed,
    )  # fmt: skip


def freeze_all_but(problem: LoraProblem, wanted) -> None:
    for name, tensor in problem.tensors.items():
        tensor.requires_grad_(name in wanted)


def saved_by(forward) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The result of `forward` and every tensor that autograd keeps of it."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return forward(), saved


@pytest.mark.parametrize(
    ("wanted", "dropout_p"),
    [*((wanted, 0.25 * (i % 2)) for i, wanted in enumerate(SUBSETS)), (GRADS, 0.25)],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
@EVERYWHERE
def test_any_subset_of_gradients(backend, dropout_p, wanted):
    """The wanted gradients are right, the others are not returned, x and S are kept only for those that use them."""
    problem = LoraProblem((2, 9), 31, 23, 4, dropout_p=dropout_p, device=backend.device)
    freeze_all_but(problem, wanted)
    (y, grads), saved = saved_by(problem.run)
    assert set(grads) == set(wanted)
    assert_within_rounding_of_subset(problem, (y, grads))
    addresses = [tensor.data_ptr() for tensor in saved]
    assert (problem.tensors["x"].data_ptr() in addresses) == bool({"lora_A", "weight"} & set(wanted))
    assert ((2, 9, 4) in [tensor.shape for tensor in saved]) == ("lora_B" in wanted)


def assert_within_rounding_of_subset(problem: LoraProblem, result) -> None:
    """The oracle differentiates with respect to everything, whatever the problem has frozen."""
    for tensor in problem.tensors.values():
        tensor.requires_grad_()
    assert_within_rounding(problem, result)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@EVERYWHERE
def test_saves_only_x_and_s(backend, dropout_p):
    """Between forward and backward live x, S [M, r] and 8 bytes of seed: no mask, no copy of x, no cast adapter."""
    problem = LoraProblem(
        (4, 8), 64, 48, 3, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=dropout_p, device=backend.device
    )
    freeze_all_but(problem, ("x", "lora_A", "lora_B"))
    _, saved = saved_by(lambda: call(problem))
    parameters = {problem.tensors[name].data_ptr() for name in ("weight", "lora_A", "lora_B")}
    kept = {tensor.data_ptr(): tensor for tensor in saved if tensor.data_ptr() not in parameters}
    expected = 2 * (32 * 64 + 32 * 3) + (8 if dropout_p else 0)
    assert sum(tensor.nbytes for tensor in kept.values()) == expected
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) == expected, "a view of something larger"


@pytest.mark.parametrize("wanted", [("lora_A", "lora_B"), ("x",), ("lora_B",), ("lora_A", "lora_B", "x")], ids="+".join)
def test_what_nobody_wants_is_not_computed(wanted):
    """The floating-point operations of the backward pass are exactly those of the wanted gradients."""
    m, k, n, r = 32, 48, 40, 4
    problem = LoraProblem(m, k, n, r)
    freeze_all_but(problem, wanted)
    with use_backend("composed"):  # its matmuls are PyTorch's, which the profiler sees
        y = call(problem)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        y.backward(problem.grad_y)
    flops = 0
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            flops += 2 * left[0] * left[1] * right[1]
    costs = {"x": 2 * m * n * k + 2 * m * r * k, "lora_A": 2 * m * r * k, "lora_B": 2 * m * n * r}
    grad_s = 2 * m * n * r if {"x", "lora_A"} & set(wanted) else 0
    assert flops == grad_s + sum(costs[name] for name in wanted)


@EVERYWHERE
def test_backward_twice(backend):
    """With retain_graph the second pass gives the same bits: nothing that was saved has been overwritten."""
    problem = LoraProblem(33, 31, 17, 3, dropout_p=0.3, device=backend.device)
    wanted = list(problem.tensors.values())
    y = call(problem, seed=5)
    first = torch.autograd.grad(y, wanted, problem.grad_y, retain_graph=True)
    second = torch.autograd.grad(y, wanted, problem.grad_y)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("batch", [(6,), (2, 3), (2, 1, 3)])
@EVERYWHERE
def test_the_caller_may_write_into_the_result(backend, batch):
    """`y += 1`, `y[mask] = 0`, `y *= c`: legal after nn.Linear, so legal here, with the right gradients."""
    problem = LoraProblem(batch, 31, 17, 3, device=backend.device)
    y = call(problem)
    expected = y.detach().clone()
    y += 1
    y *= 2
    y[..., 0] = 0
    assert torch.equal(y[..., 1:].detach(), (2 * (expected + 1))[..., 1:])
    y.backward(problem.grad_y)
    problem.grad_y = problem.grad_y * 2
    problem.grad_y[..., 0] = 0
    grads = {name: tensor.grad for name, tensor in problem.tensors.items()}
    assert_within_rounding(problem, (expected, grads))


def test_changing_a_saved_input_is_noticed():
    """Autograd's version counters see the saved x: no silently wrong gradient."""
    problem = LoraProblem(6, 31, 17, 3)
    x = problem.tensors["x"].detach().clone()
    y = call(problem, {**problem.tensors, "x": x})
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("loss", ["sum", "square"])
@pytest.mark.parametrize("of", ["x", "lora_A", "lora_B", "weight"])
def test_second_derivatives_raise(of, loss):
    """S is saved as a constant, so a second derivative would miss terms: it is refused, also where the incoming
    gradient is a constant and the penalty is only one term of the loss."""
    problem = LoraProblem(6, 31, 17, 3)
    y = call(problem)
    first = y.sum() if loss == "sum" else y.square().sum()
    (gradient,) = torch.autograd.grad(first, problem.tensors[of], create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(RuntimeError, match="lora_linear: tried to differentiate twice"):
        (y.mean() + gradient.square().sum()).backward()
    with pytest.raises(RuntimeError, match="lora_linear: tried to differentiate twice"):
        torch.autograd.grad(gradient.square().sum(), problem.tensors["lora_B"])


def test_create_graph_alone_is_harmless():
    """The first derivatives are the same under create_graph=True, also through checkpointing."""
    problem = LoraProblem(6, 31, 17, 3)
    wanted = list(problem.tensors.values())
    plain = torch.autograd.grad(call(problem), wanted, problem.grad_y)
    for y in (call(problem), checkpoint(lambda: call(problem), use_reentrant=False)):
        again = torch.autograd.grad(y, wanted, problem.grad_y, create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@EVERYWHERE
def test_without_gradients(backend, mode):
    problem = LoraProblem((3, 5), 31, 17, 3, device=backend.device)
    expected = call(problem).detach()
    with mode():
        y, saved = saved_by(lambda: call(problem))
    assert torch.equal(y, expected)
    assert not y.requires_grad
    assert not saved


@pytest.mark.parametrize("reentrant", [False, True])
@EVERYWHERE
def test_checkpointing_recomputes_the_same_mask(backend, reentrant):
    problem = LoraProblem((4, 9), 31, 17, 3, dropout_p=0.4, device=backend.device)
    names = list(problem.tensors)

    def forward(*tensors):
        return call(problem, dict(zip(names, tensors, strict=True)))

    def gradients(run):
        torch.manual_seed(3)
        y = run()
        return y.detach(), torch.autograd.grad(y, list(problem.tensors.values()), problem.grad_y, retain_graph=True)

    tensors = list(problem.tensors.values())
    y, plain = gradients(lambda: forward(*tensors))
    if reentrant:  # reentrant checkpointing supports .backward() only

        def run():
            torch.manual_seed(3)
            again = checkpoint(forward, *tensors, use_reentrant=True)
            torch.rand(7)  # moves the generator on, as the layers between forward and recomputation do
            again.backward(problem.grad_y)
            return again.detach(), [tensor.grad for tensor in tensors]

        again, recomputed = run()
    else:
        again, recomputed = gradients(lambda: checkpoint(forward, *tensors, use_reentrant=False))
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_selective_checkpointing_sees_the_op_by_name(monkeypatch):
    """A policy that saves `peft_kernels::lora_linear` runs it once; one that recomputes it runs it twice."""
    from peft_kernels.kernels.composed import lora_linear as composed

    runs = []
    forward = composed.forward
    monkeypatch.setattr(composed, "forward", lambda *args: runs.append(1) or forward(*args))
    problem = LoraProblem(6, 31, 17, 3)
    with use_backend("composed"):
        _count_runs_under_policies(problem, runs)


def _count_runs_under_policies(problem, runs):
    plain = torch.autograd.grad(call(problem).sin().sum(), problem.tensors["lora_B"])[0]
    for policy, expected in ((CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)):
        runs.clear()

        def decide(ctx, op, *args, policy=policy, **kwargs):
            ours = op is torch.ops.peft_kernels.lora_linear.default
            return policy if ours else CheckpointPolicy.PREFER_RECOMPUTE

        y = checkpoint(
            lambda: call(problem).sin(),
            use_reentrant=False,
            context_fn=lambda decide=decide: create_selective_checkpoint_contexts(decide),
        )
        assert torch.equal(torch.autograd.grad(y.sum(), problem.tensors["lora_B"])[0], plain)
        assert len(runs) == expected, policy


def test_saved_tensor_hooks_may_move_what_is_saved():
    """save_on_cpu packs and unpacks copies: the backward pass must use what it is handed back."""
    problem = LoraProblem((3, 5), 31, 17, 3, dropout_p=0.3)
    plain = torch.autograd.grad(call(problem, seed=1), list(problem.tensors.values()), problem.grad_y)
    with torch.autograd.graph.save_on_cpu():
        y = call(problem, seed=1)
    moved = torch.autograd.grad(y, list(problem.tensors.values()), problem.grad_y)
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


def test_backward_uses_what_the_hooks_return():
    """Hooks that compress to bfloat16 change the gradients: proof that nothing is kept past save_for_backward."""
    problem = LoraProblem((3, 5), 31, 17, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() * 0, lambda t: t):
        y = call(problem)
    grads = torch.autograd.grad(y, list(problem.tensors.values()), problem.grad_y)
    assert all(not grad.any() for name, grad in zip(problem.tensors, grads, strict=True) if name != "bias")


def test_gradients_accumulate():
    problem = LoraProblem(6, 31, 17, 3)
    for _ in range(3):
        call(problem).backward(problem.grad_y)
    _, once = problem.run()
    for name, tensor in problem.tensors.items():
        torch.testing.assert_close(tensor.grad, 3 * once[name])


def test_grad_scaler_over_a_half_precision_base():
    """float32 adapters over a float16 base unscale without complaint, and an overflow skips the step."""
    problem = LoraProblem(40, 31, 17, 3, dtype=torch.float16, adapter_dtype=torch.float32)
    freeze_all_but(problem, ("lora_A", "lora_B"))
    wanted = [problem.tensors["lora_A"], problem.tensors["lora_B"]]
    optimizer = torch.optim.SGD(wanted, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = [tensor.detach().clone() for tensor in wanted]
    expected = torch.autograd.grad(call(problem).float().square().mean(), wanted)

    scaler.scale(call(problem).float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    for tensor, start, grad in zip(wanted, before, expected, strict=True):
        torch.testing.assert_close(tensor.detach(), start - 0.5 * grad, rtol=2e-3, atol=1e-4)

    before = [tensor.detach().clone() for tensor in wanted]
    optimizer.zero_grad()
    scaler.scale(call(problem).float().sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(tensor, start) for tensor, start in zip(wanted, before, strict=True))
    assert scaler.get_scale() == 128.0


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_functional_transforms_raise(transform):
    """torch.func has no rule for the op: it says so instead of computing something else."""
    problem = LoraProblem((3, 5), 31, 17, 3)
    t = {name: tensor.detach() for name, tensor in problem.tensors.items()}

    def forward(x):
        return call(problem, {**t, "x": x}).sum()

    transforms = {
        "vmap": lambda: torch.func.vmap(forward)(t["x"]),
        "grad": lambda: torch.func.grad(forward)(t["x"]),
        "jvp": lambda: torch.func.jvp(forward, (t["x"],), (t["x"],)),
    }
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)setup_context|jvp|vmap"):
        transforms[transform]()
