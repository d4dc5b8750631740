"""The kernels of `sparse_linear` over whole blocks as machine code, and that their host side reads no index."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels.formats.sparse import BlockWeight
from peft_kernels.kernels.triton import _launch
from tests.aot.compiling import SHARED_MEMORY, Machine, compile_launches, disassemble

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._block_gemm import block_columns_gemm, block_rows_gemm
from peft_kernels.kernels.triton._block_grad_values import block_grad_values

TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA"}
BF16, F32 = torch.bfloat16, torch.float32
N, K, BLOCKS = 4096, 4096, 1600


class Case(NamedTuple):
    """One launch: y, dx or dV."""

    arch: str
    form: str
    block: int
    m: int = 8192
    dtype: torch.dtype = BF16

    def __str__(self) -> str:
        return f"{self.arch}-{self.form}-{self.block}-m{self.m}-{str(self.dtype).removeprefix('torch.')}"


# Each form with the largest blocks, whose tiles take the most registers and shared memory, and with usual ones.
CASES = [
    Case("sm_80", "y", 128), Case("sm_80", "dx", 64), Case("sm_80", "dV", 128), Case("sm_80", "y", 128, dtype=F32),
    Case("sm_90", "y", 64), Case("sm_90", "dx", 128), Case("sm_90", "dV", 64), Case("sm_90", "y", 32, 16),
]  # fmt: skip


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def weight_of(block: int, dtype: torch.dtype, n: int, k: int, blocks: int = BLOCKS) -> BlockWeight:
    r, c = -(-n // block), -(-k // block)
    indices = meta(2 * (r + c) + 2 + 4 * blocks, dtype=torch.int32)
    starts = torch.empty(r + c + 2, dtype=torch.int32, device="meta")
    return BlockWeight(meta(blocks, block, block, dtype=dtype), indices, starts, torch.Size((n, k)))


def compiled(monkeypatch, case: Case, n: int = N, k: int = K) -> Machine:
    weight = weight_of(case.block, case.dtype, n, k)
    x, grad_y, bias = (meta(*shape, dtype=case.dtype) for shape in ((case.m, k), (case.m, n), (n,)))
    host = {
        "y": lambda: block_rows_gemm(x, weight, bias),
        "dx": lambda: block_columns_gemm(grad_y, weight),
        "dV": lambda: block_grad_values(grad_y, x, weight),
    }[case.form]
    (launch,) = compile_launches(monkeypatch, case.arch, host)
    return disassemble(launch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_machine_code(monkeypatch, case):
    machine = compiled(monkeypatch, case)
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    few = case.m < 64  # rows for a warp group
    assert machine.tensor_core == ("none" if case.dtype == F32 else "HMMA" if few else TENSOR_CORE[case.arch])
    # Blocks and columns of x come in copies of 16 bytes; up to five stages fetch two indices ahead in copies of 4.
    assert machine.wide_copies > 0, "global to shared memory not in 16-byte copies"
    assert machine.copies - machine.wide_copies <= 10
    assert machine.count(r"\bATOM") == machine.count(r"\bRED\b") == 0


def test_sizes_that_divide_nothing_compile(monkeypatch):
    machine = compiled(monkeypatch, Case("sm_90", "y", 32, 77), n=1001, k=1003)
    assert machine.local_bytes == 0
