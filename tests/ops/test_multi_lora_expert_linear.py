"""`multi_lora_expert_linear`: each row of a batch is `lora_expert_linear` with its adapter, gradients too."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import functional
from peft_kernels.formats.adapter_table import AdapterLists
from peft_kernels.kernels._experts import virtual_adapters, virtual_ids
from peft_kernels.problems import Draw, nf4_weight
from tests.backends import everywhere
from tests.helpers import assert_as_accurate_as_eager, assert_within_rounding
from tests.problems import MultiExpertProblem

EVERYWHERE = pytest.mark.parametrize("backend", everywhere("multi_lora_expert_linear"), indirect=True)
F32, BF16 = torch.float32, torch.bfloat16

SITUATIONS = {
    "mixed ranks, an expert and an adapter without rows": {"ranks": (1, 8, 64, 96, None, 8), "orphans": 3},
    "base rows only": {"counts": (4, 5), "ids": [-1] * 9},
    "one adapter for all": {"counts": (4, 0, 5), "ids": [3] * 9},
    "one adapter, one expert": {"counts": (7,), "ranks": (6,), "ids": [0] * 7},
    "no rows": {"counts": (0, 0), "ids": torch.empty(0, dtype=torch.int64)},
    "nobody's rows only": {"counts": (0, 0), "orphans": 4, "ids": [0, 1, 2, 3]},
    "no adapters": {"counts": (3, 2), "ranks": (None, None), "ids": [0, 1, -1, 0, 1]},
    "several a row": {"per_row": 3, "orphans": 2},
    "other dropout for each": {"ranks": (3, 5, 8), "dropout_p": (0.0, 0.5, 1.0)},
}


@pytest.mark.parametrize(
    ("situation", "dropout_p"),
    [*((name, 0.0) for name in SITUATIONS), (next(iter(SITUATIONS)), 0.3), ("several a row", 0.3)],
)
@EVERYWHERE
def test_each_row_is_its_adapter_alone(backend, situation, dropout_p):
    """Forward and backward: training in one batch is training each adapter on its own rows."""
    problem = MultiExpertProblem(**{"dropout_p": dropout_p, **SITUATIONS[situation]}, device=backend.device)
    result = problem.run()
    assert_within_rounding(problem, result)
    y, grads = result
    t, mixes, ids = (
        problem.tensors,
        problem.tensors.get("adapter_weights"),
        problem.ids.reshape(problem.rows, problem.per_row),
    )
    zero = [t["x"].new_zeros(len(problem.counts), *size) for size in ((1, problem.k), (problem.n, 1))]
    arguments = (t["x"].detach(), t["weight"].detach())
    options = {"bias": t["bias"].detach(), "seed": problem.seed}
    base = functional.lora_expert_linear(*arguments, *zero, problem.offsets, **options)
    expected = base.clone()
    for adapter, r in enumerate(problem.ranks):
        if r is None:
            continue
        names = (f"lora_As.{adapter}", f"lora_Bs.{adapter}")
        factors = [t[name].detach().requires_grad_() for name in names]
        alone = functional.lora_expert_linear(
            *arguments, *factors, problem.offsets, scaling=problem.scalings[adapter],
            dropout_p=problem.probability(adapter), **options,
        )  # fmt: skip
        own = (ids == adapter).to(y.dtype)
        factor = (own if mixes is None else own * mixes.detach()).sum(1, keepdim=True)
        expected += factor * (alone.detach() - base)
        for name, grad in zip(names, torch.autograd.grad(alone, factors, problem.grad_y * factor), strict=True):
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-4, msg=name)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert not y[problem.rows - problem.orphans :].any()


@EVERYWHERE
def test_gradients_are_as_accurate_as_training_each_adapter_alone(backend):
    problem = MultiExpertProblem(
        (130, 0, 210), 132, 301, (12, 24, None, 96), dtype=BF16, adapter_dtype=F32, device=backend.device
    )
    assert_as_accurate_as_eager(problem, problem.run())


@pytest.mark.parametrize("wanted", ["x", "adapter_weights", "lora_As", "lora_Bs", "weight", "bias"])
@EVERYWHERE
def test_each_gradient_alone_where_rows_weigh_several(backend, wanted):
    """What is kept of the forward pass is what this gradient needs."""
    problem = MultiExpertProblem(ranks=(3, None, 8), per_row=2, dropout_p=0.2, orphans=1, device=backend.device)
    problem.freeze_all_but(wanted)
    result = problem.run()
    assert {name.partition(".")[0] for name in result[1]} == {wanted}
    assert_within_rounding(problem, result)


@EVERYWHERE
def test_one_expert_is_the_layer(backend):
    problem = MultiExpertProblem((30,), ranks=(4, None, 9), dropout_p=0.3, device=backend.device)
    (x, weight, lora_As, lora_Bs, _, ids), options = problem.arguments(problem.tensors)
    options["bias"] = options["bias"][0]
    layers = ([None if factor is None else factor[0] for factor in side] for side in (lora_As, lora_Bs))
    expected = functional.multi_lora_linear(x, weight[0], *layers, ids, **options)
    torch.testing.assert_close(problem.call(), expected, rtol=1e-5, atol=1e-5)


@EVERYWHERE
def test_over_four_bits(backend):
    """The base decoded gives the same, with a bias of another dtype than x, and its weight wants no gradient."""
    draw = Draw(backend.device)
    q = nf4_weight(draw, 4, 40, 48)
    problem = MultiExpertProblem(per_row=2, orphans=2, dropout_p=0.3, device=backend.device)
    problem.freeze_all_but("x", "bias", "adapter_weights", "lora_As", "lora_Bs")
    ys = [problem.call({**problem.tensors, "weight": w}) for w in (q, functional.nf4_dequantize(q, dtype=F32))]
    results = [(y.detach(), problem.gradients(y, problem.tensors)) for y in ys]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    narrow = MultiExpertProblem(dtype=BF16, adapter_dtype=F32, device=backend.device)
    bias = narrow.tensors["bias"].detach()
    same = [narrow.call({**narrow.tensors, "weight": q, "bias": b}) for b in (bias, bias.float())]
    assert same[1].dtype == BF16
    assert torch.equal(*same)


def test_virtual_adapters():
    """Adapter a at expert e is a E + e, a view; rows of nobody, of no adapter and of an id past the last are -1."""
    stacks = [torch.randn(3, 2, 5), torch.randn(3, 4, 5)], [torch.randn(3, 6, 2), torch.randn(3, 6, 4)]
    made = virtual_adapters(AdapterLists(*stacks, [0, 0], [0, 2], [1.5, -2.0], [4], 3), 3)
    assert (made.count, made.widths) == (9, [4])
    assert [v for v in range(9) if made.factors(0, v) is None] == [3, 4, 5]
    for v, (i, e) in {0: (0, 0), 2: (0, 2), 7: (1, 1)}.items():
        lora_A, lora_B, scaling, place = made.factors(0, v)
        assert (lora_A.data_ptr(), lora_B.data_ptr()) == tuple(side[i][e].data_ptr() for side in stacks)
        assert (scaling, place) == ((1.5, -2.0)[i], 3 * i + e)
    ids = torch.tensor([[2, -1], [0, 1], [1, 2], [2, 0], [0, 0]])
    ends = torch.tensor([2, 2, 4], dtype=torch.int32)
    assert virtual_ids(ids, ends).tolist() == [[6, -1], [0, 3], [5, 8], [8, 2], [-1, -1]]
