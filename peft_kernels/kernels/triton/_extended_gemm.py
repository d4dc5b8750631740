"""out = x w + bias + scaling · drop(s b): a GEMM that begins with one more K step of size r, in the same accumulator.

Forward: y = x Wᵀ + bias + scaling · S Bᵀ. Backward: dX = dY W + scaling · drop(dS A), the mask of the low-rank part
alone. The low-rank step comes first because only there the accumulator holds nothing else, so that scaling (in
float32: s b is not rounded) and the mask apply to it without a second accumulator.

Floor, M=8192, K=N=4096, r=16, bf16: 275 + 1.1 GFLOP = 349 us at 790 TFLOP/s (134 + 33 MB = 39 us at 4.3 TB/s). The
low-rank step is not overlapped with the loads of the main loop: an estimated 1.5-2 thousand clocks a tile, 2-3 % at
K=4096. Two forms: pointers here, for any GPU, size and stride; TMA descriptors in `_extended_gemm_tma`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._extended_gemm_tma import _extended_gemm_tma, descriptors, fits
from peft_kernels.kernels.triton._gemm_tile import finish, low_rank, tile_of


def extended_gemm(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """x w + bias + scaling · drop(s b) for x [M, K], w [K, N], s [M, r], b [r, N] of one dtype and any strides; [M, N].

    Dropout, when there is a seed, has the mask of a matrix [M, N].
    """
    (m, k), n, r = x.shape, w.shape[1], b.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    arch, sizes = _launch.architecture(x.device), {"dropout": seed is not None, "m": m, "r": r}
    config = tuning.config(arch, "extended_gemm_tma", x.dtype, **sizes) if fits(x, w) else None
    strides: tuple[int, ...] = ()
    options: dict[str, Any] = {"W_TRANSPOSED": w.stride(0) == 1}
    if config is not None:
        kernel, operands = _extended_gemm_tma, descriptors(x, w, config)
    else:
        config = tuning.config(arch, "extended_gemm", x.dtype, **sizes)
        kernel, operands, strides = _extended_gemm, (x, w), (*x.stride(), *w.stride())
        options = {"PRECISION": _launch.dot_precision(x.dtype)}
    grid = (_launch.blocks(m, config.block_m) * _launch.blocks(n, config.block_n),)
    _launch.launch(
        kernel, grid, x.device,
        *operands, s, b, bias, out, seed, m, n, k, r, *strides,
        *s.stride(), *b.stride(), 0 if bias is None else bias.stride(0),
        -(-n // LANES), threshold(dropout_p), scaling * scale(dropout_p),
        **{**config.options(), "BLOCK_R": min(_launch.padded_rank(r), config.block_r)}, **options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["M", "threshold"])
def _extended_gemm(
    x, w, s, b, bias, out, seed, M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_sm, stride_sr, stride_br, stride_bn, stride_bias,
    groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N] (contiguous); `factor` multiplies s b where it is kept, everywhere when seed is None."""
    row, column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    total = low_rank(
        s, b, seed, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, groups, threshold, factor,
        BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    rows_in, columns_in = rows < M, columns < N
    inner = tl.arange(0, BLOCK_K)
    x_pointers = x + rows[:, None] * stride_xm + inner[None, :].to(tl.int64) * stride_xk
    w_pointers = w + inner[:, None].to(tl.int64) * stride_wk + columns[None, :] * stride_wn
    x_step, w_step = BLOCK_K * tl.cast(stride_xk, tl.int64), BLOCK_K * tl.cast(stride_wk, tl.int64)
    for k in range(0, K, BLOCK_K):
        inner_in = inner < K - k
        x_tile = tl.load(x_pointers, mask=rows_in[:, None] & inner_in[None, :], other=0.0)
        w_tile = tl.load(w_pointers, mask=inner_in[:, None] & columns_in[None, :], other=0.0)
        total = tl.dot(x_tile, w_tile, total, input_precision=PRECISION)
        x_pointers += x_step
        w_pointers += w_step
    finish(total, bias, out, row, column, M, N, stride_bias, BLOCK_M, BLOCK_N)
