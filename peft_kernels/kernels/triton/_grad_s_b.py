"""dS = dY B and dB = dYᵀ S from one pass over dY [M, N].

A program owns BLOCK_M rows and one of the splits of N. It accumulates dS in registers and writes the dB of its rows,
[BLOCK_N, r] for each tile, as one partial of a fixed-order sum (`splitk_reduce`): no atomics.

Floor: dY once; M=8192, N=4096, bf16, 4.3 TB/s: 15.6 us. The partials of dB, float32, written and read, add 4 r /
BLOCK_M of dY's bytes, part of them in L2: 25 % at r=16, BLOCK_M=256. Beyond the `max_r` of `tuning` a second pass
over dY costs less, and two passes run instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch


def grad_s_b(grad_y: Tensor, s: Tensor, b: Tensor, *, dropout: bool = False) -> tuple[Tensor, Tensor] | None:
    """(dY b [M, r] in dY's dtype, dYᵀ s as float32 partials [row blocks, N, r]), or None where two passes are the
    better way. The last launch is the one that writes dY b: the partials are left to the caller to add, later.

    grad_y [M, N], s [M, r], b [N, r] are of one dtype and any strides. `dropout`: the GEMM that follows has a mask, so
    that it cannot hide a pass that makes dS alone.
    """
    (m, n), r = grad_y.shape, b.shape[1]
    arch = _launch.architecture(grad_y.device)
    config = tuning.config(arch, "grad_s_b", grad_y.dtype, dropout=dropout, m=_launch.bucket(m), r=r)
    if config is None or m == 0 or n == 0:
        return None
    blocks_m = _launch.blocks(m, config.block_m)
    if 4 * blocks_m * n * r > config.scratch_mib << 20:
        return None
    splits, n_per_split = _launch.split(n, config.block_n, blocks_m, config.programs)
    grad_s = torch.empty((splits, m, r), dtype=grad_y.dtype if splits == 1 else torch.float32, device=grad_y.device)
    grad_b = torch.empty((blocks_m, n, r), dtype=torch.float32, device=grad_y.device)
    _launch.launch(
        _grad_s_b, (blocks_m, splits), grad_y.device,
        grad_y, s, b, grad_s, grad_b, m, n, r, n_per_split, *grad_y.stride(), *s.stride(), *b.stride(),
        BLOCK_R=_launch.padded_rank(r), PRECISION=_launch.dot_precision(grad_y.dtype),
        TRIGGER=_launch.overlaps(grad_y.device), **config.options(),
    )  # fmt: skip
    return grad_s[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(grad_s, 1.0, grad_y.dtype), grad_b


@triton.jit(do_not_specialize=["M"])
def _grad_s_b(
    grad_y, s, b, grad_s, grad_b, M, N, R, n_per_split,
    stride_ym, stride_yn, stride_sm, stride_sr, stride_bn, stride_br,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    TRIGGER: tl.constexpr,
):  # fmt: skip
    """grad_s [split, M, R] and grad_b [row block, N, R], both contiguous."""
    if TRIGGER:  # as in `_down_projection`
        gdc_launch_dependents()
    block_m, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    begin = split * n_per_split
    end = tl.minimum(begin + n_per_split, N)
    columns = (begin + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows_in, ranks_in = rows < M, ranks < R

    s_pointers = s + rows[:, None] * stride_sm + ranks[None, :].to(tl.int64) * stride_sr
    s_tile = tl.load(s_pointers, mask=rows_in[:, None] & ranks_in[None, :], other=0.0)
    y_pointers = grad_y + rows[:, None] * stride_ym + columns[None, :] * stride_yn
    b_pointers = b + columns[:, None] * stride_bn + ranks[None, :].to(tl.int64) * stride_br
    grad_b_pointers = grad_b + block_m * N * R + columns[:, None] * R + ranks[None, :]
    y_step, b_step = BLOCK_N * tl.cast(stride_yn, tl.int64), BLOCK_N * tl.cast(stride_bn, tl.int64)

    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for column in range(begin, end, BLOCK_N):
        columns_in = tl.arange(0, BLOCK_N) < end - column
        y_tile = tl.load(y_pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
        b_tile = tl.load(b_pointers, mask=columns_in[:, None] & ranks_in[None, :], other=0.0)
        total = tl.dot(y_tile, b_tile, total, input_precision=PRECISION)
        partial = tl.trans(tl.dot(tl.trans(s_tile), y_tile, input_precision=PRECISION))
        tl.store(grad_b_pointers, partial, mask=columns_in[:, None] & ranks_in[None, :])
        y_pointers += y_step
        b_pointers += b_step
        grad_b_pointers += BLOCK_N * R

    grad_s_pointers = grad_s + split.to(tl.int64) * M * R + rows[:, None] * R + ranks[None, :]
    tl.store(grad_s_pointers, total.to(grad_s.dtype.element_ty), mask=rows_in[:, None] & ranks_in[None, :])
