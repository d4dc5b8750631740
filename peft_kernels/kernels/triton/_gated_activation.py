"""The kernels of `gated_activation`; their host side is in the file without the underscore."""

from __future__ import annotations

import triton
import triton.language as tl

TWO_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
TWO_ROOT_CUBE = tl.constexpr(0.07135481627260026)  # 0.044715 times that
INVERSE_ROOT_2 = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _sigmoid(x):
    """(σ(x), 1 - σ(x)), the smaller without cancellation."""
    small = tl.exp(-tl.abs(x))
    small /= 1.0 + small
    large = 1.0 - small
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def _gate(x, ACTIVATION: tl.constexpr):
    """(act(x) / x, the derivative of act at x)."""
    if ACTIVATION == "silu":
        gate, rest = _sigmoid(x)
        slope = gate + x * (gate * rest)
    elif ACTIVATION == "gelu":
        gate = 0.5 + 0.5 * tl.erf(x * INVERSE_ROOT_2)
        slope = gate + x * (tl.exp(-0.5 * x * x) * DENSITY_AT_0)
    else:
        square = x * x
        gate, rest = _sigmoid(x * (square * TWO_ROOT_CUBE + TWO_ROOT))  # (1 + tanh(z)) / 2 = σ(2 z)
        slope = gate + x * (gate * rest) * (square * (3.0 * TWO_ROOT_CUBE) + TWO_ROOT)
    return gate, slope


@triton.jit
def _place(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rows [BLOCK_M, 1], columns [1, BLOCK_N], which of them exist) of a program's tile, int64."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = (pid % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return rows, columns, (rows < M) & (columns < N)


@triton.jit(do_not_specialize=["M"])
def gated_activation(
    gate, up, out, M, N, stride_gm, stride_gn, stride_um, stride_un,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [M, N] (contiguous) = act(gate) ⊙ up."""
    rows, columns, inside = _place(M, N, BLOCK_M, BLOCK_N)
    x = tl.load(gate + rows * stride_gm + columns * stride_gn, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + rows * stride_um + columns * stride_un, mask=inside, other=0.0).to(tl.float32)
    gate_of_x, _ = _gate(x, ACTIVATION)
    h = x * gate_of_x * factor
    tl.store(out + rows * N + columns, h.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def gated_activation_backward(
    grad_h, gate, up, grad_gate, grad_up, M, N, stride_hm, stride_hn, stride_gm, stride_gn, stride_um, stride_un,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_gate = grad_h ⊙ up ⊙ act'(gate) and grad_up = grad_h ⊙ act(gate), both [M, N] contiguous."""
    rows, columns, inside = _place(M, N, BLOCK_M, BLOCK_N)
    x = tl.load(gate + rows * stride_gm + columns * stride_gn, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + rows * stride_um + columns * stride_un, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_h + rows * stride_hm + columns * stride_hn, mask=inside, other=0.0).to(tl.float32)
    part, slope = _gate(x, ACTIVATION)
    place = rows * N + columns
    tl.store(grad_up + place, (grad * (x * part)).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad_gate + place, (grad * factor * slope).to(grad_gate.dtype.element_ty), mask=inside)
