"""The extended GEMM with warps of two kinds (sm_90): one warp loads, two warp groups multiply and store.

Experimental: written in Gluon, whose interface still changes; compiled and read, never run anywhere, and taken only
where a tuning rule names it (none does). It computes what the persistent form with the low-rank step last computes, in
the same order and with the same roundings.

The producer runs ahead of the consumers by the depth of the ring, across tiles: the loads of a tile begin under the
epilogue of the one before it. S and b stream through the same ring as x and w, in boxes as wide as theirs, zero beyond
the rank, so that the low-rank step has no loads of its own to wait for. Its cost is that of BLOCK_K columns of the main
loop, 1.6 % at K = 4096.

Floor as in `_extended_gemm`.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from peft_kernels.tuning.configs import ExtendedGemm

_SWIZZLE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the name in Triton 3.6
PRODUCER_WARPS, PRODUCER_REGISTERS = 1, 24


def operands(
    x: Tensor, w: Tensor, out: Tensor, s: Tensor, b: Tensor, config: ExtendedGemm
) -> tuple[TensorDescriptor, ...]:
    """Descriptors of x [M, K], w, out [M, N], s [M, r] and b; w [K, N] and b [r, N] as they lie in memory, both turned
    where the first dimension of w is the contiguous one. The rows of each are such that TMA can address them."""
    rows, columns, inner = config.block_m, config.block_n, config.block_k
    turned = w.stride(0) == 1
    block = [columns, inner] if turned else [inner, columns]
    w, b = (w.t(), b.t()) if turned else (w, b)
    blocks = ((x, [rows, inner]), (w, block), (out, [rows, columns]), (s, [rows, inner]), (b, block))
    return tuple(TensorDescriptor.from_tensor(tensor, shape, _SWIZZLE) for tensor, shape in blocks)


@gluon.jit
def _tile(pid, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """As `_gemm_tile.tile_of`, int32."""
    blocks_m, blocks_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    tiles_in_group = GROUP_M * blocks_n
    first_m = pid // tiles_in_group * GROUP_M
    height = min(blocks_m - first_m, GROUP_M)
    return (first_m + pid % tiles_in_group % height) * BLOCK_M, pid % tiles_in_group // height * BLOCK_N


@gluon.jit
def _load(x, w, row, column, k, slot, phase, x_ring, w_ring, full, empty, W_TRANSPOSED: gl.constexpr):
    """One step of the ring: waits until the consumers have left the slot, then starts both copies into it."""
    BYTES: gl.constexpr = x.block_type.nbytes + w.block_type.nbytes
    mbarrier.wait(empty.index(slot), phase ^ 1)
    mbarrier.expect(full.index(slot), BYTES)
    tma.async_copy_global_to_shared(x, [row, k], full.index(slot), x_ring.index(slot))
    if W_TRANSPOSED:
        tma.async_copy_global_to_shared(w, [column, k], full.index(slot), w_ring.index(slot))
    else:
        tma.async_copy_global_to_shared(w, [k, column], full.index(slot), w_ring.index(slot))


@gluon.jit
def _next(slot, phase, STAGES: gl.constexpr):
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def _produce(
    x, w, s, b, M, N, K, R, x_ring, w_ring, full, empty,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    W_TRANSPOSED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)):
        row, column = _tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        for k in range(0, K, BLOCK_K):
            _load(x, w, row, column, k, slot, phase, x_ring, w_ring, full, empty, W_TRANSPOSED)
            slot, phase = _next(slot, phase, STAGES)
        if OVERLAP:
            gdc_wait()
        for rank in range(0, R, BLOCK_K):
            _load(s, b, row, column, rank, slot, phase, x_ring, w_ring, full, empty, W_TRANSPOSED)
            slot, phase = _next(slot, phase, STAGES)


@gluon.jit
def _consume(
    out, bias, M, N, K, R, stride_bias, factor, x_ring, w_ring, out_tile, full, empty,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    W_TRANSPOSED: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    tiles, programs = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), gl.num_programs(0)
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, programs):
        row, column = _tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        total = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.float32, MMA))
        previous = slot
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(full.index(slot), phase)
            right = w_ring.index(slot)
            if W_TRANSPOSED:
                right = right.permute((1, 0))
            total = warpgroup_mma(x_ring.index(slot), right, total, is_async=True)
            total = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(total,)))
            if k > 0:  # the step before this one is done
                _barrier()
                mbarrier.arrive(empty.index(previous), count=1)
            previous = slot
            slot, phase = _next(slot, phase, STAGES)
        product = warpgroup_mma_wait(0, deps=(total,))
        _barrier()
        mbarrier.arrive(empty.index(previous), count=1)
        for _ in range(0, R, BLOCK_K):
            mbarrier.wait(full.index(slot), phase)
            right = w_ring.index(slot)
            if W_TRANSPOSED:
                right = right.permute((1, 0))
            left = (x_ring.index(slot).load(LEFT).to(gl.float32) * factor).to(out.dtype)
            product = warpgroup_mma(left, right, product)
            _barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = _next(slot, phase, STAGES)
        if OVERLAP and tile + 2 * programs >= tiles:
            gdc_launch_dependents()
        if bias is not None:
            columns = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, MMA))
            values = gl.load(bias + columns * stride_bias, mask=columns < N, other=0.0)
            product += gl.expand_dims(values.to(gl.float32), 0)
        tma.store_wait(0)  # of the tile before: until here its copy had time
        _barrier()
        out_tile.store(product.to(out.dtype))
        fence_async_shared()
        _barrier()
        tma.async_copy_shared_to_global(out, [row, column], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _extended_gemm_specialized(
    x, w, out, s, b, bias, M, N, K, R, stride_bias, factor,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    W_TRANSPOSED: gl.constexpr, OVERLAP: gl.constexpr, WARPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out [M, N] = x w + bias + (factor · s) b by descriptors; w and b are [N, K] and [N, r] when W_TRANSPOSED."""
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, BLOCK_K], x.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES, w.block_type.shape[0], w.block_type.shape[1]], w.layout)
    out_tile = gl.allocate_shared_memory(out.dtype, out.block_type.shape, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    gl.warp_specialize(
        [
            (_consume, (
                out, bias, M, N, K, R, stride_bias, factor, x_ring, w_ring, out_tile, full, empty,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, W_TRANSPOSED, OVERLAP,
            )),
            (_produce, (
                x, w, s, b, M, N, K, R, x_ring, w_ring, full, empty,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES, W_TRANSPOSED, OVERLAP,
            )),
        ],
        [WARPS],
        [REGISTERS],
    )  # fmt: skip
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(stage))
        mbarrier.invalidate(empty.index(stage))
