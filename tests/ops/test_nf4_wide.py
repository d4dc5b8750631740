"""Groups, DoRA, gated blocks, experts and `lora_linear` over weights of 4 bits: as over what the weights decode to."""

from __future__ import annotations

import importlib

import pytest
import torch

from peft_kernels import dispatch, functional, use_backend
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.composed import dora_weight_norm as composed_norm
from peft_kernels.kernels.composed import nf4_linear as composed_linear
from peft_kernels.problems import Draw, nf4_decoded, nf4_weight
from tests.backends import across, everywhere
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named, relative_error
from tests.ops.cases import BF16, F16, F32, F64, dtype_id
from tests.ops.test_autograd import saved_by
from tests.ops.test_compile import compiled_call
from tests.ops.test_errors import refused
from tests.ops.test_lora_linear_group import masks
from tests.problems.nf4_wide import DoraOverNf4, ExpertsOverNf4, GroupOverNf4, LoraOverNf4, MlpOverNf4, OverNf4

WIDE = ["lora_linear_group", "dora_linear", "lora_swiglu_mlp", "lora_expert_linear"]
OF_AN_X = pytest.mark.parametrize("backend", across(*WIDE), indirect=True)
NORM = pytest.mark.parametrize("backend", everywhere("dora_weight_norm"), indirect=True)
DTYPES = pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F32)], ids=dtype_id)


def over_nf4(op: str, m: int = 34, k: int = 31, n: int = 23, r: int = 4, **options) -> OverNf4:
    """As `cases.problem_of`: several adapters, ranks, scalings; an expert without rows, a row without an expert."""
    if op == "lora_linear_group":
        ranks = ((r,), (), (max(1, r // 2), r // 3 + 1))
        options["dropout_p"] = [options.pop("dropout_p", 0.0)] * 3
        return GroupOverNf4(m, k, (n, max(1, n // 3), n // 2 + 1), ranks, scalings=(1.5, None, (0.5, -2.0)), **options)
    if op == "lora_swiglu_mlp":
        return MlpOverNf4(m, k, n, ((r,), (max(1, r // 2),), (r // 3 + 1, r)), out=n // 2 + 1, **options)
    if op == "lora_expert_linear":
        return ExpertsOverNf4((m // 3, 0, m - m // 3 - 1), k, n, r, orphans=1, **options)
    return {"dora_linear": DoraOverNf4, "lora_linear": LoraOverNf4}[op](m, k, n, r, **options)


@pytest.mark.parametrize(
    ("part", "blocksize", "nested"), [("whole", 64, True), ("corner", 32, True), ("columns", 128, False)]
)
@pytest.mark.parametrize("m", [1, 34])
@OF_AN_X
def test_every_element(backend, m, part, blocksize, nested):
    """Few rows and many, parts that begin in the low half of a byte, blocks over the ends of rows."""
    if m == 1 and backend.op == "lora_expert_linear":
        m = 5  # rows of two experts and of none
    problem = over_nf4(backend.op, m, part=part, blocksize=blocksize, nested=nested, device=backend.device)
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@DTYPES
@OF_AN_X
def test_accuracy(backend, dtypes, dropout_p):
    dtype, adapter_dtype = dtypes
    problem = over_nf4(
        backend.op, 150, 130, 130, 20, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p,
        device=backend.device,
    )  # fmt: skip
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("name", ["reference", "composed"])
@pytest.mark.parametrize("op", WIDE)
def test_the_bits_of_the_decoded_weight(op, name):
    """The same implementation of the same op on the weight in full. dX of several projections may be added up in
    another order of roundings."""
    problem = over_nf4(op, dtype=BF16, adapter_dtype=F32, nf4_dtype=BF16, dropout_p=0.2)
    with use_backend(name):
        ours = named(problem.run())
        t = problem.over_decoded()
        args, kwargs = super(OverNf4, problem).arguments(t)
        y = getattr(functional, op)(*args, **kwargs)
        dense = named((y, problem.gradients(y, problem.tensors)))
    assert ours.keys() == dense.keys()
    for key, value in ours.items():
        assert torch.equal(value, dense[key].detach()), key


@pytest.mark.parametrize("kept_dense", [("weights.0",), ("weights.1", "weights.2")], ids=str)
@pytest.mark.parametrize("backend", across("lora_linear_group", "lora_swiglu_mlp"), indirect=True)
def test_beside_dense_weights(backend, kept_dense):
    """A frozen head of 16 bits between projections of 4: the dense ones may even be trained."""
    problem = over_nf4(backend.op, kept_dense=kept_dense, dropout_p=0.2, device=backend.device)
    result = problem.run()
    assert set(kept_dense) <= set(result[1])
    assert_within_rounding(problem, result)


@pytest.mark.parametrize("which", ["some", "strided"])
@pytest.mark.parametrize("backend", everywhere("lora_linear_group"), indirect=True)
def test_token_masks(backend, which):
    mask = masks((3, 7), backend.device)[which]
    problem = over_nf4("lora_linear_group", (3, 7), 21, dropout_p=0.3, device=backend.device)
    problem.token_mask = mask
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("unused", [(0,), (1, 2)], ids=str)
@pytest.mark.parametrize("backend", everywhere("lora_linear_group"), indirect=True)
def test_unused_outputs(backend, unused):
    problem = over_nf4("lora_linear_group", device=backend.device)
    problem.grad_y = tuple(None if j in unused else grad for j, grad in enumerate(problem.grad_y))
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout_p": 0.3, "bias": False, "nf4_dtype": BF16},
        {"lora_bias": True, "dtype": BF16, "adapter_dtype": F32},
        {"lora_bias": True, "masked": True, "dropout_p": 0.3},
        {"masked": True, "dtype": BF16, "nf4_dtype": BF16},
    ],
    ids=str,
)
def test_lora_linear_takes_any_weight(options):
    """Callers need not know what a layer's weight is: every option of `lora_linear`."""
    mask = masks((3, 7), "cpu")["some"] if options.pop("masked", False) else None
    problem = over_nf4("lora_linear", (3, 7), token_mask=mask, **options)
    assert_within_rounding(problem, problem.run())


def test_explain_names_the_op_that_runs():
    """The choice of `lora_linear`'s implementations says nothing of a layer over 4 bits."""
    with pytest.raises(ValueError, match="it is the op nf4_lora_linear"):
        over_nf4("lora_linear").dispatched()


@pytest.mark.parametrize("op", [*WIDE, "lora_linear"])
def test_autocast(op):
    """x and b are cast, A and B stay, and the weight rounds to the autocast dtype: the bits of x and b cast before."""
    problem = over_nf4(op, dropout_p=0.2)
    if op == "dora_linear":
        problem.weight_norm = problem.norm(problem.tensors).detach()
    with torch.autocast("cpu", BF16):
        y = problem.call()
    cast = {
        name: t.to(BF16) if name.startswith(("x", "bias")) else t for name, t in problem.tensors.items()
    }  # fmt: skip
    expected = problem.call(cast)
    ours, truth = (named((out, problem.gradients(out, problem.tensors))) for out in (y, expected))
    for name, value in ours.items():
        assert value.dtype == (BF16 if name.startswith("y") else problem.tensors[name].dtype), name
        assert torch.equal(value, truth[name]), name


@pytest.mark.parametrize("op", [*WIDE, "lora_linear"])
def test_no_dense_weight_is_kept(op):
    """Between forward and backward: the tensors of the packed weight, and beside them what a dense layer keeps."""
    kept = []
    for problem in (over_nf4(op), over_nf4(op, kept_dense=("weight", "weights.0", "weights.1", "weights.2"))):
        problem.freeze_all_but("x", "lora_A", "lora_B", "lora_As", "lora_Bs", "magnitude")
        _, saved = saved_by(problem.call)
        weights = [tensor for q in problem.qs.values() for tensor in q.tensors]
        theirs = {t.data_ptr() for t in (*problem.tensors.values(), *weights) if t is not problem.tensors["x"]}
        ours = {t.data_ptr(): t.untyped_storage().nbytes() for t in saved if t.data_ptr() not in theirs}
        kept.append(sorted(ours.values()))
        assert {t.data_ptr() for t in weights} <= {t.data_ptr() for t in saved}
    assert kept[0] == kept[1]


@pytest.mark.parametrize("op", WIDE)
def test_no_second_derivative(op):
    problem = over_nf4(op)
    y = problem.call()
    y = sum(out.sum() for out in y) if isinstance(y, tuple) else y.sum()
    (grad_x,) = torch.autograd.grad(y, problem.tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}: tried to differentiate twice"):
        grad_x.sum().backward()


@pytest.mark.parametrize("op", [*WIDE, "lora_linear"])
def test_compiles_to_one_graph(op):
    torch._dynamo.reset()
    compiled = None
    for m in (6, 11):
        problem = over_nf4(op, m, 13, 9, 3, dtype=F64, nf4_dtype=F64, dropout_p=0.25)
        torch._dynamo.mark_dynamic(problem.tensors["x"], 0)
        if compiled is None:
            first, compiled = problem, compiled_call(problem)
        if op == "lora_expert_linear":
            first.offsets = problem.offsets
        with torch._dynamo.config.patch(error_on_recompile=True):
            y = compiled(problem.tensors, None)
        ours, expected = named((y, problem.gradients(y, problem.tensors))), named(problem.run())
        for name, value in ours.items():
            torch.testing.assert_close(value.detach(), expected[name].detach(), rtol=1e-11, atol=1e-11, msg=name)
    torch._dynamo.reset()


@pytest.mark.parametrize("nf4_dtype", [F32, BF16, F16], ids=lambda dtype: str(dtype)[6:])
@NORM
def test_norm(backend, nf4_dtype):
    """Of W in the dtype that it had when it was quantised, whatever x will be: what PEFT takes for a weight of
    bitsandbytes. With and without ‖W‖² at hand, which is that of the same W."""
    problem = over_nf4("dora_linear", nf4_dtype=nf4_dtype, device=backend.device)
    t, q = problem.tensors, problem.qs["weight"]
    truth = problem.norm({name: tensor.double() for name, tensor in t.items()})
    square = functional.dora_weight_norm(q, t["lora_A"] * 0, t["lora_B"]) ** 2
    for known in (None, square):
        norm = functional.dora_weight_norm(q, t["lora_A"], t["lora_B"], scaling=1.5, weight_norm_squared=known)
        assert (norm.dtype, norm.requires_grad) == (F32, False)
        assert relative_error(norm, truth) < 4 * torch.finfo(F32).eps
    rounded = functional.dora_weight_norm(q._replace(dtype=F32), t["lora_A"], t["lora_B"], scaling=1.5)
    assert (relative_error(rounded, truth) < 4 * torch.finfo(F32).eps) == (nf4_dtype == F32), "which W it was"


@pytest.mark.parametrize("op", ["dora_weight_norm", "lora_linear_group", "lora_expert_linear"])
def test_dense_pieces_are_bounded(op, monkeypatch):
    """With the bound set low: no more than that of W is dense at a time, float32 copies of a 16-bit piece counted, and
    the pieces make up what W in one piece does."""
    draw, bound, pieces, dense = Draw("cpu"), 64 << 10, [], composed_linear.dense

    def recorded(piece):
        pieces.append(dense(piece))
        return pieces[-1]

    monkeypatch.setattr(composed_linear, "SCRATCH_BYTES", bound)
    monkeypatch.setattr(composed_linear, "dense", recorded)
    monkeypatch.setattr(composed_norm, "dense", recorded)
    q, a, b = nf4_weight(draw, 3, 256, 320, dtype=BF16), draw(F32, 3, 4, 320), draw(F32, 3, 256, 4)
    whole = nf4_decoded(q, BF16 if op == "dora_weight_norm" else F32)
    x, ends = draw(F32, 8, 320).requires_grad_(), torch.tensor([3, 3, 8], dtype=torch.int32)

    def call(weight, one):
        if op == "dora_weight_norm":
            return functional.dora_weight_norm(one(1), a[1], b[1])
        if op == "lora_expert_linear":
            y = functional.lora_expert_linear(x, weight, a, b, ends)
        else:
            ys = functional.lora_linear_group(x, [one(0), one(2)], [a[0], a[2]], [b[0], b[2]], scalings=1.0)
            y = torch.cat(ys, 1)
        return torch.cat((y, *torch.autograd.grad(y, x, torch.ones_like(y))), 1)

    with use_backend("composed"):
        torch.testing.assert_close(call(q, q.expert), call(whole, whole.__getitem__), rtol=1e-5, atol=1e-5)
    passes, copies = (
        (1, 3) if op == "dora_weight_norm" else (4, 1)
    )  # over how many matrices, in how many times the size
    assert sum(piece.numel() for piece in pieces) == passes * whole[0].numel()
    assert bound / 2 < max(piece.nbytes * copies for piece in pieces) <= bound


@pytest.mark.parametrize("op", WIDE)
def test_what_dispatch_is_asked(op, monkeypatch):
    """A weight of 4 bits is another problem than a dense one of the same shape, also where choices are remembered."""
    asked, select = [], dispatch.select

    def recorded(name, problem):
        asked.append((name, problem))
        return select(name, problem)

    monkeypatch.setattr(dispatch, "select", recorded)
    dispatch.forget()
    problem = over_nf4(op, kept_dense=("weight", "weights.0", "weights.1", "weights.2"))
    problem.call()
    problem = over_nf4(op)
    problem.call()
    assert [one.nf4 for name, one in asked if name == op] == [False, True]
    assert problem.dispatched().nf4
    assert "NF4" in dispatch.objection(op, "triton", problem.dispatched()) or op == "lora_swiglu_mlp"


def q_of(*shape: int, **changes) -> NF4Weight:
    return nf4_weight(Draw("cpu"), *shape)._replace(**changes)


def good(op: str) -> dict:
    ones = torch.ones
    layer = {"x": ones(6, 16), "weight": q_of(12, 16), "lora_A": ones(4, 16), "lora_B": ones(12, 4), "bias": ones(12)}
    each = {"lora_As": [ones(4, 16), None, ones(4, 12)], "lora_Bs": [ones(12, 4), None, ones(16, 4)], "scalings": 1.0}
    return {
        "lora_linear": layer,
        "dora_linear": {**layer, "magnitude": ones(12)},
        "dora_weight_norm": {name: layer[name] for name in ("weight", "lora_A", "lora_B")},
        "lora_linear_group": {
            "x": ones(6, 16), "weights": [q_of(12, 16), q_of(8, 16)], "lora_As": [ones(4, 16), ones(2, 16)],
            "lora_Bs": [ones(12, 4), ones(8, 2)], "scalings": 1.0, "biases": [ones(12), None],
        },
        "lora_swiglu_mlp": {"x": ones(6, 16), "weights": [q_of(12, 16), q_of(12, 16), q_of(16, 12)], **each},
        "lora_expert_linear": {
            "x": ones(6, 16), "weight": q_of(2, 12, 16), "lora_A": ones(2, 4, 16), "lora_B": ones(2, 12, 4),
            "offsets": torch.tensor([2, 6], dtype=torch.int32), "bias": ones(2, 12),
        },
    }[op]  # fmt: skip


HALF = torch.ones(12).half()
REFUSED = [
    ("lora_linear", {"weight": q_of(12, 15)}, ValueError, "weight has shape (12, 15), but x has 16 features"),
    ("lora_linear", {"weight": q_of(2, 12, 16)}, ValueError, "weight has shape (2, 12, 16), but x has 16 features"),
    ("lora_linear", {"weight": q_of(12, 16, blocksize=48)}, ValueError, "weight.blocksize is 48"),
    ("lora_linear", {"weight": q_of(12, 16, absmax=torch.ones(2, dtype=torch.uint8))}, ValueError,
     "weight.absmax has 2 elements"),
    ("lora_linear", {"weight": q_of(12, 16).to("meta")}, ValueError, "weight is on meta, but x is on cpu"),
    ("lora_linear", {"lora_B": torch.ones(11, 4)}, ValueError, "lora_B has shape (11, 4), but weight has 12 output"),
    ("lora_linear", {"bias": torch.ones(11)}, ValueError, "bias has shape (11,), but weight has 12 output features"),
    ("lora_linear", {"seed": 0.5, "dropout_p": 0.5}, TypeError, "seed is 0.5; expected an integer"),
    ("lora_linear", {"token_mask": torch.ones(6)}, TypeError, "token_mask has dtype torch.float32"),
    ("lora_linear", {"lora_bias": torch.ones(12).half()}, TypeError, "lora_bias has dtype torch.float16, but lora_B"),
    ("dora_linear", {"weight": q_of(12, 15)}, ValueError, "weight has shape (12, 15), but x has 16 features"),
    ("dora_linear", {"magnitude": torch.ones(11)}, ValueError, "magnitude has shape (11,), but weight has 12 output"),
    ("dora_weight_norm", {"weight": q_of(2, 12, 16)}, ValueError, "weight has shape (2, 12, 16), but it is a matrix"),
    ("dora_weight_norm", {"weight": q_of(12, 16, packed=torch.ones(96))}, TypeError,
     "weight.packed has dtype torch.float32; expected torch.uint8"),
    ("lora_linear_group", {"weights": [q_of(12, 16), q_of(8, 15)]}, ValueError,
     "weights[1] has shape (8, 15), but its input has 16 features"),
    ("lora_linear_group", {"weights": [q_of(12, 16), q_of(8, 16, blocksize=1)]}, ValueError,
     "weights[1].blocksize is 1"),
    ("lora_linear_group", {"weights": [q_of(12, 16), torch.ones(8, 16).half()]}, TypeError,
     "weights[1] has dtype torch.float16, but x has torch.float32"),
    ("lora_linear_group", {"weights": [q_of(12, 16), q_of(1, 8, 16)]}, ValueError,
     "weights[1] has shape (1, 8, 16), but its input has 16 features"),
    ("lora_linear_group", {"weights": [q_of(12, 16, packed=torch.zeros(192, dtype=torch.uint8)[::2]), q_of(8, 16)]},
     ValueError, "weights[0].packed has 96 elements"),
    ("lora_linear_group", {"weights": [q_of(12, 16), q_of(8, 16, row_stride=17)]}, ValueError,
     "weights[1].packed has 64 elements"),
    ("lora_linear_group", {"biases": [torch.ones(11), None]}, ValueError, "biases[0] has shape (11,), but weights[0]"),
    ("lora_swiglu_mlp", {"weights": [q_of(12, 16), q_of(11, 16), q_of(16, 12)]}, ValueError,
     "weights[1] has shape (11, 16), but gate and up have one shape"),
    ("lora_swiglu_mlp", {"weights": [q_of(12, 16), q_of(12, 16), q_of(16, 11)]}, ValueError,
     "weights[2] has shape (16, 11), but its input has 12 features"),
    ("lora_expert_linear", {"weight": q_of(24, 16)}, ValueError, "weight has shape (24, 16), but x has 16 features"),
    ("lora_expert_linear", {"lora_A": torch.ones(3, 4, 16)}, ValueError, "lora_A has shape (3, 4, 16), but weight has"),
    ("lora_expert_linear", {"bias": torch.ones(3, 12)}, ValueError, "bias has shape (3, 12), but weight has 2 experts"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "changes", "error", "message"), REFUSED, ids=[f"{op}-{m}" for op, _, _, m in REFUSED])
def test_refused(op, changes, error, message):
    function, arguments = getattr(functional, op), good(op)
    function(**arguments)  # the situation itself
    refused(op, function, {**arguments, **changes}, error, message)


@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_group", "dora_linear", "lora_swiglu_mlp"])
def test_dtensors_are_refused(op, monkeypatch):
    """Sharding rules know nothing of half bytes. (A tensor subclass stands for a DTensor.)"""

    class Sharded(torch.Tensor):
        pass

    module = importlib.import_module(f"peft_kernels.functional.{op}")
    monkeypatch.setattr(module, "is_dtensor", lambda *tensors: any(isinstance(t, Sharded) for t in tensors))
    arguments = good(op)
    arguments["x"] = arguments["x"].as_subclass(Sharded)
    with pytest.raises(NotImplementedError, match=f"{op}: DTensors are not supported"):
        getattr(functional, op)(**arguments)


def test_a_bias_of_another_dtype_is_cast():
    """A checkpoint's float16 bias beside a weight that has no dtype of its own; its gradient comes back in float16."""
    problem = over_nf4("lora_linear_group", dtype=BF16, adapter_dtype=F32)
    for name, tensor in problem.tensors.items():
        if name.startswith("biases"):
            problem.tensors[name] = tensor.detach().half().requires_grad_()
    y, grads = problem.run()
    assert grads["biases.0"].dtype == F16
    expected = named(over_nf4("lora_linear_group", dtype=BF16, adapter_dtype=F32).run())
    torch.testing.assert_close(y[0], expected["y.0"], rtol=2**-7, atol=2**-7)
