"""out = x w + bias + scaling · drop(s b): a GEMM that begins with one more K step of size r, in the same accumulator.

Forward: y = x Wᵀ + bias + scaling · S Bᵀ. Backward: dX = dY W + scaling · drop(dS A), the mask of the low-rank part
alone. The low-rank step comes first because only there the accumulator holds nothing else, so that scaling (in
float32: s b is not rounded) and the mask apply to it without a second accumulator.

Floor, M=8192, K=N=4096, r=16, bf16: 275 + 1.1 GFLOP = 349 us at 790 TFLOP/s (134 + 33 MB = 39 us at 4.3 TB/s). The
low-rank step is not overlapped with the loads of the main loop: an estimated 1.5-2 thousand clocks a tile, 2-3 % at
K=4096.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._philox import kept


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
    config = tuning.config(_launch.architecture(x.device), "extended_gemm", x.dtype, dropout=seed is not None, m=m, r=r)
    grid = (_launch.blocks(m, config.block_m) * _launch.blocks(n, config.block_n),)
    _launch.launch(
        _extended_gemm, grid, x.device,
        x, w, s, b, bias, out, seed, m, n, k, r,
        *x.stride(), *w.stride(), *s.stride(), *b.stride(), 0 if bias is None else bias.stride(0),
        -(-n // LANES), threshold(dropout_p), scaling * scale(dropout_p),
        PRECISION=_launch.dot_precision(x.dtype),
        **{**config.options(), "BLOCK_R": min(_launch.padded_rank(r), config.block_r)},
    )  # fmt: skip
    return out


@triton.jit
def _tile_of(pid, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Walks GROUP_M row blocks down before it moves to the next column block, so that tiles running together share
    rows of x and columns of w in L2."""
    tiles_in_group = GROUP_M * blocks_n
    first_m = pid // tiles_in_group * GROUP_M
    height = tl.minimum(blocks_m - first_m, GROUP_M)
    return first_m + pid % tiles_in_group % height, pid % tiles_in_group // height


@triton.jit(do_not_specialize=["M", "threshold"])
def _extended_gemm(
    x, w, s, b, bias, out, seed, M, N, K, R,
    stride_xm, stride_xk, stride_wk, stride_wn, stride_sm, stride_sr, stride_br, stride_bn, stride_bias,
    groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [M, N] (contiguous); `factor` multiplies s b where it is kept, everywhere when seed is None."""
    block_m, block_n = _tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_in, columns_in = rows < M, columns < N

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for rank in tl.range(0, R, BLOCK_R, num_stages=1):
        ranks = rank + tl.arange(0, BLOCK_R).to(tl.int64)
        ranks_in = ranks < R
        s_pointers = s + rows[:, None] * stride_sm + ranks[None, :] * stride_sr
        b_pointers = b + ranks[:, None] * stride_br + columns[None, :] * stride_bn
        s_tile = tl.load(s_pointers, mask=rows_in[:, None] & ranks_in[None, :], other=0.0)
        b_tile = tl.load(b_pointers, mask=ranks_in[:, None] & columns_in[None, :], other=0.0)
        total = tl.dot(s_tile, b_tile, total, input_precision=PRECISION)
    if seed is not None:
        keep = kept(tl.load(seed), rows, block_n * BLOCK_N, groups, threshold, BLOCK_M, BLOCK_N)
        total = tl.where(keep, total * factor, 0.0)
    else:
        total *= factor

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

    if bias is not None:
        values = tl.load(bias + columns * stride_bias, mask=columns_in, other=0.0)
        total += values.to(tl.float32)[None, :]
    out_pointers = out + rows[:, None] * N + columns[None, :]
    tl.store(out_pointers, total.to(out.dtype.element_ty), mask=rows_in[:, None] & columns_in[None, :])
