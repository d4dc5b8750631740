"""Prints what the kernels became for one architecture, for docs/kernels.md: `python -m tests.aot.table sm_90`."""

from __future__ import annotations

import sys

import pytest

from tests.aot import test_compile_nf4 as nf4
from tests.aot.test_compile_lora_linear import BF16, FEW, Case, _chosen, _compiled

HEADS = ("result", "kernel", "r", "tile", "warps, stages", "registers", "spilled", "shared KiB", "tensor", "copies")

LAUNCHES = (
    ("S = x Aᵀ", "down_projection", "S", False, 16),
    ("S = drop(x) Aᵀ", "down_projection", "S", True, 16),
    ("S = drop(x) Aᵀ", "down_projection", "S", True, 128),
    ("y", "extended_gemm_persistent", "y", False, 16),
    ("y", "extended_gemm_persistent", "y", False, 64),
    ("y", "extended_gemm_persistent", "y", False, 128),
    ("dX", "extended_gemm_persistent", "dX", False, 16),
    ("dX, dropout", "extended_gemm_persistent", "dX", True, 16),
    ("dX, dropout", "extended_gemm_tma", "dX", True, 16),
    ("y", "extended_gemm_tma", "y", False, 16),
    ("dX", "extended_gemm_tma", "dX", False, 16),
    ("dX, dropout", "extended_gemm_tma", "dX", True, 128),
    ("y", "extended_gemm", "y", False, 16),
    ("dX", "extended_gemm", "dX", False, 16),
    ("dX, dropout", "extended_gemm", "dX", True, 16),
    ("y, M <= 16", "single_pass", FEW, False, 16),
    ("dS and dB", "grad_s_b", "dS+dB", True, 16),
    ("dA", "sum_over_rows", "dA", False, 16),
    ("dA, dropout", "sum_over_rows", "dA", True, 16),
    ("dA, dropout", "sum_over_rows", "dA", True, 128),
)


def _row(label: str, case: Case, config) -> tuple:
    with pytest.MonkeyPatch.context() as patch:
        machine = _compiled(patch, case)
    tile = "x".join(str(getattr(config, f"block_{d}")) for d in "mnk" if hasattr(config, f"block_{d}"))
    bulk, wide = machine.bulk_copies, machine.wide_copies
    return (
        label,
        f"`{case.kernel}`",
        case.r,
        tile,
        f"{machine.warps}, {config.num_stages}",
        machine.registers,
        machine.local_bytes,
        round(machine.shared_bytes / 1024),
        f"{machine.count(machine.tensor_core)} {machine.tensor_core}",
        f"{bulk} TMA" if bulk else f"{wide} of {machine.copies} 16 B",
    )


HEADS_OF_4_BITS = (
    "kernel", "M up to", "tile M x N x K", "warps, stages", "registers", "spilled", "shared KiB", "tensor",
    "instructions a weight",
)  # fmt: skip


def _row_of_4_bits(case: nf4.Case) -> tuple:
    with pytest.MonkeyPatch.context() as patch:
        machine = nf4._compiled(patch, case)
    config = nf4._config(case)
    tensor = machine.tensor_core
    return (
        f"`{case.kernel}`",
        case.m,
        f"{config.block_m}x{config.block_n}x{config.block_k}",
        f"{machine.warps}, {config.num_stages}",
        machine.registers,
        machine.local_bytes,
        round(machine.shared_bytes / 1024),
        f"{machine.count(tensor)} {tensor}",
        f"{nf4.instructions_a_weight(machine, config):.1f}",
    )


def _print_4_bits(arch: str) -> None:
    print(f"\n| {' | '.join(HEADS_OF_4_BITS)} |\n{'|---' * len(HEADS_OF_4_BITS)}|")
    for case in nf4.CASES:
        if case.arch == arch and case.dtype != nf4.F32:
            print(f"| {' | '.join(map(str, _row_of_4_bits(case)))} |")


def main(arch: str) -> None:
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for label, kernel, form, dropout, r in LAUNCHES:
        case = Case(kernel, arch, BF16, dropout, 16 if form == FEW else 8192, r, form)
        config = _chosen(case)
        if config is not None:
            print(f"| {' | '.join(map(str, _row(label, case, config)))} |")
    _print_4_bits(arch)


if __name__ == "__main__":
    main(*sys.argv[1:])
