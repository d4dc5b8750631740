"""What only `gated_activation`, `lora_embedding` and `lora_expert_linear` have: activations, indices, offsets."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import functional
from tests.backends import everywhere
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding, named
from tests.ops.cases import BF16, F16, F32, dtype_id
from tests.problems import EmbeddingProblem, ExpertProblem, GatedProblem, MlpProblem

GATED = pytest.mark.parametrize("backend", everywhere("gated_activation"), indirect=True)
MLP = pytest.mark.parametrize("backend", everywhere("lora_swiglu_mlp"), indirect=True)
EMBEDDING = pytest.mark.parametrize("backend", everywhere("lora_embedding"), indirect=True)
EXPERTS = pytest.mark.parametrize("backend", everywhere("lora_expert_linear"), indirect=True)
ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=lambda dtype: str(dtype)[6:])
@ACTIVATIONS
@GATED
def test_activations(backend, activation, dtype):
    problem = GatedProblem((130, 301), dtype=dtype, activation=activation, device=backend.device)
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize(
    ("shape", "activation"),
    [((), "gelu"), ((1,), "silu"), ((7,), "gelu_tanh"), ((0, 5), "silu"), ((3, 0), "gelu"), ((2, 3, 5), "gelu_tanh")],
    ids=str,
)
@GATED
def test_shapes(backend, activation, shape):
    problem = GatedProblem(shape, activation=activation, device=backend.device)
    result = problem.run()
    assert result[0].shape == shape
    assert_within_rounding(problem, result)


@ACTIVATIONS
@GATED
def test_far_from_zero(backend, activation):
    """Gates from -1e12 to 1e12: h and both gradients stay finite, 0 on the left and up on the right."""
    gate = torch.tensor([-1e12, -1e4, -100.0, 0.0, 100.0, 1e4, 1e12], device=backend.device).requires_grad_()
    up = torch.full_like(gate, 0.5).requires_grad_()
    h = functional.gated_activation(gate, up, activation=activation)
    grad_gate, grad_up = torch.autograd.grad(h, (gate, up), torch.ones_like(h))
    torch.testing.assert_close(h.detach(), torch.where(gate > 0, gate * 0.5, 0.0).detach())
    torch.testing.assert_close(grad_up, torch.where(gate > 0, gate, 0.0).detach())
    torch.testing.assert_close(grad_gate, 0.5 * torch.tensor([0, 0, 0, 0.5, 1, 1, 1], device=backend.device))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@ACTIVATIONS
@MLP
def test_blocks_of_every_activation(backend, activation, dropout_p):
    for ranks in (((4,), (4,), (4,)), ((), (2,), ()), ((), (), (3, 1)), ((), (), ())):
        problem = MlpProblem(19, 13, 11, ranks, activation=activation, dropout_p=dropout_p, device=backend.device)
        assert_within_rounding(problem, problem.run())


@MLP
def test_a_block_of_no_adapters_that_trains_keeps_its_activation_out(backend):
    """All weights train: gate and up are kept, the product is computed again."""
    problem = MlpProblem(19, 16, 32, ((), (), ()), device=backend.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        problem.call()
    assert sum(t.shape == (19, 32) for t in saved) == 2


@pytest.mark.parametrize("padding_idx", [None, 0, 2, -29], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
@EMBEDDING
def test_padding(backend, ids_dtype, padding_idx):
    """As in F.embedding: the row is read, but gets no gradient, neither in W nor in A."""
    problem = EmbeddingProblem((5, 40), padding_idx=padding_idx, ids_dtype=ids_dtype, device=backend.device)
    result = problem.run()
    assert_within_rounding(problem, result)
    if padding_idx is not None:
        assert bool((problem.ids == padding_idx % problem.v).any())
        assert not result[1]["weight"][padding_idx].any()
        assert not result[1]["lora_A"][:, padding_idx].any()


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (BF16, BF16)], ids=dtype_id)
@EMBEDDING
def test_an_index_that_occurs_often(backend, dtypes):
    """4,000 times one token: its gradient is summed in float32, where a bfloat16 sum would stop at 256."""
    problem = EmbeddingProblem(
        4000, 3, 8, 2, dtype=dtypes[0], adapter_dtype=dtypes[1], scaling=1.0, device=backend.device
    )
    problem.ids = torch.full_like(problem.ids, 1)
    problem.tensors["lora_B"] = torch.ones_like(problem.tensors["lora_B"]).detach().requires_grad_()
    problem.grad_y = torch.ones_like(problem.grad_y)
    problem.freeze_all_but("lora_A", "lora_B")
    _, grads = problem.run()
    assert grads["lora_A"][:, 1].tolist() == [float(torch.tensor(32000.0).to(dtypes[1]))] * 2
    assert not grads["lora_A"][:, [0, 2]].any()


@EMBEDDING
def test_embeddings_of_few_indices_touch_few_rows(backend):
    """Rows that no index names get exact zeros, also next to NaN in the table."""
    problem = EmbeddingProblem(6, 12, device=backend.device)
    with torch.no_grad():
        problem.ids.copy_(torch.tensor([1, 1, 3, 3, 3, 5]))
        problem.tensors["lora_A"][:, 7] = float("nan")
        problem.tensors["weight"][8] = float("nan")
    y, grads = problem.run()
    assert bool(y.isfinite().all())
    named_rows = [1, 3, 5]
    others = [row for row in range(12) if row not in named_rows]
    assert not grads["weight"][others].any()
    assert not grads["lora_A"][:, others].any()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "counts", [(20,), (0, 20), (20, 0), (7, 13), (0, 0, 0, 20), (1, 0, 1, 0, 18), (0, 0), (3,) * 7], ids=str
)
@pytest.mark.parametrize("orphans", [0, 2])
@EXPERTS
def test_segments(backend, orphans, counts, dropout_p):
    """Experts without rows, with one, with all; rows of nobody are 0 and get no gradient."""
    problem = ExpertProblem(counts, 21, 17, 3, orphans=orphans, dropout_p=dropout_p, device=backend.device)
    y, grads = problem.run()
    assert_within_rounding(problem, (y, grads))
    if orphans:
        assert not y[-orphans:].any()
        assert not grads["x"][-orphans:].any()
    for e, count in enumerate(counts):
        if count == 0:
            assert not any(grads[name][e].any() for name in ("weight", "bias", "lora_A", "lora_B"))


@EXPERTS
def test_rows_of_nobody_leak_nowhere(backend):
    """NaN in x and dY behind the last offset."""
    problem = ExpertProblem((4, 6), 21, 17, 3, orphans=3, dropout_p=0.3, device=backend.device)
    clean = named(problem.run())
    x, grad_y = problem.tensors["x"].detach().clone(), problem.grad_y.clone()
    x[-3:], grad_y[-3:] = float("nan"), float("nan")
    problem.grad_y = grad_y
    for name, value in named(problem.run(x=x.requires_grad_())).items():
        assert torch.equal(value, clean[name]), name
