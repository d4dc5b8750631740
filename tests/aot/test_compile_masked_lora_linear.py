"""The kernels of `masked_lora_linear` as machine code: what an update costs beside the mask and inside it."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels.kernels.triton import _launch
from tests.aot.compiling import SHARED_MEMORY, Machine, compile_launches, disassemble
from tests.aot.test_compile_masked_linear import TENSOR_CORE, loops

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._masked_lora_gemm import masked_lora_gemm, masked_update_gemm

BF16 = torch.bfloat16
N = K = 4096


class Case(NamedTuple):
    """One launch: y or dx with the update beside the mask (dx with dropout) or inside; `most` instructions of the main
    loop, see docs/kernels_sparse.md."""

    arch: str
    form: str
    r: int
    most: int

    def __str__(self) -> str:
        return f"{self.arch}-{self.form}-r{self.r}"


# Of each form what takes the most registers.
CASES = [
    Case("sm_80", "dx inside", 64, 290), Case("sm_90", "y inside", 16, 360), Case("sm_90", "dx inside", 64, 680),
    Case("sm_90", "dx beside", 64, 200),
]  # fmt: skip


def _launches(form: str, r: int, m: int = 8192):
    x, weight, a, b, s, bias = (
        torch.empty(*shape, dtype=BF16, device="meta") for shape in ((m, K), (N, K), (r, K), (N, r), (m, r), (N,))
    )
    words = torch.empty(N, K // 32, dtype=torch.int32, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    by_rows = form.startswith("dx")
    bias = None if by_rows else bias
    if form.endswith("inside"):
        return lambda: masked_update_gemm(x, weight, words, a, b, 2.0, bias, by_rows=by_rows)
    return lambda: masked_lora_gemm(x, weight, words, s, a, 2.0, bias, 0.1, seed, by_rows=by_rows)


def _compiled(monkeypatch, case: Case) -> Machine:
    (kernel,) = compile_launches(monkeypatch, case.arch, _launches(case.form, case.r))
    return disassemble(kernel)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_machine_code(monkeypatch, case):
    machine = _compiled(monkeypatch, case)
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    assert machine.tensor_core == TENSOR_CORE[case.arch]
    # The shortest, but for the low-rank step beside the mask, which is a loop too.
    loop = sorted(loops(machine), key=len)[case.form.endswith("beside")]
    assert len(loop) <= case.most
    assert not re.findall(r"\bLDG\b", "\n".join(loop)), "something is not copied ahead"
