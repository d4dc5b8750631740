"""What can be tuned about each kernel. Blocks are sizes of a tile: M rows, N columns, K summed, R rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """`num_warps` and `num_stages` are Triton's; `programs` is how many thread blocks a split sum aims at."""

    num_warps: int

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch: tile sizes in capitals, as the kernels spell them, and Triton's options."""
        fields = asdict(self)
        return {name.upper() if name in _TILE else name: fields[name] for name in fields if name not in _HOST_ONLY}


_TILE = frozenset(("block", "block_m", "block_n", "block_k", "block_r", "group_m", "unroll", "parts"))
_HOST_ONLY = frozenset(("programs", "scratch_mib", "splits", "rows", "ranks"))


@dataclass(frozen=True)
class PhiloxDropout(Config):
    """`block` elements belong to a program, in rows of at most `block_k`."""

    block: int
    block_k: int


@dataclass(frozen=True)
class SplitkReduce(Config):
    """`unroll` partials are loaded ahead of their additions."""

    block: int
    unroll: int


@dataclass(frozen=True)
class DownProjection(Config):
    """`block_r` is the widest rank tile: larger ranks are split over programs, each reading x. The sum over K is split
    in up to `splits`, each of which is a partial for a second launch: 1 where the pass is to run under a GEMM."""

    block_m: int
    block_k: int
    block_r: int
    num_stages: int
    programs: int
    splits: int


@dataclass(frozen=True)
class ExtendedGemm(Config):
    """`block_r` is the widest low-rank step; `group_m` the row blocks that are walked before the next column block."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int
    num_stages: int


@dataclass(frozen=True)
class PersistentGemm(ExtendedGemm):
    """`parts` (1, 2 or 4): a tile is stored in so many pieces, each of which takes that much less shared memory."""

    parts: int


@dataclass(frozen=True)
class SinglePass(Config):
    """All rows of x belong to a program. `block_r` is the narrowest rank tile: wider ones follow the rank."""

    block_n: int
    block_k: int
    block_r: int
    num_stages: int
    programs: int


@dataclass(frozen=True)
class GradSB(Config):
    """`scratch_mib` is the most memory for the partials of dB; two passes over dY run where that is not enough."""

    block_m: int
    block_n: int
    num_stages: int
    programs: int
    scratch_mib: int


@dataclass(frozen=True)
class SumOverRows(Config):
    """`block_m` rows are summed per step, `block_k` columns belong to a program."""

    block_m: int
    block_k: int
    block_r: int
    num_stages: int
    programs: int


@dataclass(frozen=True)
class GatedActivation(Config):
    """`block` elements belong to a program, in rows of at most `block_n`."""

    block: int
    block_n: int


@dataclass(frozen=True)
class GradScale(Config):
    """`block_m` rows are taken per step, `block_n` columns belong to a program."""

    block_m: int
    block_n: int
    programs: int


@dataclass(frozen=True)
class DoraWeightNorm(Config):
    """`block_n` rows of the weight belong to a program; larger ranks than `block_r` read them again."""

    block_n: int
    block_k: int
    block_r: int
    num_stages: int


@dataclass(frozen=True)
class Nf4Dequantize(Config):
    """`block` elements belong to a program."""

    block: int


@dataclass(frozen=True)
class MaskPasses(Config):
    """`block` elements belong to a program, in rows of at most `block_k`, a multiple of 32."""

    block: int
    block_k: int


@dataclass(frozen=True)
class MaskedGemm(Config):
    """A tile of `block_m` by `block_n` is summed in steps of `block_k`, whichever dimension of the weight that is: of
    columns, which `block_n` counts for dx and `block_k` else, there are whole words of 32. The sum is split where fewer
    than `programs` tiles are there."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_stages: int
    programs: int


@dataclass(frozen=True)
class MaskedGradWeight(Config):
    """`block_n` rows by `block_k` columns of the weight, at most 2¹⁵, are summed in steps of `block_m` rows of x."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_stages: int


@dataclass(frozen=True)
class BlockGemm(Config):
    """Rows of a tile and terms of a step; fewer rows or smaller blocks of the weight cut both down. Indices are loaded
    before what they lead to, which takes some of the stages: of 5, two are of blocks and columns of x."""

    block_m: int
    block_k: int
    num_stages: int


@dataclass(frozen=True)
class BlockGradValues(Config):
    """`block_m` rows are summed in a step; the sum is split where there are fewer than `programs` blocks."""

    block_m: int
    num_stages: int
    programs: int


@dataclass(frozen=True)
class MultiMaskDecode(Config):
    """`block_n` by `block_k` weights stay in a program's registers."""

    block_n: int
    block_k: int
    num_stages: int


@dataclass(frozen=True)
class Nf4Gemm(Config):
    """N rows and K columns are those of the weight, `block_n` by `block_k` of which are decoded at a time. The sum is
    split where fewer than `programs` tiles are there. `block_r` and `group_m` as in `ExtendedGemm`. The kernels named
    "any" take rows whose blocks straddle them, and float32."""

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int
    num_stages: int
    programs: int


@dataclass(frozen=True)
class MultiDecode(Config):
    """`block_n` columns of y belong to a program, A x is summed in steps of `block_k`. One launch does for up to `rows`
    rows and `ranks` ranks, two for more. The first two and `num_warps` are the order of the sums, and chosen by K and
    dtype alone, so that a row's bits depend on nothing else."""

    block_n: int
    block_k: int
    num_stages: int
    rows: int
    ranks: int


@dataclass(frozen=True)
class MultiUpdate(Config):
    """Fields as in `ExtendedGemm`: there is nothing to sum but ranks."""

    block_m: int
    block_n: int
    block_r: int
    group_m: int


CONFIGS: dict[str, type[Config]] = {
    "gated_activation": GatedActivation,
    "grad_scale": GradScale,
    "dora_weight_norm": DoraWeightNorm,
    "group_down_projection": SumOverRows,
    "group_grad_s_b": GradSB,
    "group_sum_over_rows": SumOverRows,
    "product": ExtendedGemm,
    "product_tma": ExtendedGemm,
    "philox_dropout": PhiloxDropout,
    "splitk_reduce": SplitkReduce,
    "down_projection": DownProjection,
    "extended_gemm": ExtendedGemm,
    "extended_gemm_tma": ExtendedGemm,
    "extended_gemm_persistent": PersistentGemm,
    "extended_gemm_specialized": ExtendedGemm,  # experimental: no rule names it
    "single_pass": SinglePass,
    "grad_s_b": GradSB,
    "sum_over_rows": SumOverRows,
    "expert_down_projection": DownProjection,
    "expert_gemm": ExtendedGemm,
    "expert_gemm_tma": ExtendedGemm,
    "expert_sum_over_rows": SumOverRows,
    "multi_down_projection": DownProjection,
    "multi_gemm": ExtendedGemm,
    "multi_update": MultiUpdate,
    "multi_sum_over_rows": SumOverRows,
    "nf4_dequantize": Nf4Dequantize,
    "nf4_gemm": Nf4Gemm,
    "nf4_gemm_any": Nf4Gemm,
    "nf4_grad_x": Nf4Gemm,
    "nf4_grad_x_any": Nf4Gemm,
    "multi_decode": MultiDecode,
    "mask_passes": MaskPasses,
    "masked_gemm": MaskedGemm,
    "masked_gemm_tma": MaskedGemm,
    "masked_grad_x": MaskedGemm,
    "masked_grad_x_tma": MaskedGemm,
    "masked_grad_weight": MaskedGradWeight,
    "masked_grad_factors": MaskedGradWeight,
    "masked_update_gemm": MaskedGemm,
    "masked_update_grad_x": MaskedGemm,
    "multi_mask_gemm": MaskedGemm,
    "multi_mask_grad_x": MaskedGemm,
    "multi_mask_grad_weight": MaskedGradWeight,
    "multi_mask_decode": MultiMaskDecode,
    "block_gemm": BlockGemm,
    "block_grad_values": BlockGradValues,
}
