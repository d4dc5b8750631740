"""`sparse_linear` for at most 8 rows in CUDA, for layouts "bitmap" (`_bitmap`) and "csr" (`_csr`): one launch that
reads the weight once. Compiled for sm_80, sm_90a and sm_100; never run on a GPU yet (docs/kernels_sparse.md).
"""

from __future__ import annotations

import torch

from peft_kernels.kernels.composed import sparse_linear as composed
from peft_kernels.kernels.cuda import _bitmap, _csr
from peft_kernels.kernels.cuda._availability import next_implementation, not_an_nvidia_gpu, not_built
from peft_kernels.ops.sparse_linear import problem

MAX_ROWS = 8
DTYPES = (torch.float16, torch.bfloat16)
_BY_LAYOUT = {"bitmap": _bitmap, "csr": _csr}


def unsupported(problem) -> str | None:
    if (reason := not_an_nvidia_gpu(problem)) is not None:
        return reason
    if problem.layout not in _BY_LAYOUT:
        return f"for layouts {' and '.join(map(repr, _BY_LAYOUT))}; the weight has {problem.layout!r}"
    if problem.dtype not in DTYPES:
        return f"multiplies in float16 and bfloat16, not in {problem.dtype}"
    if problem.weight_dtype != problem.dtype:
        return f"for a weight of x's dtype, {problem.dtype}; its dtype is {problem.weight_dtype}"
    if problem.m > MAX_ROWS:
        return f"for at most {MAX_ROWS} rows; the weight would be read once for each {MAX_ROWS}"
    if problem.m == 0 or problem.n == 0 or problem.k == 0:
        return "nothing to compute"
    return _BY_LAYOUT[problem.layout].unsupported(problem) or not_built(problem)


def unproven(problem) -> str | None:
    return "not yet measured on a GPU against the alternatives"


def forward(x, weight, bias):
    y = _BY_LAYOUT[weight.layout].forward(x, weight, bias)
    return composed.forward(x, weight, bias) if y is None else y


def backward(grad_y, x, weight, needs):
    """The gradients by the implementation that is next in the order: this one has no kernel for them."""
    return next_implementation("sparse_linear", problem(grad_y, weight)).backward(grad_y, x, weight, needs)
