"""`nf4_lora_linear` for at most 16 rows in two launches: S = x Aᵀ, and csrc/nf4_linear.cu with S Bᵀ in its last stage,
which starts beside the first where the GPU can. Backward is `composed`'s, whose base product is `nf4_linear`'s.

Floor: that of `nf4_linear`, and A, B and S, 256 KB at K = N = 4096, r = 16. Never run on a GPU yet (docs/kernels.md).
"""

from __future__ import annotations

import torch

from peft_kernels import _native
from peft_kernels.checks import MAX_RANK
from peft_kernels.kernels.composed import nf4_lora_linear as composed
from peft_kernels.kernels.composed._passes import cast
from peft_kernels.kernels.cpu.nf4_dequantize import contiguous
from peft_kernels.kernels.cuda import nf4_linear

backward = composed.backward


def unsupported(problem) -> str | None:
    if problem.dropout:
        return "without dropout"
    if problem.r == 0 or problem.r > MAX_RANK:
        return f"for ranks from 1 to {MAX_RANK}; this one is {problem.r}"
    return nf4_linear.unsupported(problem)


def unproven(problem) -> str | None:
    return nf4_linear.unproven(problem)


def forward(x, q, bias, lora_A, lora_B, scaling, dropout_p, seed):
    if not nf4_linear.fits(q):
        return composed.forward(x, q, bias, lora_A, lora_B, scaling, dropout_p, seed)
    # Everything is in place before the first launch: nothing may come between the two.
    x, a, b = nf4_linear.aligned_rows(x), _rows(cast(lora_A, x.dtype)), _rows(cast(lora_B, x.dtype))
    q, bias = contiguous(q), None if bias is None else bias.contiguous()
    (m, k), r = x.shape, a.shape[0]
    s = torch.empty(m, r, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        _native.load("_cuda").lora_down(
            x.device.index, stream, m, r, k, _native.DTYPES[x.dtype], x.data_ptr(), x.stride(0), a.data_ptr(),
            a.stride(0), s.data_ptr(),
        )  # fmt: skip
    return nf4_linear.launch(x, q, bias, s, b, scaling), s


def _rows(matrix):
    """Itself, or a copy whose rows are dense."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
