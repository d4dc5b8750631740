"""Autograd of each new op: what is kept between forward and backward, what is computed, what a caller may do around it.

`lora_linear` has the same in `test_lora_linear_autograd.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.backends import across
from tests.helpers import assert_within_rounding, named
from tests.ops.cases import BF16, F32, LINEAR, NEW, over, problem_of

NEW_OPS = pytest.mark.parametrize("backend", across(*NEW), indirect=True)
OF_AN_X = pytest.mark.parametrize("backend", across(*LINEAR), indirect=True)
QUANTISED = ("nf4_linear", "nf4_lora_linear")
ADAPTERS = ("x", "lora_A", "lora_B", "lora_As", "lora_Bs", "magnitude")


def saved_by(forward):
    """The result of `forward` and every tensor that autograd keeps of it."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return forward(), saved


def kept_bytes(problem, saved) -> int:
    """What is kept beside parameters; each memory counts once, and whole."""
    parameters = {
        t.data_ptr() for name, t in problem.tensors.items() if t is not None and name not in ("x", "gate", "up")
    }
    if isinstance(frozen := getattr(problem, "weight", None), torch.Tensor):
        parameters.add(frozen.data_ptr())
    if problem.op in QUANTISED:
        parameters |= {t.data_ptr() for t in problem.q.tensors}
    kept = {t.data_ptr(): t for t in saved if t.numel() and t.data_ptr() not in parameters}
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == sum(t.nbytes for t in kept.values()), "a view"
    return sum(t.nbytes for t in kept.values())


M, K, N, R = 34, 32, 24, 4  # the group's ranks: 4, 2 and 2; the block's 4, 2, 2 and 4
SEED = 8
# Bytes of 16-bit activations, of seeds, and of what belongs to neither.
KEPT = {
    "lora_linear_group": (M * K + M * 8, 3 * SEED, 0),
    "dora_linear": (M * K + M * R + M * N, SEED, 4 * N),  # u; the norm, a vector
    "gated_activation": (2 * M * N, 0, 0),
    "lora_swiglu_mlp": (M * K + 2 * M * N + M * 6 + M * 6, 4 * SEED, 0),
    "lora_embedding": (0, 0, 8 * M),  # the indices
    "lora_expert_linear": (M * K + M * R, SEED, 4 * 3),  # the offsets
    "multi_lora_linear": (M * K + M * R, SEED, 8 * M),  # the ids
    "multi_lora_expert_linear": (M * K + M * R, SEED, 8 * M + 4 * 3),
    "nf4_linear": (0, 0, 0),
    "nf4_lora_linear": (M * K + M * R, SEED, 0),
    "masked_linear": (0, 0, 4 * N),  # the mask
    "masked_lora_linear": (M * K, SEED, 4 * N),
    "multi_mask_linear": (0, 0, 4 * 4 * N + 8 * M),  # the masks, the ids
    "sparse_delta_linear": (0, 0, 2 * 4 * 74),  # the places, ascending and by column
    "sparse_linear": (0, 0, 4 * 14),  # where its one block is
}


@over("dropout_p", NEW, [0.0, 0.25])
def test_kept_bytes(backend, dropout_p):
    """x, S and the seeds, each once for a whole group; gate and up of a block; no mask, no copy, no cast adapter."""
    problem = problem_of(
        backend.op, M, K, N, R, dtype=BF16, adapter_dtype=F32, dropout_p=dropout_p, device=backend.device
    )
    problem.freeze_all_but(*ADAPTERS, "gate", "up")
    _, saved = saved_by(problem.call)
    activations, seeds, others = KEPT[backend.op]
    assert kept_bytes(problem, saved) == 2 * activations + (seeds if dropout_p else 0) + others


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@OF_AN_X
def test_x_is_not_kept_for_frozen_down_projections(backend, dropout_p):
    """LoRA-FA: with A frozen nothing needs x, also where a block's own down projection has one that trains."""
    problem = problem_of(backend.op, dropout_p=dropout_p, update_masked=False, device=backend.device)
    problem.freeze_all_but("x", "lora_B", "lora_Bs", "magnitude", *(["lora_As.2.0"] if "mlp" in backend.op else []))
    result, saved = saved_by(problem.run)
    assert problem.tensors["x"].data_ptr() not in {t.data_ptr() for t in saved}
    assert_within_rounding(problem, result)


@OF_AN_X
def test_s_is_not_kept_for_frozen_up_projections(backend):
    problem = problem_of(backend.op, device=backend.device)
    problem.freeze_all_but("x", "lora_A", "lora_As")
    result, saved = saved_by(problem.run)
    assert not [t.shape for t in saved if t.shape in ((34, 4), (34, 6), (34, 8), (34, 1, 4))]
    assert_within_rounding(problem, result)


@pytest.mark.parametrize("backend", across("dora_linear"), indirect=True)
def test_what_the_magnitude_scales_is_not_kept_where_it_is_frozen(backend):
    """As large as y, and used for the magnitude's gradient alone."""
    problem = problem_of(backend.op, device=backend.device)
    problem.freeze_all_but("x", "lora_A", "lora_B")
    result, saved = saved_by(problem.run)
    assert result[0].shape not in [t.shape for t in saved]
    assert_within_rounding(problem, result)


@over("dropout_p", NEW, [0.0, 0.25], composed=[0.25], reference=[0.25])
def test_each_gradient_alone_and_all_but_it(backend, dropout_p):
    """The wanted gradients are right and the others are not returned: trained base weights and biases too."""
    problem = problem_of(backend.op, 10, 13, 9, 3, dropout_p=dropout_p, device=backend.device)
    names = [name for name, tensor in problem.tensors.items() if tensor is not None]
    whole = named(problem.run())
    for name in names:
        for wanted in ([name], [other for other in names if other != name]):
            if wanted:
                problem.freeze_all_but()
                for one in wanted:
                    problem.tensors[one].requires_grad_()
                _, grads = problem.run()
                assert list(grads) == wanted
                for one, grad in grads.items():
                    torch.testing.assert_close(grad, whole[one], rtol=1e-5, atol=1e-5, msg=f"{one} of {wanted}")


@NEW_OPS
def test_nothing_to_differentiate(backend):
    problem = problem_of(backend.op, device=backend.device)
    expected = problem.call()
    problem.freeze_all_but()
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            ys, saved = saved_by(problem.call)
        ys, truths = ((ys,), (expected,)) if isinstance(ys, torch.Tensor) else (ys, expected)
        for y, truth in zip(ys, truths, strict=True):
            assert torch.equal(y, truth)
            assert not y.requires_grad
        assert not saved


def leaves(problem) -> list[torch.Tensor]:
    return [tensor for tensor in problem.tensors.values() if tensor is not None]


def total(y) -> torch.Tensor:
    """A scalar in which each element of each output counts differently."""
    ys = (y,) if isinstance(y, torch.Tensor) else y
    return sum(
        (out.double() * torch.linspace(0.5, 1.5, out.numel(), device=out.device).view_as(out)).sum() for out in ys
    )


@NEW_OPS
def test_backward_twice(backend):
    """With retain_graph the second pass gives the same bits: nothing that was saved has been overwritten."""
    problem = problem_of(backend.op, dropout_p=0.3, device=backend.device)
    loss = total(problem.call())
    first = torch.autograd.grad(loss, leaves(problem), retain_graph=True)
    second = torch.autograd.grad(loss, leaves(problem))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@NEW_OPS
def test_the_caller_may_write_into_the_result(backend):
    """`y += 1`, `y[:, 0] = 0`, `y *= 2`: legal after nn.Linear, so legal here, and the gradients are right."""
    problem = problem_of(backend.op, device=backend.device)
    clean, y = problem.call(), problem.call()
    for left, right in zip(*[(out,) if isinstance(out, torch.Tensor) else out for out in (clean, y)], strict=True):
        right += 1
        right *= 2
        right[..., 0] = 0
        assert torch.equal(right[..., 1:], 2 * (left + 1)[..., 1:])
    expected = [2 * (out + 1) for out in ((clean,) if isinstance(clean, torch.Tensor) else clean)]
    expected = [torch.cat([torch.zeros_like(out[..., :1]), out[..., 1:]], -1) for out in expected]
    grads, truths = (torch.autograd.grad(total(out), leaves(problem)) for out in (y, tuple(expected)))
    assert all(torch.equal(a, b) for a, b in zip(grads, truths, strict=True))


@pytest.mark.parametrize("op", NEW)
def test_changing_a_saved_input_is_noticed(op):
    """Autograd's version counters see what was saved: no silently wrong gradient."""
    problem = problem_of(op)
    if op == "lora_embedding":
        y = problem.call()
        problem.ids.zero_()
    elif op == "nf4_linear":  # of x it keeps nothing
        y = problem.call()
        problem.q.packed.zero_()
    else:
        name = "gate" if op == "gated_activation" else "x"
        tensor = problem.tensors[name].detach().clone()
        y = problem.call({**problem.tensors, name: tensor})
        tensor.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total(y).backward()


SUM, SQUARE = (
    pytest.param(lambda y: y.sum(), id="sum"),
    pytest.param(lambda y: y.square().sum(), id="square"),
)


# The sum of what is linear in x, with a constant weight, has constant gradients: none to differentiate.
@pytest.mark.parametrize(
    ("op", "loss"),
    [pytest.param(op, *p.values, id=f"{op}-{p.id}") for op in NEW for p in (SUM, SQUARE)
     if (op, p.id) != ("nf4_linear", "sum")],
)  # fmt: skip
def test_second_derivatives_raise(op, loss):
    """What was saved counts as constant, so second derivatives would miss terms: they are refused, for each first
    gradient and with respect to each tensor it depends on."""
    problem = problem_of(op)
    y = problem.call()
    first = loss(y) if isinstance(y, torch.Tensor) else sum(map(loss, y))
    wanted = leaves(problem)
    gradients = torch.autograd.grad(first, wanted, create_graph=True)
    plain = torch.autograd.grad(
        loss(y) if isinstance(y, torch.Tensor) else sum(map(loss, y)), wanted, retain_graph=True
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=f"{op}: tried to differentiate twice"):
            torch.autograd.grad(gradient.square().sum(), wanted, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
@OF_AN_X
def test_checkpointing_recomputes_the_same_masks(backend, reentrant):
    """Seeds drawn from torch's generator: forward, backward and recomputation agree, whatever is drawn in between."""
    problem = problem_of(backend.op, dropout_p=0.4, device=backend.device)
    names = [name for name, tensor in problem.tensors.items() if tensor is not None]

    def forward(*tensors):
        y = problem.call({**problem.tensors, **dict(zip(names, tensors, strict=True))}, seed=None)
        return y if isinstance(y, torch.Tensor) else torch.cat(y, -1)

    results = []
    for run in (forward, lambda *t: checkpoint(forward, *t, use_reentrant=reentrant)):
        tensors = [problem.tensors[name].detach().requires_grad_() for name in names]
        torch.manual_seed(3)
        y = run(*tensors)
        torch.rand(7)  # moves the generator on, as the layers between forward and recomputation do
        total(y).backward()
        results.append([y.detach(), *(tensor.grad for tensor in tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", NEW)
def test_backward_uses_what_the_hooks_return(op):
    """Hooks that zero what is saved make the gradients zero: proof that nothing is kept past save_for_backward."""
    problem = problem_of(op, bias=False, dropout_p=0.2)
    if op == "dora_linear":
        problem.weight_norm = torch.ones(problem.n)
    # Of an embedding's weight it is that of y, at the indices; of a delta's x that with W = 0.
    exempt = {"lora_embedding": ("weight",), "sparse_delta_linear": ("x",)}.get(op, ())
    # Vectors are seeds, offsets, magnitudes; the bytes of a 4-bit weight are one, but with blocks of absmax 0.
    keep = 1 if op not in QUANTISED else -1
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach() if t.ndim == keep or t.dtype == torch.int64 else t.detach() * 0, lambda t: t
    ):
        y = problem.call()
    grads = torch.autograd.grad(total(y), leaves(problem))
    for name, grad in zip(problem.tensors, grads, strict=False):
        assert not grad.any() or name in exempt, name


@NEW_OPS
def test_saved_tensors_may_be_moved(backend):
    """save_on_cpu packs and unpacks copies: the backward pass must use what it is handed back."""
    problem = problem_of(backend.op, dropout_p=0.3, device=backend.device)
    plain = torch.autograd.grad(total(problem.call()), leaves(problem))
    with torch.autograd.graph.save_on_cpu():
        y = problem.call()
    moved = torch.autograd.grad(total(y), leaves(problem))
    assert all(torch.equal(a, b) for a, b in zip(plain, moved, strict=True))


@pytest.mark.parametrize("op", NEW)
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_functional_transforms_raise(op, transform):
    """torch.func has no rule for the ops: they say so instead of computing something else."""
    problem = problem_of(op)
    name = next(iter(problem.tensors))
    tensors = {key: tensor if tensor is None else tensor.detach() for key, tensor in problem.tensors.items()}

    def forward(tensor):
        y = problem.call({**tensors, name: tensor})
        return (y if isinstance(y, torch.Tensor) else y[0]).sum()

    transforms = {
        "vmap": lambda: torch.func.vmap(forward)(tensors[name][None]),
        "grad": lambda: torch.func.grad(forward)(tensors[name]),
    }
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)setup_context|vmap"):
        transforms[transform]()
