"""The same situations for each op that has low-rank factors or belongs to them: one problem of each, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields

import pytest
import torch

from tests.backends import across
from tests.problems import (
    DoraProblem,
    EmbeddingProblem,
    ExpertProblem,
    GatedProblem,
    GroupProblem,
    LoraProblem,
    MaskedLoraProblem,
    MaskedProblem,
    MlpProblem,
    MultiExpertProblem,
    MultiLoraProblem,
    MultiMaskProblem,
    Nf4LoraProblem,
    Nf4Problem,
    Problem,
    SparseDeltaProblem,
    SparseProblem,
)

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# (dtype of x and W, dtype of A and B)
DTYPES = ((F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, F32))

NEW = (
    "lora_linear_group", "dora_linear", "gated_activation", "lora_swiglu_mlp", "lora_embedding", "lora_expert_linear",
    "multi_lora_linear", "multi_lora_expert_linear", "nf4_linear", "nf4_lora_linear", "masked_linear",
    "masked_lora_linear", "multi_mask_linear",
    "sparse_delta_linear", "sparse_linear",
)  # fmt: skip
# Ops of an x with dropout.
LINEAR = (
    "lora_linear_group",
    "dora_linear",
    "lora_swiglu_mlp",
    "lora_expert_linear",
    "multi_lora_linear",
    "multi_lora_expert_linear",
    "nf4_lora_linear",
    "masked_lora_linear",
)
RANKLESS = (
    "gated_activation",
    "nf4_linear",
    "masked_linear",
    "multi_mask_linear",
    "sparse_delta_linear",
    "sparse_linear",
)


def dtype_id(pair: tuple) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in pair]
    return names[0] if names[0] == names[1] else "+".join(names)


def _group(m, k, n, r, **options) -> Problem:
    """q with one adapter, k with none, v with two of other ranks and scalings."""
    ranks = ((r,), (), (max(1, r // 2), r // 3 + 1))
    options["dropout_p"] = [options.pop("dropout_p", 0.0)] * 3
    return GroupProblem(m, k, (n, max(1, n // 3), n // 2 + 1), ranks, scalings=(1.5, None, (0.5, -2.0)), **options)


def _mlp(m, k, n, r, **options) -> Problem:
    """Adapters of other ranks at gate and up, two at down."""
    return MlpProblem(m, k, n, ((r,), (max(1, r // 2),), (r // 3 + 1, r)), out=n // 2 + 1, **options)


def _experts(m, k, n, r, **options) -> Problem:
    """Three experts, of which one has no rows; the last row belongs to nobody."""
    return ExpertProblem((m // 3, 0, m - m // 3 - 1), k, n, r, orphans=1, **options)


def _multi(m, k, n, r, **options) -> Problem:
    """Adapters of several ranks, one without a part in the layer, one without rows, some rows without an adapter."""
    return MultiLoraProblem(m, k, n, (r, max(1, r // 2), None, r // 3 + 1, r), **options)


def _multi_experts(m, k, n, r, **options) -> Problem:
    """The experts and the adapters of both; the last row belongs to no expert."""
    ranks = (r, max(1, r // 2), None, r // 3 + 1, r)
    return MultiExpertProblem((m // 3, 0, m - m // 3 - 1), k, n, ranks, orphans=1, **options)


BUILDERS: dict[str, Callable[..., Problem]] = {
    "lora_linear": lambda m, k, n, r, **options: LoraProblem(m, k, n, r, lora_bias=True, **options),
    "lora_linear_group": _group,
    "dora_linear": lambda m, k, n, r, **options: DoraProblem(m, k, n, r, **options),
    "gated_activation": lambda m, k, n, r, **options: GatedProblem((m, n), **options),
    "lora_swiglu_mlp": _mlp,
    "lora_embedding": lambda m, k, n, r, **options: EmbeddingProblem(m, k, n, r, **options),
    "lora_expert_linear": _experts,
    "multi_lora_linear": _multi,
    "multi_lora_expert_linear": _multi_experts,
    "nf4_linear": lambda m, k, n, r, **options: Nf4Problem(m, k, n, **options),
    "nf4_lora_linear": lambda m, k, n, r, **options: Nf4LoraProblem(m, k, n, r, **options),
    "masked_linear": lambda m, k, n, r, **options: MaskedProblem(m, k, n, **options),
    "masked_lora_linear": lambda m, k, n, r, **options: MaskedLoraProblem(
        m, k, n, r, **{"update_masked": True, **options}
    ),
    "multi_mask_linear": lambda m, k, n, r, **options: MultiMaskProblem(m, k, n, **options),
    "sparse_delta_linear": lambda m, k, n, r, **options: SparseDeltaProblem(m, k, n, **options),
    "sparse_linear": lambda m, k, n, r, **options: SparseProblem(m, k, n, density=0.6, **options),
}
FIELDS = {
    "lora_linear": LoraProblem, "lora_linear_group": GroupProblem, "dora_linear": DoraProblem,
    "gated_activation": GatedProblem, "lora_swiglu_mlp": MlpProblem, "lora_embedding": EmbeddingProblem,
    "lora_expert_linear": ExpertProblem, "multi_lora_linear": MultiLoraProblem,
    "multi_lora_expert_linear": MultiExpertProblem,
    "nf4_linear": Nf4Problem, "nf4_lora_linear": Nf4LoraProblem,
    "masked_linear": MaskedProblem, "masked_lora_linear": MaskedLoraProblem, "multi_mask_linear": MultiMaskProblem,
    "sparse_delta_linear": SparseDeltaProblem, "sparse_linear": SparseProblem,
}  # fmt: skip


def options_of(op: str) -> set[str]:
    """What a problem of `op` can be told."""
    return {field.name for field in fields(FIELDS[op]) if field.init}


def problem_of(op: str, m: int = 34, k: int = 31, n: int = 23, r: int = 4, **options) -> Problem:
    """A problem of `op` of m rows, K = k (rows of the table for an embedding), N = n; options it lacks are ignored."""
    known = options_of(op)
    return BUILDERS[op](m, k, n, r, **{name: value for name, value in options.items() if name in known})


def tiny(op: str, **options) -> Problem:
    """For finite differences."""
    return problem_of(op, 4, 5, 4, 2, **options)


def over(names: str, ops: Iterable[str], cases: Sequence, id_of: Callable | None = None, **some: Sequence):
    """Parametrises a test by `backend` over implementations of `ops` and by `names` over the cases.

    A GPU's kernels take all of them. `some` names those of the implementations that differ in less: `reference` and
    `composed` leave sizes and ranks to PyTorch's matmuls, so that one case for each rule is all that they have. A case
    that is another's twin for an op without ranks, dropout or adapters of their own dtype is left out.
    """
    columns = names.split(",")
    parameters = []
    for op in ops:
        known = options_of(op)
        for placement in across(op):
            seen = set()
            for case in some.get(placement.values[0].name, cases):
                values = case if len(columns) > 1 else (case,)
                key = tuple(_matters(op, known, *pair) for pair in zip(columns, values, strict=True))
                if key not in seen:
                    seen.add(key)
                    name = "-".join([placement.id, *map(id_of or _id, values)])
                    parameters.append(pytest.param(*placement.values, *values, id=name, marks=placement.marks))
    return pytest.mark.parametrize(("backend", *columns), parameters, indirect=["backend"])


def _matters(op: str, known: set[str], column: str, value):
    if column == "dtypes" and "adapter_dtype" not in known:
        return value[0]
    without = {"dropout_p": "dropout_p" not in known, "r": op in RANKLESS}
    return None if without.get(column) else value


def _id(value) -> str:
    return dtype_id(value) if isinstance(value, tuple) and value and isinstance(value[0], torch.dtype) else str(value)
