"""The kernels of `multi_mask_linear` as machine code, and that their host side reads no id."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch, multi_mask_linear
from tests.aot.compiling import SHARED_MEMORY, Machine, by_default, compile_launches, disassemble
from tests.aot.test_compile_masked_linear import TENSOR_CORE, main_loop

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

BF16, F32 = torch.bfloat16, torch.float32
N, K, MASKS = 4096, 4096, 8
FORMS = {
    "multi_mask_gemm": "y", "multi_mask_grad_x": "dx", "multi_mask_grad_weight": "dW", "multi_mask_decode": "y",
}  # fmt: skip
# Instructions of the main loop, of the tiles for many rows: see docs/kernels_sparse.md.
MOST_INSTRUCTIONS = {
    ("sm_80", "multi_mask_gemm"): 165, ("sm_80", "multi_mask_grad_x"): 165, ("sm_80", "multi_mask_grad_weight"): 130,
    ("sm_90", "multi_mask_gemm"): 230, ("sm_90", "multi_mask_grad_x"): 230, ("sm_90", "multi_mask_grad_weight"): 180,
}  # fmt: skip


class Case(NamedTuple):
    """One launch: a kernel in the configuration of one rule, at the largest sizes that the rule admits."""

    arch: str
    kernel: str
    dtype: torch.dtype
    rows: int  # of each mask

    def __str__(self) -> str:
        return f"{self.arch}-{self.kernel}-{str(self.dtype).removeprefix('torch.')}-rows{self.rows}"


def _cases() -> Iterator[Case]:
    for kernel in FORMS:
        for arch in ("sm_80", "sm_90"):
            for rule in tuning.rules(arch, kernel):
                rows = 1 if kernel == "multi_mask_decode" else dict(rule.limits).get("m", 1024)
                yield Case(arch, kernel, getattr(torch, rule.dtype or "bfloat16"), rows)


EVERY = list(_cases())


def _kind(case: Case) -> tuple:
    """sm_90's for many rows, dx for y, whose kernel it is; of dW, which has two tiles of sums, both architectures'."""
    return case.kernel.replace("grad_x", "gemm"), case.arch if "weight" in case.kernel else None


CASES = by_default(EVERY, _kind)


def _launches(form: str, m: int, dtype: torch.dtype = BF16, n: int = N, k: int = K):
    x, grad_y, weight, bias = (
        torch.empty(*shape, dtype=dtype, device="meta") for shape in ((m, k), (m, n), (n, k), (n,))
    )
    words = torch.empty(MASKS, n, -(-k // 32), dtype=torch.int32, device="meta")
    ids = torch.empty(m, dtype=torch.int64, device="meta")
    if form == "y":
        return lambda: multi_mask_linear.forward(x, weight, words, ids, bias)
    return lambda: multi_mask_linear.backward(grad_y, x, weight, words, ids, (form == "dx", form == "dW", False))


def _kernel(monkeypatch, arch: str, launches) -> Machine:
    compiled = compile_launches(monkeypatch, arch, launches)
    (kernel,) = [each for each in compiled if each.metadata.name.startswith("_multi_mask")]
    return disassemble(kernel)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_configuration_of_tuning(monkeypatch, case):
    """On tensors without memory, of which no id can be read: one launch besides the list of tiles."""
    machine = _kernel(monkeypatch, case.arch, _launches(FORMS[case.kernel], case.rows * MASKS, case.dtype))
    assert machine.name == "_" + case.kernel.replace("grad_x", "gemm")
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    assert machine.tensor_core == ("none" if case.dtype == F32 else TENSOR_CORE[case.arch])
    assert machine.count(r"\bATOM") == machine.count(r"\bRED\b") == 0
    if case.dtype == F32:
        return
    loop = main_loop(machine)
    assert not re.findall(r"\bLDG\b", "\n".join(loop)), "something is not copied ahead"
    if case.rows == 1024:
        assert len(loop) <= MOST_INSTRUCTIONS[case.arch, case.kernel]
    if case.kernel == "multi_mask_decode":
        config = tuning.config(case.arch, case.kernel, case.dtype)
        assert len(loop) / (config.block_n * config.block_k / (32 * machine.warps)) <= 3.6


def test_every_rule_of_tuning_has_a_case():
    for arch in ("sm_80", "sm_90"):
        for kernel in FORMS:
            chosen = [
                tuning.config(arch, kernel, case.dtype, m=case.rows, n=N)
                for case in EVERY
                if (case.arch, case.kernel) == (arch, kernel)
            ]
            assert chosen == [rule.config for rule in tuning.rules(arch, kernel)]


def test_sizes_that_divide_nothing_compile(monkeypatch):
    assert _kernel(monkeypatch, "sm_90", _launches("y", 5, n=1001, k=1003)).local_bytes == 0
