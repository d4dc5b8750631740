"""out = x w + bias + scaling · drop(s b): a GEMM with one more K step of size r, in the same accumulator.

Forward: y = x Wᵀ + bias + scaling · S Bᵀ. Backward: dX = dY W + scaling · drop(dS A), the mask of the low-rank part
alone. The low-rank step comes first here, where the accumulator holds nothing else, so that scaling (in float32: s b is
not rounded) and the mask apply to it without a second accumulator; the persistent form has it last where it may.

Floor, M=8192, K=N=4096, r=16, bf16: 275 + 1.1 GFLOP = 349 us at 790 TFLOP/s (134 + 33 MB = 39 us at 4.3 TB/s). Forms:
pointers here, for any GPU, size and stride; TMA descriptors in `_extended_gemm_tma`; programs that walk the tiles and
start under the launch before them in `_extended_gemm_persistent`; `_extended_gemm_specialized`, an experiment.
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
from peft_kernels.kernels.triton._extended_gemm_persistent import _extended_gemm_persistent, output_descriptor
from peft_kernels.kernels.triton._extended_gemm_tma import _extended_gemm_tma, descriptors, fits, rows_fit
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
    *,
    overlap: bool = False,
) -> Tensor:
    """x w + bias + scaling · drop(s b) for x [M, K], w [K, N], s [M, r], b [r, N] of one dtype and any strides; [M, N].

    Dropout, when there is a seed, has the mask of a matrix [M, N].

    Args:
        overlap: the launch before this one on this stream was an ordinary one, wrote `s`, and wrote nothing else that
            is read here. The GEMM may then start under it (`_launch.OVERLAP`).
    """
    (m, k), n, r = x.shape, w.shape[1], b.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    form, config = _form(x, w, s, b, out, seed is not None)
    if form == SPECIALIZED:
        _launch_specialized(x, w, s, b, scaling, bias, out, overlap, config)
        return out
    options: dict[str, Any] = {**config.options(), "BLOCK_R": min(_launch.padded_rank(r), config.block_r)}
    grid = _launch.blocks(m, config.block_m) * _launch.blocks(n, config.block_n)
    operands: tuple[Any, ...]
    trailing: tuple[Any, ...] = (out, seed)
    strides: tuple[int, ...] = ()
    if form == "extended_gemm_persistent":
        kernel, operands = _extended_gemm_persistent, (*descriptors(x, w, config), output_descriptor(out, config))
        grid = min(grid, _launch.multiprocessors(x.device))
        last = low_rank_last(x.dtype, seed is not None)
        options |= {
            "W_TRANSPOSED": w.stride(0) == 1,
            "LOW_RANK_LAST": last,
            # Elsewhere the flattened loop loses its pipeline (the step first) or breaks the compiler (sm_100).
            "FLATTEN": last and r <= config.block_r and _launch.architecture(x.device) == "sm_90",
            **_launch.overlapping(overlap, x.device),
        }
        trailing = (seed,)
    elif form == "extended_gemm_tma":
        kernel, operands = _extended_gemm_tma, descriptors(x, w, config)
        options["W_TRANSPOSED"] = w.stride(0) == 1
    else:
        kernel, operands, strides = _extended_gemm, (x, w), (*x.stride(), *w.stride())
        options["PRECISION"] = _launch.dot_precision(x.dtype)
    _launch.launch(
        kernel, (grid,), x.device,
        *operands, s, b, bias, *trailing, m, n, k, r, *strides,
        *s.stride(), *b.stride(), 0 if bias is None else bias.stride(0),
        -(-n // LANES), threshold(dropout_p), scaling * scale(dropout_p), **options,
    )  # fmt: skip
    return out


def low_rank_last(dtype: torch.dtype, dropout: bool) -> bool:
    """Where the persistent form puts the low-rank step; why: `_extended_gemm_persistent`."""
    return dtype == torch.bfloat16 and not dropout


SPECIALIZED = "extended_gemm_specialized"


def _form(x: Tensor, w: Tensor, s: Tensor, b: Tensor, out: Tensor, dropout: bool) -> tuple[str, Any]:
    """The first form that takes these strides and addresses and has a configuration for these sizes, and that."""
    arch = _launch.architecture(x.device)
    forms = ["extended_gemm"]
    if fits(x, w):
        forms.insert(0, "extended_gemm_tma")
        if rows_fit(out):
            forms.insert(0, "extended_gemm_persistent")
            if arch == "sm_90" and low_rank_last(x.dtype, dropout) and rows_fit(s) and rows_fit(_as_it_lies(b, w)):
                forms.insert(0, SPECIALIZED)
    sizes = {"m": _launch.bucket(x.shape[0]), "n": w.shape[1], "r": b.shape[0]}
    for form in forms:
        config = tuning.config(arch, form, x.dtype, dropout=dropout, **sizes)
        if config is not None:
            return form, config
    raise AssertionError(f"tuning has no configuration of extended_gemm for {arch}, {x.dtype}")


def _as_it_lies(b: Tensor, w: Tensor) -> Tensor:
    return b.t() if w.stride(0) == 1 else b


def _launch_specialized(x, w, s, b, scaling, bias, out, overlap, config) -> None:
    from peft_kernels.kernels.triton import _extended_gemm_specialized as specialized

    (m, k), (r, n) = x.shape, b.shape
    tiles = _launch.blocks(m, config.block_m) * _launch.blocks(n, config.block_n)
    options = config.options()
    _launch.launch(
        specialized._extended_gemm_specialized, (min(tiles, _launch.multiprocessors(x.device)),), x.device,
        *specialized.operands(x, w, out, s, b, config),
        bias, m, n, k, r, 0 if bias is None else bias.stride(0), scaling,
        **{name: options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps")},
        STAGES=config.num_stages, W_TRANSPOSED=w.stride(0) == 1,
        WARPS=specialized.PRODUCER_WARPS, REGISTERS=specialized.PRODUCER_REGISTERS,
        **_launch.overlapping(overlap, x.device),
    )  # fmt: skip


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
        BLOCK_M, BLOCK_N, BLOCK_R, False, PRECISION,
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
