"""torch.compile(fullgraph=True) of each new op: forward and backward as in eager mode, one graph for every batch size.

Models and layers: `test_compile_models.py`.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import named
from tests.ops.cases import F64, LINEAR, NEW, problem_of


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def compiled_call(problem):
    """The problem's call between other ops, as a function of its tensors, compiled; its ids and seeds are arguments."""

    def call(tensors, ids):
        if ids is not None:
            problem.ids = ids
        y = problem.call({name: tensor if name != "x" else tensor * 1.0 for name, tensor in tensors.items()})
        return y + 0 if isinstance(y, torch.Tensor) else tuple(out + 0 for out in y)

    return torch.compile(call, fullgraph=True, backend="aot_eager")


# Without dropout a graph has no seeds, by the same few lines for all ops: with one seed, with several, with ids.
@pytest.mark.parametrize(
    ("op", "dropout_p"),
    [
        *((op, 0.25 if op in LINEAR else 0.0) for op in NEW),
        ("dora_linear", 0.0),
        ("lora_linear_group", 0.0),
        ("multi_lora_linear", 0.0),
    ],
)
def test_one_graph_for_every_batch_size(op, dropout_p):
    compiled = None
    for m in (6, 11, 40):
        problem = problem_of(op, m, 13, 9, 3, dropout_p=dropout_p, dtype=F64)
        ids = getattr(problem, "ids", None)
        for tensor in (*(problem.tensors.get(name) for name in ("x", "gate", "up")), ids):
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        if compiled is None:
            first, compiled = problem, compiled_call(problem)
        if "expert" in op:
            first.offsets = problem.offsets
        y = compiled(problem.tensors, ids)
        result = (y, problem.gradients(y, problem.tensors))
        if ids is not None:
            problem.ids = ids
        expected = named(problem.run())
        for name, value in named(result).items():
            torch.testing.assert_close(value.detach(), expected[name].detach(), rtol=1e-11, atol=1e-11, msg=name)
            assert value.stride() == expected[name].stride(), name
