"""The kernels of `masked_lora_linear` as machine code: what an update costs beside the mask and inside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton.masked_lora_linear import MOST_RANKS_INSIDE, MOST_RANKS_OF_PARTIALS
from tests.aot.compiling import SHARED_MEMORY, Machine, by_default, compile_launches, disassemble
from tests.aot.test_compile_masked_linear import TENSOR_CORE, loops

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._masked_grad_factors import masked_grad_factors
from peft_kernels.kernels.triton._masked_lora_gemm import masked_lora_gemm, masked_update_gemm

BF16, F32 = torch.bfloat16, torch.float32
N = K = 4096
KERNELS = ("masked_update_gemm", "masked_update_grad_x")
# Instructions of the main loop, of the tiles for many rows at the largest rank: see docs/kernels_sparse.md.
MOST_INSTRUCTIONS = {
    ("sm_80", "masked_update_gemm"): 280, ("sm_80", "masked_update_grad_x"): 290,
    ("sm_90", "masked_update_gemm"): 390, ("sm_90", "masked_update_grad_x"): 680,
}  # fmt: skip


class Case(NamedTuple):
    """One launch with the update inside the mask: a kernel in the configuration of one rule, at its largest sizes."""

    arch: str
    kernel: str
    dtype: torch.dtype
    m: int

    def __str__(self) -> str:
        return f"{self.arch}-{self.kernel}-{str(self.dtype).removeprefix('torch.')}-m{self.m}"


def _cases() -> Iterator[Case]:
    for arch in ("sm_80", "sm_90"):
        for kernel in KERNELS:
            for rule in tuning.rules(arch, kernel):
                dtype, m = getattr(torch, rule.dtype or "bfloat16"), dict(rule.limits).get("m", 8192)
                yield Case(arch, kernel, dtype, m)


def _kind(case: Case) -> tuple:
    """float32 once, whose tiles of y spilled when they were as wide as without an update; sm_80 for dx, which the
    compiler made twice as long with W as the second operand."""
    if case.dtype == F32 and case.kernel == "masked_update_gemm":
        return (F32,)
    return BF16, case.kernel, case.arch if case.kernel == "masked_update_grad_x" else None


EVERY = list(_cases())
CASES = by_default(EVERY, _kind)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _words() -> torch.Tensor:
    return _meta(N, K // 32, dtype=torch.int32)


def _launches(case: Case, r: int = MOST_RANKS_INSIDE):
    by_rows, dtype = case.kernel == "masked_update_grad_x", case.dtype
    x, weight, a, b = (_meta(*shape, dtype=dtype) for shape in ((case.m, K), (N, K), (r, K), (N, r)))
    bias = None if by_rows else _meta(N, dtype=dtype)
    return lambda: masked_update_gemm(x, weight, _words(), a, b, 2.0, bias, by_rows=by_rows)


def _kernel(monkeypatch, arch: str, launches) -> Machine:
    kernel, *_ = compile_launches(monkeypatch, arch, launches)
    machine = disassemble(kernel)
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[arch]
    return machine


def _loop(machine: Machine, number: int = 0) -> list[str]:
    """The shortest loop that multiplies, or the one after it, of which nothing is read straight from memory."""
    loop = sorted(loops(machine), key=len)[number]
    assert not re.findall(r"\bLDG\b", "\n".join(loop)), "something is not copied ahead"
    return loop


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_configuration_of_tuning(monkeypatch, case):
    machine = _kernel(monkeypatch, case.arch, _launches(case))
    assert machine.name == "_masked_update_gemm"
    assert machine.tensor_core == ("none" if case.dtype == F32 else TENSOR_CORE[case.arch])
    if case.dtype != F32 and case.m > 64:
        assert len(_loop(machine)) <= MOST_INSTRUCTIONS[case.arch, case.kernel]


def test_every_rule_of_tuning_has_a_case():
    for arch in ("sm_80", "sm_90"):
        for kernel in KERNELS:
            cases = [case for case in EVERY if (case.arch, case.kernel) == (arch, kernel)]
            chosen = [tuning.config(arch, kernel, case.dtype, m=case.m, n=N, r=MOST_RANKS_INSIDE) for case in cases]
            assert chosen == [rule.config for rule in tuning.rules(arch, kernel)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_gradients_of_the_factors(monkeypatch, arch):
    """With float32 adapters, whose products take the most registers."""
    grad_y, x = _meta(8192, N, dtype=BF16), _meta(8192, K, dtype=BF16)
    a, b = _meta(MOST_RANKS_OF_PARTIALS, K, dtype=F32), _meta(N, MOST_RANKS_OF_PARTIALS, dtype=F32)
    machine = _kernel(monkeypatch, arch, lambda: masked_grad_factors(grad_y, x, _words(), a, b, 2.0))
    assert (machine.name, machine.tensor_core) == ("_masked_grad_factors", TENSOR_CORE[arch])
    assert machine.wide_copies == machine.copies > 0
    assert machine.count(r"\bATOM") == machine.count(r"\bRED\b") == 0


def test_an_update_beside_the_mask(monkeypatch):
    """dx with dropout takes the most; its main loop is as long as without an update."""
    x, weight, a, s = (_meta(*shape, dtype=BF16) for shape in ((8192, N), (N, K), (64, K), (8192, 64)))
    seed = _meta(1, dtype=torch.int64)
    machine = _kernel(
        monkeypatch, "sm_90",
        lambda: masked_lora_gemm(x, weight, _words(), s, a, 2.0, None, 0.1, seed, by_rows=True),
    )  # fmt: skip
    assert (machine.name, machine.tensor_core) == ("_masked_lora_gemm", "HGMMA")
    assert machine.bulk_copies > 0
    assert len(_loop(machine, 1)) <= 200  # after the loop over ranks
