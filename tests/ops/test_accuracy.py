"""Each op's outputs and gradients against float64: every rank, dtypes in all pairs, sizes that divide nothing, strides.

`lora_linear` has its own grid in `test_lora_linear.py`; here it takes part with an adapter bias.
"""

from __future__ import annotations

import pytest
import torch

from peft_kernels import use_backend
from tests.backends import across, on_cpu
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.ops.cases import BF16, DTYPES, F16, F32, F64, LINEAR, NEW, RANKLESS, over, problem_of, tiny

EVERY_OP = ("lora_linear", *NEW)
RANKED = [op for op in EVERY_OP if op not in RANKLESS]
NEW_OPS = pytest.mark.parametrize("backend", across(*NEW), indirect=True)
PLAIN, MIXED = (F32, F32), (BF16, F32)


def rule_size(op: str) -> tuple[int, int, int, int]:
    """Of many adapters each has some of the rows only."""
    return (140 if op.startswith("multi_") else 70, 66, 301, 36)


OF_AN_X = pytest.mark.parametrize("backend", across(*LINEAR), indirect=True)


# 16-bit matmuls of a size that a CPU has not seen are compiled first, which takes most of the time of a small test:
# few sizes and ranks see all dtypes.
@over(
    "r,dtypes",
    RANKED,
    [(r, PLAIN) for r in (1, 2, 3, 4, 8, 12, 16, 64, 256, 384)] + [(r, MIXED) for r in (1, 3, 12, 384)],
    cpu=[(r, PLAIN) for r in (1, 3, 8, 12, 64, 384)] + [(r, MIXED) for r in (1, 12)],
    composed=[(1, PLAIN), (8, PLAIN), (384, PLAIN), (12, MIXED)],
    reference=[(1, PLAIN), (12, MIXED)],
)
def test_every_rank(backend, r, dtypes):
    problem = problem_of(
        backend.op, 37, 43, 29, r, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=0.2 * (r % 8 != 0),
        device=backend.device,
    )  # fmt: skip
    assert_within_rounding(problem, problem.run())


SIZES = ((4, 1, 1), (5, 1, 31), (7, 48, 1), (129, 17, 101), (66, 67, 5), (130, 129, 65))
OF_ALL_DTYPES = (66, 67, 5)
PAIRS = [*DTYPES, (F32, BF16), (F64, F64)]


@over(
    "m,k,n,dtypes",
    NEW,
    [(*size, pair) for size in SIZES for pair in (PAIRS if size == OF_ALL_DTYPES else [PLAIN, (F64, F64)])],
    # Those of a CPU decline float64.
    cpu=[(*size, pair) for size in SIZES for pair in (PAIRS[:-1] if size == OF_ALL_DTYPES else [PLAIN])],
    composed=[(*size, PLAIN) for size in SIZES if size != OF_ALL_DTYPES]
    + [(*OF_ALL_DTYPES, pair) for pair in ((F16, F16), MIXED, (F32, BF16), (F64, F64))],
    reference=[(4, 1, 1, PLAIN), (129, 17, 101, PLAIN), (*OF_ALL_DTYPES, MIXED), (*OF_ALL_DTYPES, (F64, F64))],
)
def test_sizes_that_divide_nothing(backend, m, k, n, dtypes):
    problem = problem_of(
        backend.op, m, k, n, 5, dtype=dtypes[0], adapter_dtype=dtypes[1], dropout_p=0.3 * (k > 17),
        bias=n != 65, device=backend.device,
    )  # fmt: skip
    assert_within_rounding(problem, problem.run())


WITH_DROPOUT = [*zip(DTYPES, (0.3, 0.0, 0.3, 0.0, 0.3), strict=True), (PLAIN, 0.0)]


@over(
    "dtypes,dropout_p",
    EVERY_OP,
    WITH_DROPOUT,
    composed=[(PLAIN, 0.3), (PLAIN, 0.0), ((F16, F16), 0.0), (MIXED, 0.3)],
    reference=[(PLAIN, 0.3), (MIXED, 0.0)],
)
def test_as_accurate_as_eager(backend, dtypes, dropout_p):
    """The accuracy rule, at sizes where the ratio of two errors is not a matter of luck. All ranks are past those
    few columns for which CPU matmuls have kernels of their own, with shorter sums (11 in MKL: half the error)."""
    problem = problem_of(
        backend.op,
        *rule_size(backend.op),
        dtype=dtypes[0],
        adapter_dtype=dtypes[1],
        dropout_p=dropout_p,
        device=backend.device,
    )
    assert_as_accurate_as_eager(problem, problem.run())


@over("precision", EVERY_OP, ["high", "medium"], cpu=["medium"], reference=["medium"])
def test_float32_matmul_precision(backend, precision):
    """Whatever users allow float32 matmuls to round, the library's round no more than PyTorch's own."""
    before = torch.get_float32_matmul_precision()
    problem = problem_of(backend.op, *rule_size(backend.op), device=backend.device)
    try:
        torch.set_float32_matmul_precision(precision)
        assert_as_accurate_as_eager(problem, problem.run())
    finally:
        torch.set_float32_matmul_precision(before)


@over("dropout_p", EVERY_OP, [0.0, 0.4], cpu=[], reference=[0.4])  # in float64, which those of a CPU decline
def test_gradcheck(backend, dropout_p):
    """Gradients equal finite differences of the forward pass, dropout included (the seed fixes its mask)."""
    problem = tiny(backend.op, dtype=F64, dropout_p=dropout_p, device=backend.device)
    if backend.op == "dora_linear":
        problem.weight_norm = problem.norm(problem.tensors)  # a constant for gradients, so one for differences
    names = [name for name, tensor in problem.tensors.items() if tensor is not None]

    def forward(*tensors):
        return problem.call({**problem.tensors, **dict(zip(names, tensors, strict=True))})

    # With dropout along one random direction: drawing a mask for each element of each tensor takes seconds.
    assert torch.autograd.gradcheck(forward, [problem.tensors[name] for name in names], fast_mode=dropout_p > 0)


def strided(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers in another layout, as a leaf; what lies between them is NaN."""
    tensor = tensor.detach()
    if layout == "transposed":
        other = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    else:  # every second element of rows that lie further apart than they are long
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"))
        other = wide[..., 1 : 2 * tensor.shape[-1] + 1 : 2]
        other.copy_(tensor)
    return other.requires_grad_()


@over(
    "dtype,layout",
    NEW,
    [(dtype, layout) for dtype in (F32, BF16) for layout in ("transposed", "sliced")],
    cpu=[(F32, "transposed"), (F32, "sliced"), (BF16, "sliced")],
    composed=[(F32, "sliced"), (BF16, "transposed")],
    reference=[(F32, "transposed"), (BF16, "sliced")],
)
def test_strides_of_every_input(backend, dtype, layout):
    """All tensors at once, the incoming gradients too."""
    problem = problem_of(backend.op, 34, 31, 18, dtype=dtype, dropout_p=0.2, device=backend.device)
    for name, tensor in problem.tensors.items():
        if tensor.ndim > 1 or layout == "sliced":
            problem.tensors[name] = strided(tensor, layout)
    grads = (problem.grad_y,) if isinstance(problem.grad_y, torch.Tensor) else problem.grad_y
    grads = tuple(strided(grad, layout).detach() for grad in grads)
    problem.grad_y = grads if len(grads) > 1 else grads[0]
    assert_within_rounding(problem, problem.run())


@NEW_OPS
def test_expanded_input_and_gradient(backend):
    """All rows the same memory: neither may be read in physical order, nor written."""
    problem = problem_of(backend.op, 34, 31, 18, dropout_p=0.2, device=backend.device)
    for name in ("x", "gate", "up"):
        if name in problem.tensors:
            tensor = problem.tensors[name].detach()
            problem.tensors[name] = tensor[:1].expand(tensor.shape).requires_grad_()
    grads = (problem.grad_y,) if isinstance(problem.grad_y, torch.Tensor) else problem.grad_y
    grads = tuple(grad.new_ones(()).expand(grad.shape) for grad in grads)
    problem.grad_y = grads if len(grads) > 1 else grads[0]
    assert_within_rounding(problem, problem.run())


@NEW_OPS
def test_same_bits_every_time_and_nothing_written_into(backend):
    problem = problem_of(
        backend.op, 130, 101, 67, 24, dtype=BF16, adapter_dtype=F32, dropout_p=0.1, device=backend.device
    )
    tensors = {name: tensor for name, tensor in problem.tensors.items() if tensor is not None}
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in tensors.items()}
    first = named(problem.run())
    for _ in range(2):
        again = named(problem.run())
        assert all(torch.equal(again[name], first[name]) for name in first)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor._version == before[name][1], name


@over(
    "dropout_p,batch",
    ("lora_linear_group", "dora_linear", "lora_swiglu_mlp", "lora_embedding", "nf4_linear", "nf4_lora_linear"),
    [(p, batch) for p in (0.3, 0.0) for batch in ((), (1,), (0,), (2, 0), (3, 1, 5))],
    cpu=[(0.3, ()), (0.0, ()), (0.0, (1,)), (0.3, (0,)), (0.0, (2, 0)), (0.3, (3, 1, 5)), (0.0, (3, 1, 5))],
    composed=[(0.3, ()), (0.0, (1,)), (0.3, (0,)), (0.0, (2, 0)), (0.3, (3, 1, 5))],
    reference=[(0.3, ()), (0.0, (0,)), (0.3, (3, 1, 5))],
)
def test_batches_of_every_shape(backend, dropout_p, batch):
    """A vector, no rows at all, several dimensions."""
    problem = problem_of(backend.op, batch, 31, 18, dropout_p=dropout_p, device=backend.device)
    result = problem.run()
    assert all(value.shape[:-1] == batch for name, value in named(result).items() if name.startswith("y"))
    assert_within_rounding(problem, result)


@OF_AN_X
def test_rows_do_not_mix(backend):
    """Infinity in one row of x reaches that row's result and no other's."""
    problem = problem_of(backend.op, 10, 31, 18, dropout_p=0.2, device=backend.device)
    clean = named(problem.run())
    x = problem.tensors["x"].detach().clone()
    x[2] = float("inf")
    bad = named(problem.run(x=x.requires_grad_()))
    others = [row for row in range(10) if row != 2]
    for name in (name for name in clean if name.startswith("y")):
        assert not bad[name][2].isfinite().any(), name
        assert torch.equal(bad[name][others], clean[name][others]), name


@pytest.mark.parametrize("op", NEW)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_implementations_agree(op, dropout_p):
    """One seed, one mask: all implementations differ by the order of their sums only."""
    results = []
    for name in on_cpu(op):
        with use_backend(name):
            results.append(named(problem_of(op, dropout_p=dropout_p).run()))
    assert len(results) >= 2
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-4)
