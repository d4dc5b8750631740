"""What `compiling` reads in PTX is in the machine code too, of a product with copies of each kind."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels.kernels.triton import _launch
from tests.aot import compiling

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from tests.aot.test_compile_lora_linear import BF16, F32, PERSISTENT, Case, _compiled


@pytest.mark.parametrize(
    "case",
    [
        Case("down_projection", "sm_80", BF16, True, 8192, 128, "S"),
        Case("extended_gemm", "sm_80", F32, False, 8192, 128, "y"),
        Case("extended_gemm", "sm_90", BF16, False, 8192, 128, "y"),
        Case(PERSISTENT, "sm_90", BF16, False, 8192, 16, "y"),
        Case(PERSISTENT, "sm_100", BF16, False, 8192, 128, "dX"),
    ],
    ids=str,
)
def test_ptx_says_what_the_machine_code_does(monkeypatch, case):
    machine = _compiled(monkeypatch, case)
    families = {family for family in ("HMMA", "HGMMA", "UTCHMMA") if machine.count(rf"\b{family}\b")}
    assert families == {machine.tensor_core} - {"none"}
    assert machine.copies == machine.count(r"\bLDGSTS\b")
    assert machine.wide_copies == machine.count(r"\bLDGSTS\.[.\w]*128\b")
    assert machine.bulk_copies == machine.count(r"\bUTMALDG\b")
    assert machine.copies + machine.bulk_copies > 0


def test_one_of_each_kind_is_compiled_by_default(monkeypatch):
    cases = ["80 narrow", "80 wide", "90 narrow", "90 wide"]
    monkeypatch.setattr(compiling, "WANTED", "")
    assert compiling.by_default(cases, lambda case: case[:2]) == ["80 wide", "90 wide"]
    monkeypatch.setattr(compiling, "WANTED", compiling.ALL)
    assert compiling.by_default(cases, lambda case: case[:2]) == cases
