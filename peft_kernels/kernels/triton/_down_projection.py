"""S = drop(x) Aᵀ: x [M, K] is read once, the dropout mask is recomputed in registers, S [M, r] comes out.

The same kernel without dropout gives dS = dY B. Floor: x once; M=8192, K=4096, bf16, 4.3 TB/s: 15.6 us (r=16: 1.1
GFLOP, 1.4 us of tensor cores). Philox adds 16 instructions an element (compiled for sm_90), 0.125 issue slots of an
SM's 128 lanes against 0.112 clocks an element for the memory, so with dropout the pass is about 1.2 times the floor.

In bfloat16 up to rank 16 it is made to run under the GEMM that needs S: one small program for each multiprocessor, all
of them resident, beside which a program of `_extended_gemm_persistent` fits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from peft_kernels import tuning
from peft_kernels.kernels.reference.philox_dropout import LANES, scale, threshold
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._philox import kept


def down_projection(x: Tensor, a: Tensor, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """drop(x) aᵀ for x [M, K] and a [r, K] of one dtype and any strides; [M, r] in that dtype, summed in float32."""
    (m, k), r = x.shape, a.shape[0]
    config = tuning.config(
        _launch.architecture(x.device), "down_projection", x.dtype, dropout=seed is not None, m=_launch.bucket(m), r=r
    )
    block_r = min(_launch.padded_rank(r), config.block_r)
    tiles = _launch.blocks(m, config.block_m) * _launch.blocks(r, block_r)
    splits, k_per_split = _launch.split(k, config.block_k, tiles, config.programs, config.splits)
    out = torch.empty((splits, m, r), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    if m:
        _launch.launch(
            _down_projection, (min(tiles, config.programs), splits), x.device,
            x, a, out, seed, m, k, r, k_per_split, *x.stride(), *a.stride(),
            -(-k // LANES), threshold(dropout_p), scale(dropout_p),
            PRECISION=_launch.dot_precision(x.dtype), TRIGGER=_launch.overlaps(x.device),
            **{**config.options(), "BLOCK_R": block_r},
        )  # fmt: skip
    return out[0] if splits == 1 else torch.ops.peft_kernels.splitk_reduce(out, 1.0, x.dtype)


@triton.jit(do_not_specialize=["M", "threshold"])
def _down_projection(
    x, a, out, seed, M, K, R, k_per_split, stride_xm, stride_xk, stride_ar, stride_ak, groups, threshold, scale,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    TRIGGER: tl.constexpr,
):  # fmt: skip
    """out[split, M, R] (contiguous) = the sum over this split's columns of drop(x) aᵀ. No dropout when seed is None."""
    if TRIGGER:  # a GEMM launched to overlap starts its main loop as soon as all programs of this kernel run
        gdc_launch_dependents()
    split = tl.program_id(1)
    blocks_r = tl.cdiv(R, BLOCK_R)  # the rank blocks of the same rows run together and share x in L2
    begin = split * k_per_split
    end = tl.minimum(begin + k_per_split, K)
    if seed is not None:
        key = tl.load(seed)

    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * blocks_r, tl.num_programs(0)):
        rows = (tile // blocks_r).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        ranks = tile % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
        columns = begin + tl.arange(0, BLOCK_K)
        rows_in, ranks_in = rows < M, ranks < R
        x_pointers = x + rows[:, None] * stride_xm + columns[None, :].to(tl.int64) * stride_xk
        a_pointers = a + columns[:, None].to(tl.int64) * stride_ak + ranks[None, :].to(tl.int64) * stride_ar
        x_step, a_step = BLOCK_K * tl.cast(stride_xk, tl.int64), BLOCK_K * tl.cast(stride_ak, tl.int64)

        total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for column in range(begin, end, BLOCK_K):
            columns_in = tl.arange(0, BLOCK_K) < end - column
            x_tile = tl.load(x_pointers, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
            a_tile = tl.load(a_pointers, mask=columns_in[:, None] & ranks_in[None, :], other=0.0)
            if seed is not None:
                keep = kept(key, rows, column, groups, threshold, BLOCK_M, BLOCK_K)
                x_tile = tl.where(keep, x_tile, tl.zeros_like(x_tile))
            total = tl.dot(x_tile, a_tile, total, input_precision=PRECISION)
            x_pointers += x_step
            a_pointers += a_step

        if seed is not None:
            total *= scale  # once per result, unrounded, instead of once per element of x
        out_pointers = out + split.to(tl.int64) * M * R + rows[:, None] * R + ranks[None, :]
        tl.store(out_pointers, total.to(out.dtype.element_ty), mask=rows_in[:, None] & ranks_in[None, :])
