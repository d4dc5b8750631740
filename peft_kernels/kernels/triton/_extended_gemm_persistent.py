"""The extended GEMM as a persistent kernel (sm_90 and newer): a program for each multiprocessor walks its tiles.

Against one program per tile this saves the start of a program per tile, lets the bulk store of a tile run under the
next tile's loads, and makes room for the launch before it: under programmatic dependent launch the main loop, which
needs x and w alone, starts while the kernel that writes s still runs, and only the low-rank step waits for it.

Where the low-rank step stands (LOW_RANK_LAST):
  last   the wait comes after the first tile's main loop, so that the pass that made s is hidden. The accumulator then
         holds x w already and scaling cannot be applied to it: s is multiplied by it as it is loaded, in float32,
         rounded once more. bfloat16 only: scaling · s has a range of its own, which float16 does not have.
  first  the wait comes at the start and hides no more than the launch. float16, and dX under dropout, whose mask
         applies to the low-rank part alone.

Floor as in `_extended_gemm`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_kernels.kernels.triton._gemm_tile import add_bias, add_low_rank, low_rank, store, tile_of
from peft_kernels.tuning.configs import PersistentGemm


def output_descriptor(out: Tensor, config: PersistentGemm) -> TensorDescriptor:
    """Of out [M, N], in the parts that the epilogue stores."""
    return TensorDescriptor.from_tensor(out, [config.block_m, config.block_n // config.parts])


@triton.jit(do_not_specialize=["M", "threshold"])
def _extended_gemm_persistent(
    x, w, out, s, b, bias, seed, M, N, K, R,
    stride_sm, stride_sr, stride_br, stride_bn, stride_bias, groups, threshold, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, PARTS: tl.constexpr, W_TRANSPOSED: tl.constexpr, LOW_RANK_LAST: tl.constexpr,
    FLATTEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """As `_extended_gemm_tma`, with a descriptor of out. OVERLAP: launched under programmatic dependent launch, after
    the kernel that writes s; x, w, b and the bias were complete before that one started. FLATTEN, for R <= BLOCK_R and
    the step last: the two loops become one, and the loads of the next tile begin before the epilogue of this one."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    programs = tl.num_programs(0)
    if OVERLAP and not LOW_RANK_LAST:
        gdc_wait()
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        row, column = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        if LOW_RANK_LAST:
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        else:
            total = low_rank(
                s, b, seed, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, groups, threshold, factor,
                BLOCK_M, BLOCK_N, BLOCK_R, False, "ieee",
            )  # fmt: skip
        first_row, first_column = row.to(tl.int32), column.to(tl.int32)
        # K > 0: without `maximum` the compiler would keep a second, unused loop for K = 0, with the wait misplaced.
        for k in range(0, tl.maximum(K, 1), BLOCK_K):
            x_tile = x.load([first_row, k])
            if W_TRANSPOSED:
                w_tile = tl.trans(w.load([first_column, k]))
            else:
                w_tile = w.load([k, first_column])
            total = tl.dot(x_tile, w_tile, total)
        if LOW_RANK_LAST:
            if OVERLAP:
                gdc_wait()
            total = add_low_rank(
                total, s, b, row, column, M, N, R, stride_sm, stride_sr, stride_br, stride_bn, factor,
                BLOCK_M, BLOCK_N, BLOCK_R, FLATTEN, "ieee",
            )  # fmt: skip
        if OVERLAP and tile + 2 * programs >= tiles:
            gdc_launch_dependents()
        total = add_bias(total, bias, column, N, stride_bias, BLOCK_N)
        store(out, total, first_row, first_column, BLOCK_M, BLOCK_N, PARTS)
