"""The kernels of `multi_mask_linear` as machine code, and that their host side reads no id."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels.kernels.triton import _launch, multi_mask_linear
from tests.aot.compiling import SHARED_MEMORY, Machine, compile_launches, disassemble
from tests.aot.test_compile_masked_linear import TENSOR_CORE, main_loop

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

BF16 = torch.bfloat16
N, K, MASKS = 4096, 4096, 8


class Case(NamedTuple):
    """One launch: y, dx or dW; `most` instructions of the main loop, see docs/kernels_sparse.md."""

    arch: str
    form: str
    m: int
    most: int

    def __str__(self) -> str:
        return f"{self.arch}-{self.form}-m{self.m}"


CASES = [
    Case("sm_80", "dx", 8192, 165), Case("sm_80", "dW", 8192, 130), Case("sm_90", "y", 8192, 230),
    Case("sm_90", "dW", 8192, 180), Case("sm_90", "y", 16, 450),
]  # fmt: skip


def _launches(form: str, m: int, n: int = N, k: int = K):
    x, grad_y, weight, bias = (
        torch.empty(*shape, dtype=BF16, device="meta") for shape in ((m, k), (m, n), (n, k), (n,))
    )
    words = torch.empty(MASKS, n, -(-k // 32), dtype=torch.int32, device="meta")
    ids = torch.empty(m, dtype=torch.int64, device="meta")
    if form == "y":
        return lambda: multi_mask_linear.forward(x, weight, words, ids, bias)
    return lambda: multi_mask_linear.backward(grad_y, x, weight, words, ids, (form == "dx", form == "dW", False))


def _compiled(monkeypatch, arch: str, form: str, m: int, **sizes: int) -> Machine:
    kernels = compile_launches(monkeypatch, arch, _launches(form, m, **sizes))
    (kernel,) = [each for each in kernels if each.metadata.name.startswith("_multi_mask")]
    return disassemble(kernel)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_machine_code(monkeypatch, case):
    """Without tensors that have memory the host could read no id: one launch, besides the list of tiles."""
    machine = _compiled(monkeypatch, case.arch, case.form, case.m)
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    assert machine.tensor_core == TENSOR_CORE[case.arch]
    assert machine.count(r"\bATOM") == machine.count(r"\bRED\b") == 0
    loop = main_loop(machine)
    assert len(loop) <= case.most
    assert not re.findall(r"\bLDG\b", "\n".join(loop)), "something is not copied ahead"


def test_sizes_that_divide_nothing_compile(monkeypatch):
    assert _compiled(monkeypatch, "sm_90", "y", 5, n=1001, k=1003).local_bytes == 0
