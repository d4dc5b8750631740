"""The kernels over masks as machine code for GPUs that are not here: no spills, shared memory within the limit, tensor
cores, wide accesses, and what a mask costs in the main loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.formats.mask import words_of
from peft_kernels.formats.positions import Positions
from peft_kernels.kernels.triton import _launch, mask_apply, mask_pack, mask_unpack
from tests.aot.compiling import SHARED_MEMORY, Machine, by_default, compile_launches, disassemble

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._grad_at import grad_at
from peft_kernels.kernels.triton._masked_gemm import masked_gemm
from peft_kernels.kernels.triton._masked_grad_weight import masked_grad_weight

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
BF16, F32 = torch.bfloat16, torch.float32
N = K = 4096
# Instructions of the main loop a masked weight, of the tiles that `tuning` gives to many rows: see
# docs/kernels_sparse.md. The dense kernel of the same tile has 4.3 (sm_90), 2.7 (sm_90 by TMA) and 6.6 (sm_80).
MOST_INSTRUCTIONS = {("sm_80", False): 10.0, ("sm_90", False): 6.9, ("sm_90", True): 6.2}


class Case(NamedTuple):
    """One launch: a kernel in the configuration of one rule, at the largest sizes that the rule admits."""

    kernel: str
    arch: str
    dtype: torch.dtype
    m: int

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.arch}-{self.kernel}-{dtype}-m{self.m}"


KERNELS = ("masked_gemm", "masked_gemm_tma", "masked_grad_x", "masked_grad_x_tma", "masked_grad_weight")


def _cases() -> Iterator[Case]:
    """sm_100 has the rules of sm_90, of which those of many rows are compiled for it."""
    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            for rule in tuning.rules(arch, kernel):
                dtype, m = getattr(torch, rule.dtype or "bfloat16"), dict(rule.limits).get("m", 8192)
                if arch != "sm_100" or (m > 512 and dtype == BF16 and f"{kernel}_tma" not in KERNELS):
                    yield Case(kernel, arch, dtype, m)


def _kind(case: Case) -> tuple:
    """As of `lora_linear`: float32 once, products on sm_100 once, otherwise each kernel for few rows and for many."""
    family = case.kernel.removesuffix("_tma")
    if case.dtype == F32:
        return "float32", family
    if case.arch == "sm_100":
        return case.arch, family == "masked_grad_weight"
    return case.arch, case.kernel, case.m <= 64


EVERY = list(_cases())
CASES = by_default(EVERY, _kind)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _words(n: int, k: int) -> torch.Tensor:
    return _meta(n, words_of(k), dtype=torch.int32)


def _launch_of(case: Case, weight_dtype: torch.dtype | None = None):
    m, dtype = case.m, case.dtype
    x, grad_y = _meta(m, K, dtype=dtype), _meta(m, N, dtype=dtype)
    if case.kernel == "masked_grad_weight":
        return lambda: masked_grad_weight(grad_y, x, _words(N, K), weight_dtype or dtype)
    by_rows, tma = "grad_x" in case.kernel, case.kernel.endswith("_tma")
    weight = _meta(N, K, dtype=weight_dtype or dtype)
    if not tma and dtype != F32:  # overlapping rows, which TMA cannot address and pointers can
        weight = weight.as_strided((N, K), (K // 2, 1))
    bias = None if by_rows else _meta(N, dtype=dtype)
    return lambda: masked_gemm(grad_y if by_rows else x, weight, _words(N, K), bias, by_rows=by_rows)


def _compiled(monkeypatch, case: Case, **options) -> Machine:
    kernel, *sums = compile_launches(monkeypatch, case.arch, _launch_of(case, **options))
    assert all(other.metadata.name == "splitk_reduce" for other in sums)
    machine = disassemble(kernel)
    assert machine.bulk_copies > 0 or case.arch == "sm_100" or not case.kernel.endswith("_tma")
    return machine


def _config(case: Case):
    return tuning.config(case.arch, case.kernel, case.dtype, m=case.m, n=N)


def loops(machine: Machine) -> list[list[str]]:
    """The instructions of each loop that multiplies: waits for copies are loops too."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", machine.sass)
    lines = [(int(address, 16), text) for address, text in found]
    found_loops = []
    for address, text in lines:
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loop = [other for place, other in lines if int(jump[1], 16) <= place <= address]
            found_loops += [loop] * any("MMA" in other for other in loop)
    return found_loops


def main_loop(machine: Machine) -> list[str]:
    return min(loops(machine), key=len)


def instructions_a_weight(machine: Machine, config) -> float:
    return len(main_loop(machine)) / (config.block_n * config.block_k / (32 * machine.warps))


def _assert_sound(machine: Machine, case: Case) -> None:
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    assert machine.tensor_core == ("none" if case.dtype == F32 else TENSOR_CORE[case.arch])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_configuration_of_tuning(monkeypatch, case):
    machine = _compiled(monkeypatch, case)
    _assert_sound(machine, case)
    if case.dtype == F32 or case.arch == "sm_100":  # whose longest loop is the wait for a product
        return
    loop = "\n".join(main_loop(machine))
    assert not re.findall(r"\bLDG\b", loop), "something is not copied ahead"
    if case.arch == "sm_80":
        assert "LDSM" in loop, "an operand is read number by number"
    if case.kernel == "masked_grad_weight":
        assert machine.count(r"\bSTG\.E\.128") == machine.count(r"\bSTG\."), "the mask broke the wide stores"
    elif case.m > 64:
        most = MOST_INSTRUCTIONS[case.arch, case.kernel.endswith("_tma")]
        assert instructions_a_weight(machine, _config(case)) <= most


def test_every_rule_of_tuning_has_a_case():
    for arch in ("sm_80", "sm_90"):
        for kernel in KERNELS:
            compiled = [_config(case) for case in EVERY if (case.arch, case.kernel) == (arch, kernel)]
            assert compiled == [rule.config for rule in tuning.rules(arch, kernel)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_float32_weight_under_autocast(monkeypatch, arch):
    case = Case("masked_gemm", arch, BF16, 8192)
    _assert_sound(_compiled(monkeypatch, case, weight_dtype=F32), case)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_gathered_gradients(monkeypatch, arch):
    """Sums go to shared memory 8 bytes at a time and come from there one by one."""
    case = Case("masked_grad_weight", arch, BF16, 8192)
    places = Positions(_meta(1 << 20, dtype=torch.int32), torch.zeros(65, dtype=torch.int64), torch.Size((N, K)))
    grad_y, x = _meta(8192, N, dtype=BF16), _meta(8192, K, dtype=BF16)
    number, kernel = compile_launches(monkeypatch, arch, lambda: grad_at(grad_y, x, places, BF16))
    assert disassemble(number).local_bytes == 0
    _assert_sound(disassemble(kernel), case)


PASSES = {
    "pack a mask": lambda: mask_pack.forward(_meta(N, K, dtype=torch.bool), None, False),
    "pack scores": lambda: mask_pack.forward(_meta(N, K, dtype=F32), _meta(N, 1, dtype=F32), True),
    "unpack": lambda: mask_unpack.forward(_words(N, K), K),
    "apply": lambda: mask_apply.forward(_meta(N, K, dtype=BF16), _words(N, K), BF16),
    "apply rounding": lambda: mask_apply.forward(_meta(N, K, dtype=F32), _words(N, K), BF16),
    "apply in place": lambda: mask_apply.forward_(_meta(N, K, dtype=F32), _words(N, K)),
}


@pytest.mark.parametrize("name", PASSES)
def test_passes_over_masks(monkeypatch, name):
    """No spills, and 16 bytes a thread of everything but masks and thresholds."""
    (compiled,) = compile_launches(monkeypatch, "sm_90", PASSES[name])
    machine = disassemble(compiled)
    assert machine.local_bytes == 0
    accesses = machine.count(r"\b(?:LDG|STG)\.")
    assert machine.count(r"\b(?:LDG|STG)\.E\.128") >= 4
    assert accesses <= 20, "some are not"
