"""The ops beside `lora_linear` on a GPU at sizes of many tiles: accuracy, determinism, streams, CUDA graphs.

Small awkward shapes are in tests/ops, which runs on the GPU too.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.conftest import on_gpu
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.problems import (
    DoraProblem,
    EmbeddingProblem,
    ExpertProblem,
    GatedProblem,
    GroupProblem,
    MaskedLoraProblem,
    MaskedProblem,
    MlpProblem,
    MultiExpertProblem,
    MultiLoraProblem,
    MultiMaskProblem,
    Nf4LoraProblem,
    Nf4Problem,
)

pytestmark = pytest.mark.gpu
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = ((F32, F32), (F16, F16), (BF16, BF16), (BF16, F32))

MAKE = {
    "lora_linear_group": lambda p, **o: GroupProblem(
        1000, 1032, (2056, 512, 520), ((16,), (8,), (4, 64)), dropout_p=p, **o
    ),
    "dora_linear": lambda p, **o: DoraProblem(1000, 1032, 2056, 16, dropout_p=p, **o),
    "gated_activation": lambda p, **o: GatedProblem((1000, 2056), **_without_adapters(o)),
    "lora_swiglu_mlp": lambda p, **o: MlpProblem(1000, 1032, 2056, ((16,), (16,), (8,)), dropout_p=p, **o),
    "lora_embedding": lambda p, **o: EmbeddingProblem(2000, 5003, 1032, 16, **o),
    "lora_expert_linear": lambda p, **o: ExpertProblem((300, 0, 517, 183), 1032, 2056, 16, dropout_p=p, **o),
    "multi_lora_linear": lambda p, **o: MultiLoraProblem(1000, 1032, 2056, (16, 8, None, 64, 96), dropout_p=p, **o),
    "multi_lora_expert_linear": lambda p, **o: MultiExpertProblem(
        (300, 0, 517, 183), 1032, 2056, (16, 8, None, 64), dropout_p=p, **o
    ),
    "nf4_linear": lambda p, **o: Nf4Problem(1000, 1032, 2056, **_without_adapters(o)),
    "nf4_lora_linear": lambda p, **o: Nf4LoraProblem(1000, 1032, 2056, 16, dropout_p=p, **o),
    "masked_linear": lambda p, **o: MaskedProblem(1000, 1032, 2056, **_without_adapters(o)),
    # The update inside the mask; beside it with dropout.
    "masked_lora_linear": lambda p, **o: MaskedLoraProblem(
        1000, 1032, 2056, 16, dropout_p=p, update_masked=p == 0, **o
    ),
    "multi_mask_linear": lambda p, **o: MultiMaskProblem(1000, 1032, 2056, **_without_adapters(o)),
}  # fmt: skip
WITHOUT_DROPOUT = ("gated_activation", "lora_embedding", "nf4_linear", "masked_linear", "multi_mask_linear")
READ_BY_THE_HOST = {
    "lora_expert_linear": "the offsets",
    "multi_lora_linear": "the ids",
    "multi_lora_expert_linear": "both",
    "multi_mask_linear": "the ids",
}  # in composed
# (op, backend) pairs; which backends there are is known on the GPU only.
PAIRS = [pytest.param(op, *p.values, id=f"{op}-{p.id}", marks=p.marks) for op in MAKE for p in on_gpu(op)]
EVERY = pytest.mark.parametrize(("op", "backend"), PAIRS, indirect=["backend"])


def _without_adapters(options: dict) -> dict:
    return {name: value for name, value in options.items() if name != "adapter_dtype"}


def make(op: str, backend, dropout_p: float = 0.0, **options):
    problem = MAKE[op](dropout_p, device=backend.device, **options)
    backend.skip_unless_runnable(problem.dispatched())
    return problem


def equal(left, right) -> None:
    left, right = named(left), named(right)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@EVERY
def test_as_accurate_as_eager(op, backend, dropout_p, dtypes):
    if dropout_p and op in WITHOUT_DROPOUT:
        pytest.skip(f"{op} has no dropout")
    problem = make(op, backend, dropout_p, dtype=dtypes[0], adapter_dtype=dtypes[1])
    assert_as_accurate_as_eager(problem, problem.run())


@EVERY
def test_same_bits_every_time(op, backend):
    """Another kernel runs beside it: reductions have one order."""
    problem = make(op, backend, 0.1, dtype=BF16, adapter_dtype=F32)
    first = problem.run()
    noise, side = torch.randn(2048, 2048, device=backend.device), torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(side):
            torch.mm(noise, noise)
        equal(problem.run(), first)


@EVERY
def test_never_waits_for_the_gpu(op, backend, no_host_sync):
    if op in READ_BY_THE_HOST and backend.name == "composed":
        pytest.skip(f"composed lets the host read {READ_BY_THE_HOST[op]}, as its docstring says")
    problem = make(op, backend, dtype=BF16, adapter_dtype=F32)
    problem.run()  # compiling and loading kernels may wait
    torch.cuda.synchronize()
    no_host_sync()
    problem.run()


@EVERY
def test_graph_reads_what_is_there_at_replay(op, backend):
    """F18, F21: every kernel of the step is in the graph; new values in the captured tensors give their results."""
    if op in READ_BY_THE_HOST and backend.name == "composed":
        pytest.skip(f"composed lets the host read {READ_BY_THE_HOST[op]}, which a capture forbids")
    problem, other = make(op, backend), make(op, backend, seed=77)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        problem.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = problem.run()
    with torch.no_grad():
        for name, tensor in problem.tensors.items():
            if tensor is not None:
                tensor.copy_(other.tensors[name])
        for mine, theirs in zip(_tensors(problem), _tensors(other), strict=True):
            mine.copy_(theirs)
    graph.replay()
    equal(result, other.run())


def _tensors(problem) -> list[torch.Tensor]:
    """What the call takes besides the leaves: indices, a frozen weight, masks, and gradients of the outputs."""
    grads = problem.grad_y if isinstance(problem.grad_y, tuple) else (problem.grad_y,)
    ids = [problem.ids] if isinstance(problem, (EmbeddingProblem, MultiLoraProblem)) else []
    quantised = problem.q.tensors if isinstance(problem, (Nf4Problem, Nf4LoraProblem)) else []
    masks = []
    if isinstance(problem, MaskedProblem):
        masks = [problem.mask.words]
    elif isinstance(problem, MaskedLoraProblem):
        masks = [problem.packed.words, problem.weight]
    elif isinstance(problem, MultiMaskProblem):
        masks = [problem.ids, *problem.kept]
    return [*ids, *quantised, *masks, *(grad for grad in grads if grad is not None)]


# (m, k, n, blocksize, nested): each number of rows for which there are kernels of their own, past and at tiles; rows
# that end inside a block, odd ones, fewer rows of W than a tile has.
FEW_ROWS = (
    (1, 4096, 4096, 64, True), (2, 3420, 2056, 64, True), (3, 1027, 515, 32, False), (8, 4096, 1024, 128, True),
    (16, 3420, 4096, 64, False), (17, 1024, 4096, 64, True), (33, 515, 1031, 4096, True), (64, 4096, 4096, 64, True),
    (129, 2048, 2056, 256, False), (512, 4096, 1024, 64, True),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize(("m", "k", "n", "blocksize", "nested"), FEW_ROWS, ids=str)
@pytest.mark.parametrize("backend", on_gpu("nf4_linear"), indirect=True)
def test_rows_over_4_bits(backend, m, k, n, blocksize, nested, dtype):
    problem = Nf4Problem(m, k, n, dtype, blocksize=blocksize, nested=nested, device=backend.device)
    backend.skip_unless_runnable(problem.dispatched())
    assert_within_rounding(problem, problem.run())


ROWS_OF_ADAPTERS = {
    "several adapters a row": {"ranks": (16, 8, 64, 5), "per_row": 2},
    "forty adapters": {"ranks": tuple(1 + a % 33 for a in range(40))},
    "nobody": {"ranks": (16, 8), "ids": [-1] * 515},
    "one adapter": {"ranks": (160,), "ids": [0] * 515},
    "longer than a plane": {"ranks": (16, 512), "m": 2600, "ids": [0, 1, 0, 0] * 650},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("rows", ROWS_OF_ADAPTERS)
@pytest.mark.parametrize("backend", on_gpu("multi_lora_linear"), indirect=True)
def test_rows_of_adapters(backend, rows, dtype):
    options = {"m": 515, "k": 264, "n": 520, "dropout_p": 0.1, "adapter_dtype": F32} | ROWS_OF_ADAPTERS[rows]
    problem = MultiLoraProblem(dtype=dtype, device=backend.device, **options)
    backend.skip_unless_runnable(problem.dispatched())
    assert_within_rounding(problem, problem.run())


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("m", [1, 5, 16, 17, 64, 65])
@pytest.mark.parametrize("backend", on_gpu("multi_mask_linear"), indirect=True)
def test_few_rows_of_masks(backend, m, dtype):
    """One read of W for all of them, and grouped tiles."""
    for densities in ((0.5,) * 20, (0.5, 0.1, 0.0, 0.9)):
        problem = MultiMaskProblem(m, 1032, 520, dtype, densities, device=backend.device)
        backend.skip_unless_runnable(problem.dispatched())
        assert_within_rounding(problem, problem.run())


@EVERY
def test_runs_on_the_current_stream(op, backend):
    """What the default stream overwrites later is not what a side stream, blocked by long work, reads."""
    problem = make(op, backend)
    expected = problem.run()
    torch.cuda.synchronize()
    side, big = torch.cuda.Stream(), torch.randn(4096, 4096, device=backend.device)
    with torch.cuda.stream(side):
        for _ in range(20):
            big @ big
        result = problem.run()
    side.synchronize()
    equal(result, expected)
