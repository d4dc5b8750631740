"""`sparse_delta_linear` with its gradients gathered in Triton; the gathering itself is in `test_masked_linear.py`."""

from __future__ import annotations

import pytest
import torch

from peft_kernels import use_backend
from tests.helpers import assert_within_rounding
from tests.problems import SparseDeltaProblem
from tests.triton.launches import record_launches


@pytest.mark.parametrize(
    "options", [{}, {"deltas": 3}, {"dtype": torch.float16, "adapter_dtype": torch.float32}], ids=str
)
def test_right_to_rounding(monkeypatch, options):
    problem = SparseDeltaProblem(19, 67, 45, **options)
    launches = record_launches(monkeypatch)
    with use_backend("triton"):
        assert_within_rounding(problem, problem.run())
    assert "_grad_at" in launches
