"""Autograd of the ops on 4-bit weights: what is kept, by reference; weights that move, are copied, pickled, compiled.

What holds for all ops is in `test_autograd.py` and `test_compile.py`.
"""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from peft_kernels import functional
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.problems import Draw, nf4_weight
from tests.backends import across, everywhere
from tests.helpers import assert_within_rounding
from tests.ops.cases import BF16, F32, F64
from tests.ops.test_autograd import saved_by, total
from tests.problems import Nf4LoraProblem, Nf4Problem

LINEAR = pytest.mark.parametrize("backend", everywhere("nf4_linear"), indirect=True)
LORA = pytest.mark.parametrize("backend", everywhere("nf4_lora_linear"), indirect=True)
BOTH = pytest.mark.parametrize("backend", across("nf4_linear", "nf4_lora_linear"), indirect=True)
CLASSES = {"nf4_linear": Nf4Problem, "nf4_lora_linear": Nf4LoraProblem}
OPS = pytest.mark.parametrize("op", CLASSES)
SUBSETS = [s for size in range(1, 5) for s in itertools.combinations(("x", "bias", "lora_A", "lora_B"), size)]


@pytest.mark.parametrize("nested", [False, True])
@BOTH
def test_the_weight_is_kept_by_reference(backend, nested):
    """Of the weight autograd keeps its own tensors, whole, and nothing that was decoded from them."""
    problem = CLASSES[backend.op](9, 67, 33, dtype=BF16, nested=nested, part="corner", device=backend.device)
    _, saved = saved_by(problem.call)
    own = {tensor.data_ptr() for tensor in problem.q.tensors}
    assert own <= {tensor.data_ptr() for tensor in saved}
    beside = [tensor for tensor in saved if tensor.data_ptr() not in own]
    assert all(tensor.numel() < 33 * 67 for tensor in beside)


@LINEAR
def test_nothing_is_kept_for_the_bias_alone(backend):
    problem = Nf4Problem(9, 67, 33, device=backend.device)
    problem.freeze_all_but("bias")
    (y, grads), saved = saved_by(problem.run)
    assert not saved
    assert list(grads) == ["bias"]
    problem.freeze_all_but("x", "bias")
    assert_within_rounding(problem, (y, {"bias": grads["bias"]}))


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@LORA
def test_any_subset_of_gradients(backend, wanted):
    """x is kept for A's gradient alone, S for B's."""
    problem = Nf4LoraProblem((2, 9), 31, 23, 4, dropout_p=0.25, blocksize=32, part="columns", device=backend.device)
    problem.freeze_all_but(*wanted)
    (y, grads), saved = saved_by(problem.run)
    assert set(grads) == set(wanted)
    assert (problem.tensors["x"].data_ptr() in [t.data_ptr() for t in saved]) == ("lora_A" in wanted)
    assert ((2, 9, 4) in [t.shape for t in saved]) == ("lora_B" in wanted)
    problem.freeze_all_but("x", "bias", "lora_A", "lora_B")
    assert_within_rounding(problem, (y, grads))


@pytest.mark.parametrize("part", ["whole", "corner"])
@LINEAR
def test_gradcheck_of_parts(backend, part):
    problem = Nf4Problem((2, 3), 5, 4, F64, part=part, blocksize=32, device=backend.device)
    backend.skip_unless_runnable(problem.dispatched())
    leaves = [problem.tensors["x"], problem.tensors["bias"]]
    assert torch.autograd.gradcheck(lambda x, bias: functional.nf4_linear(x, problem.q, bias), leaves)


@OPS
def test_a_weight_that_was_moved_and_changed_between_the_passes(op):
    """What hooks hand back is what backward multiplies with: here the weight of another layer. (A weight kept past
    save_for_backward is the one of before: bitsandbytes' #2034.)"""
    problem, other = (CLASSES[op](9, 67, 33, seed=seed, bias=False) for seed in (1, 2))
    others = {t.data_ptr(): u for t, u in zip(problem.q.tensors, other.q.tensors, strict=True)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: others.get(t.data_ptr(), t), lambda t: t):
        y = problem.call()
    (grad_x,) = torch.autograd.grad(y, problem.tensors["x"], problem.grad_y)
    problem.q = other.q
    (expected,) = torch.autograd.grad(problem.call(), problem.tensors["x"], problem.grad_y)
    assert torch.equal(grad_x, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@LINEAR
def test_checkpointing(backend, reentrant):
    problem = Nf4Problem(9, 67, 33, device=backend.device)

    def forward(x, bias):
        return problem.call({"x": x, "bias": bias})

    results = []
    for run in (forward, lambda *t: checkpoint(forward, *t, use_reentrant=reentrant)):
        leaves = [tensor.detach().requires_grad_() for tensor in problem.tensors.values()]
        y = run(*leaves)
        total(y).backward()
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
@pytest.mark.parametrize("nested", [False, True])
def test_copies_of_a_weight(how, nested):
    """All of it comes along, and a deep copy shares nothing."""
    q = nf4_weight(Draw("cpu"), 33, 67, nested=nested, dtype=BF16).rows(2, 30)
    clone = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda q: pickle.loads(pickle.dumps(q))}[how](q)
    assert type(clone) is NF4Weight
    assert (clone.layout, clone.shape, clone.dtype) == (q.layout, q.shape, q.dtype)
    assert torch.equal(clone.dequantize(), q.dequantize())
    shared = [a.data_ptr() == b.data_ptr() for a, b in zip(q.tensors, clone.tensors, strict=True)]
    assert shared == [how == "copy"] * len(q.tensors)


def test_to_moves_every_tensor():
    q = nf4_weight(Draw("cpu"), 33, 67).rows(2, 30)
    moved = q.to("meta")
    assert [tensor.device.type for tensor in moved.tensors] == ["meta"] * 5
    assert (moved.layout, moved.dtype, moved.shape) == (q.layout, q.dtype, q.shape)
    assert all(a is b for a, b in zip(q.to("cpu").tensors, q.tensors, strict=True))


def test_weights_quantised_under_inference_mode_do_not_spoil_later_ones():
    """Nothing shared between weights may stay an inference tensor, which autograd could not save."""
    with torch.inference_mode():
        functional.nf4_quantize(torch.randn(40, 64))
    x = torch.randn(3, 64, requires_grad=True)
    functional.nf4_linear(x, functional.nf4_quantize(torch.randn(40, 64))).sum().backward()
    assert x.grad is not None


# Without memory, and compiled -------------------------------------------------------------------------------------


@OPS
def test_on_the_meta_device(op):
    problem = CLASSES[op]((2, 9), 67, 33, device="cpu")
    problem.q = problem.q.to("meta")
    tensors = {n: t.detach().to("meta").requires_grad_() for n, t in problem.tensors.items()}
    y = problem.call(tensors)
    assert (y.device.type, y.shape) == ("meta", (2, 9, 33))
    grads = torch.autograd.grad(y.sum(), list(tensors.values()))
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors.values()]
    assert problem.q.dequantize(BF16).shape == (33, 67)
    assert functional.nf4_quantize(torch.empty(33, 67, device="meta"), double_quant=False).packed.is_meta


@OPS
def test_fake_tensors(op):
    problem = CLASSES[op]((2, 9), 67, 33)
    with FakeTensorMode() as mode:
        problem.q, tensors = tree_map_only(torch.Tensor, mode.from_tensor, (problem.q, problem.tensors))
        y = problem.call(tensors)
        assert (y.shape, y.dtype) == ((2, 9, 33), F32)
        assert torch.autograd.grad(y.sum(), tensors["x"])[0].shape == (2, 9, 67)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def layer(x, q, lora_A, lora_B, bias):
    """Both ops between others that a compiler may fuse."""
    y = functional.nf4_lora_linear(x.sin(), q, lora_A, lora_B, scaling=1.5, bias=bias)
    return y.cos() + functional.nf4_linear(x * 2, q, bias)


def check_layer(compiled, m: int, **options) -> None:
    """In float64, because a graph scales B where eager mode scales the result."""
    problem = Nf4LoraProblem(m, 67, 33, 3, dtype=F64, **options)
    t = problem.tensors
    leaves = [t[name] for name in ("x", "lora_A", "lora_B", "bias")]
    results = []
    for run in (compiled, layer):
        y = run(t["x"], problem.q, t["lora_A"], t["lora_B"], t["bias"])
        results.append((y, *torch.autograd.grad(y, leaves, problem.grad_y)))
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_with_the_weight_as_an_argument():
    """One graph for every number of rows and for every weight of one shape: neither is a constant of it."""
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m, seed in ((6, 1), (11, 2), (300, 3)):
        check_layer(compiled, m, seed=seed)


def test_compiled_with_parts_of_weights():
    """Rows and columns that begin elsewhere: right numbers, in whatever number of graphs."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for part in ("whole", "rows", "corner"):
        check_layer(compiled, 6, part=part, nested=part != "rows")
    torch._dynamo.reset()


class Layer(nn.Module):
    """A weight that is an attribute of a module."""

    def __init__(self, problem) -> None:
        super().__init__()
        self.q = problem.q
        for name in ("lora_A", "lora_B", "bias"):
            setattr(self, name, nn.Parameter(problem.tensors[name].detach()))

    def forward(self, x):
        return layer(x, self.q, self.lora_A, self.lora_B, self.bias)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_as_a_module_s_attribute():
    module = Layer(Nf4LoraProblem(5, 67, 33, 3, dtype=F64))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (6, 11, 300):
        x = torch.randn(m, 67, dtype=F64, requires_grad=True)
        results = []
        for run in (module, compiled):
            y = run(x)
            results.append((y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])))
        torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_checkpointing_and_autocast():
    problem = Nf4LoraProblem(6, 67, 33, 3)
    t = problem.tensors

    def recomputed(x):
        return layer(x, problem.q, t["lora_A"], t["lora_B"], t["bias"])

    def forward(x):
        with torch.autocast("cpu", BF16):
            return checkpoint(recomputed, x, use_reentrant=False)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    results = []
    for run in (forward, compiled):
        y = run(t["x"])
        assert y.dtype == BF16
        results.append((y, *torch.autograd.grad(y.float().sum(), [t["x"], t["lora_B"]])))
    torch.testing.assert_close(results[1], results[0], rtol=2**-6, atol=2**-6)
