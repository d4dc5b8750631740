"""Fourteen traps of fused LoRA code elsewhere (second table of README.md), for every op that could fall into them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_kernels
from peft_kernels import functional
from tests.backends import across
from tests.helpers import assert_within_rounding, named
from tests.ops.cases import BF16, F32, LINEAR, over, problem_of

OPS = ("lora_linear", *LINEAR)
OF_AN_X = pytest.mark.parametrize("backend", across(*OPS), indirect=True)


def outputs(y) -> tuple[torch.Tensor, ...]:
    return (y,) if isinstance(y, torch.Tensor) else y


def peft_model(*names: str, strict: bool = True, **config):
    """Two layers, one of them square, with adapters that are not zero; all of `names` active."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights=False, **config)
    base = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5))
    model = peft.get_peft_model(base, settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    model.base_model.set_adapter(list(names))
    fused = copy.deepcopy(model)
    peft_kernels.accelerate(fused, strict=strict)
    return model, fused


@OF_AN_X
def test_t01_no_dropout_with_a_seed(backend):
    """A seed without dropout is no mask of zeros, and draws nothing."""
    problem = problem_of(backend.op, device=backend.device)
    plain = outputs(problem.call())
    state = torch.get_rng_state()
    for seed in (None, 7):
        again = outputs(problem.call(dropout_p=0.0, seed=seed))
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    "backend", across("lora_linear", "lora_linear_group", "dora_linear", "lora_swiglu_mlp"), indirect=True
)
def test_t02_two_dimensions(backend, dropout_p):
    """[M, K] as well as [B, T, K]: the same numbers, the same mask."""
    problem = problem_of(backend.op, 12, dropout_p=dropout_p, device=backend.device)
    flat = outputs(problem.call())
    x = problem.tensors["x"].detach()
    for shape in ((3, 4), (2, 1, 6)):
        ys = outputs(problem.call({**problem.tensors, "x": x.view(*shape, -1)}))
        assert all(torch.equal(y.flatten(0, -2), truth) for y, truth in zip(ys, flat, strict=True))


def test_t03_disabled_merged_and_named_adapters():
    """A patched forward that looks at none of PEFT's flags: the reference pass of DPO would see the adapter."""
    stock, fused = peft_model("one", "two", strict=False)
    x = torch.randn(6, 8)
    with stock.disable_adapter(), fused.disable_adapter():
        torch.testing.assert_close(fused(x), stock(x))
    for model in (stock, fused):
        model.set_adapter("two")
        model.merge_adapter(["two"])
    torch.testing.assert_close(fused(x), stock(x))
    for model in (stock, fused):
        model.unmerge_adapter()
        model.eval()
    names = ["one", "two", "__base__"] * 2
    torch.testing.assert_close(fused(x, adapter_names=names), stock(x, adapter_names=names))


def test_t04_several_active_adapters():
    """All of them are summed, not the first alone."""
    stock, fused = peft_model("one", "two")
    x = torch.randn(6, 8)
    torch.testing.assert_close(fused(x), stock(x))
    fused.set_adapter("one")
    assert not torch.allclose(fused(x), stock(x))


@OF_AN_X
def test_t05_expectation_and_true_zeros(backend):
    """Without 1 / (1 - p) the mean of the update would be (1 - p) of it; a mask made of drop(x) != 0 would take the
    gradient from where x is 0, as after a ReLU."""
    problem = problem_of(backend.op, 34, dropout_p=0.5, device=backend.device)
    if backend.op != "lora_swiglu_mlp":  # whose activation does not commute with a mean
        problem.freeze_all_but()
        plain = outputs(problem.call(training=False))
        draws = [outputs(problem.call(seed=1000 * i)) for i in range(100)]
        for j, truth in enumerate(plain):
            samples = torch.stack([draw[j] for draw in draws]).double()
            error = (samples.mean(0) - truth).abs() / (samples.std(0) / len(draws) ** 0.5 + 1e-6)
            assert float(error.max()) < 6
    problem.freeze_all_but("x")
    problem.tensors["x"] = torch.zeros_like(problem.tensors["x"]).requires_grad_()
    assert_within_rounding(problem, problem.run())


@OF_AN_X
def test_t06_views_and_writing_in_place(backend):
    """Outputs of a Function that are views refuse `y += 1`, or lose its gradient."""
    problem = problem_of(backend.op, 12, device=backend.device)
    leaves = [tensor for tensor in problem.tensors.values() if tensor is not None]
    ys = outputs(problem.call())
    truth = torch.autograd.grad(sum((3 * y.square()).sum() for y in outputs(problem.call())), leaves)
    for y in ys:
        assert y._base is None
    squares = [y.clone().square() for y in ys]
    for y in ys:
        y.mul_(0).add_(1)
    grads = torch.autograd.grad(sum((3 * square).sum() for square in squares), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads, truth, strict=True))


@OF_AN_X
def test_t07_float32_residual_stream_under_autocast(backend):
    """x float32, weights bfloat16, autocast on: custom_fwd without a dtype would hand both to one matmul."""
    problem = problem_of(backend.op, dtype=BF16, adapter_dtype=F32, dropout_p=0.2, device=backend.device)
    x = problem.tensors["x"]
    with torch.autocast(backend.device, BF16):
        expected = outputs(problem.call())
        wide = x.detach().float().requires_grad_()
        ys = outputs(problem.call({**problem.tensors, "x": wide}))
    for y, truth in zip(ys, expected, strict=True):
        assert y.dtype == BF16
        assert torch.equal(y, truth)
    (grad,) = torch.autograd.grad(sum(y.float().sum() for y in ys), wide)
    assert grad.dtype == F32
    assert bool(grad.isfinite().all())


@over("k,n", OPS, [(9, 65), (17, 15), (33, 127)], composed=[(33, 127)], reference=[(33, 127)])
def test_t08_no_multiple_of_a_tile_with_poisoned_neighbours(backend, k, n):
    """What lies behind each row of each tensor is NaN: a load without its mask shows."""
    problem = problem_of(backend.op, 34, k, n, dropout_p=0.3, device=backend.device)
    for name, tensor in problem.tensors.items():
        if tensor is not None and tensor.ndim > 1:
            wide = tensor.detach().new_full((*tensor.shape[:-1], tensor.shape[-1] + 64), float("nan"))
            view = wide[..., : tensor.shape[-1]]
            view.copy_(tensor.detach())
            problem.tensors[name] = view.requires_grad_()
    assert_within_rounding(problem, problem.run())


@over("r", OPS, [1, 3, 8, 48, 384], cpu=[1, 3, 48], composed=[3, 384], reference=[3])
def test_t09_ranks(backend, r):
    problem = problem_of(backend.op, r=r, device=backend.device)
    assert_within_rounding(problem, problem.run())


def test_t10_square_weight_stored_in_by_out():
    """No shape tells that a square fan_in_fan_out weight is transposed."""
    peft = pytest.importorskip("peft")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, fan_in_fan_out=True)
    stock = peft.get_peft_model(nn.Sequential(Conv1D(8, 8)), settings)
    fused = copy.deepcopy(stock)
    peft_kernels.accelerate(fused, strict=True)
    x = torch.randn(6, 8)
    torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize("op", [*(op for op in OPS if op != "nf4_lora_linear"), "lora_embedding"])
def test_t11_packed_weights_are_refused(op):
    """4-bit weights are bytes of another shape: they must not reach a matmul as numbers."""
    problem = problem_of(op)
    changed = dict(problem.tensors)
    if op == "masked_lora_linear":  # whose weight is frozen, and so none of its leaves
        problem.weight = torch.zeros(problem.weight.shape, dtype=torch.uint8)
    else:
        name = "weight" if "weight" in changed else "weights.0"
        changed[name] = torch.zeros(changed[name].shape, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"dtype torch\.uint8; expected float32"):
        problem.call(changed)


@pytest.mark.parametrize("op", [*OPS, "lora_embedding"])
@pytest.mark.parametrize("rows", [3, 70_000])
def test_t12_t14_shapes_without_memory_and_past_32_bits(op, rows):
    """Stages of a pipeline are built without memory; 70,000 rows of 32,768 are more than 2^31 elements. Forward and
    backward give shapes. (The numbers past 2^31: F05.)"""
    k = 32_768 if rows > 3 else 8
    with FakeTensorMode():
        small = problem_of(op, 3, 8, 8, dropout_p=0.1)
        sizes = {8: k, 3: rows}
        made = {}
        for name, tensor in small.tensors.items():
            first = rows if name == "x" else tensor.shape[0]
            shape = (first, *tensor.shape[1:-1], k) if name in ("x", "weight", "weights.0", "lora_A") else tensor.shape
            made[name] = torch.empty(shape).requires_grad_()
        if op in ("lora_linear", "dora_linear", "lora_expert_linear"):
            y = small.call(made)
            assert y.shape == (rows, 8)
            (grad,) = torch.autograd.grad(y.sum(), made["x"])
            assert grad.shape == (rows, sizes[8])
        else:
            ys = outputs(small.call())
            grads = torch.autograd.grad(sum(y.sum() for y in ys), list(small.tensors.values()))
            assert [grad.shape for grad in grads] == [tensor.shape for tensor in small.tensors.values()]


@pytest.mark.parametrize("op", ["lora_linear_group", "dora_linear", "lora_embedding", "lora_expert_linear"])
def test_t13_scaling_is_no_constant_of_a_graph(op):
    """Layers that differ in alpha: one graph with the first number, one with any."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    problem = problem_of(op, 6, 5, 4, 2, dtype=torch.float64)
    name = "scalings" if op == "lora_linear_group" else "scaling"

    def call(scaling):
        return outputs(problem.call(**{name: scaling}))

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for scaling in (0.5, 1.5, 2.0, 4.0):
        torch.testing.assert_close(compiled(scaling), call(scaling))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_every_trap_compares_something():
    """The situations above are ones in which the adapter matters."""
    for op in OPS:
        problem = problem_of(op)
        zeros = {name: t * 0 if name.startswith("lora_") else t for name, t in problem.tensors.items()}
        frozen, adapted = named((problem.call(zeros), {})), named((problem.call(), {}))
        assert any(not torch.allclose(frozen[name], adapted[name]) for name in frozen), op
        assert callable(getattr(functional, op))
