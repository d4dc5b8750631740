"""The kernels of `lora_expert_linear`, in each configuration that `tuning` can choose, as machine code, and that their
host side needs no value of the offsets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch, lora_expert_linear
from tests.aot.compiling import SHARED_MEMORY, Machine, by_default, compile_launches, disassemble

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton import _expert_gemm
from peft_kernels.kernels.triton._expert_down_projection import expert_down_projection
from peft_kernels.kernels.triton._expert_gemm import expert_gemm
from peft_kernels.kernels.triton._expert_sum_over_rows import expert_sum_over_rows

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
E, N, K, WIDEST_RANK, P = 8, 1408, 2048, 128, 0.1
BF16, F32 = torch.bfloat16, torch.float32
FORMS = {
    "expert_down_projection": ("S",),
    "expert_gemm": ("y", "dX"),
    "expert_gemm_tma": ("y", "dX"),
    "expert_sum_over_rows": ("dA",),
}


class Case(NamedTuple):
    """One launch: a kernel in the configuration of one rule, at the largest sizes that the rule admits."""

    kernel: str
    arch: str
    dtype: torch.dtype
    dropout: bool
    rows: int  # for each expert
    r: int
    form: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.arch}-{self.kernel}-{self.form}-{dtype}-rows{self.rows}-r{self.r}{'-dropout' * self.dropout}"


def _compiled_for(arch: str, kernel: str, rule) -> bool:
    """sm_100 has the rules of sm_90 (a test below), and other instructions for 16-bit products only: one rule of each
    kernel shows it, the widest, and of sums over rows also one of few ranks, which multiply otherwise."""
    if arch != "sm_100":
        return True
    limits = dict(rule.limits)
    few = kernel == "expert_sum_over_rows" and limits.get("r") == 32 and rule.dropout
    return rule.dtype != "float32" and bool(not limits or few)


def _forms(arch: str, kernel: str, rule) -> tuple[str, ...]:
    """Where y and dX are the same kernel, dX takes the mask and with it the most registers: it is compiled by every
    rule. y, which adds the bias, is compiled by the widest one; in float32 on sm_80 in place of dX."""
    forms = FORMS[kernel]
    if len(forms) == 1:
        return forms
    if rule.dtype == "float32":
        return forms[:1] if arch == "sm_80" else forms[1:]
    if arch == "sm_100" and kernel == "expert_gemm":  # its y differs from that of TMA in the copies only
        return forms[1:]
    return forms[1:] if rule.limits else forms


def _cases() -> Iterator[Case]:
    for arch in ARCHITECTURES:
        for kernel in FORMS:
            for rule in tuning.rules(arch, kernel):
                if not _compiled_for(arch, kernel, rule):
                    continue
                limits, dtype = dict(rule.limits), getattr(torch, rule.dtype or "bfloat16")
                rows, r = limits.get("m", 8192), limits.get("r", WIDEST_RANK)
                for form in _forms(arch, kernel, rule):
                    for dropout in (False,) if form == "y" else (True, False):
                        case = Case(kernel, arch, dtype, dropout, rows, r, form)
                        if _chosen(case) == rule.config:
                            yield case
                            break  # the mask takes the most registers


def _chosen(case: Case):
    sizes = {"m": case.rows, "n": N, "r": case.r}
    return tuning.config(case.arch, case.kernel, case.dtype, dropout=case.dropout, **sizes)


def _kind(case: Case) -> tuple:
    """As of `lora_linear`: float32 once, sm_100 once a kernel, otherwise forms, few rows or many, few ranks of sums."""
    family = case.kernel.removesuffix("_tma")
    if case.dtype == F32:
        return "float32", family
    if case.arch == "sm_100":
        return case.arch, family
    return case.arch, case.kernel, case.form, case.rows < 1024, case.kernel == "expert_sum_over_rows" and case.r < 64


EVERY = list(_cases())
CASES = by_default(EVERY, _kind)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _launch_of(case: Case, n: int = N, k: int = K, e: int = E):
    """The host call of the case, on tensors without memory."""
    m, r = case.rows * e, case.r
    x, grad_y, weight, a, b, s, bias = (
        _meta(*shape, dtype=case.dtype)
        for shape in ((m, k), (m, n), (e, n, k), (e, r, k), (e, n, r), (m, r), (e, n))
    )  # fmt: skip
    offsets, one = _meta(e, dtype=torch.int32), _meta(1, 1, dtype=case.dtype).expand(m, 1)
    dropout = (P, _meta(1, dtype=torch.int64)) if case.dropout else (0.0, None)
    return {
        "S": lambda: expert_down_projection(x, a, offsets, *dropout),
        "y": lambda: expert_gemm(x, weight.mT, s, b.mT, offsets, 2.0, bias),
        "dX": lambda: expert_gemm(grad_y, weight, s, a, offsets, 2.0, None, *dropout),
        "dA": lambda: expert_sum_over_rows(s, x, offsets, 2.0, F32, *dropout),
        "dB": lambda: expert_sum_over_rows(s, grad_y, offsets, 2.0, F32, transposed=True),
        "dW": lambda: expert_sum_over_rows(grad_y, x, offsets, 1.0, case.dtype),
        "dbias": lambda: expert_sum_over_rows(one, grad_y, offsets, 1.0, F32, precision="ieee"),
    }[case.form]


def _compiled(monkeypatch, case: Case, **sizes: int) -> Machine:
    if case.kernel == "expert_gemm":  # otherwise for operands that TMA cannot address
        monkeypatch.setattr(_expert_gemm, "_fits", lambda x, w: False)
    return disassemble(compile_launches(monkeypatch, case.arch, _launch_of(case, **sizes))[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_configuration_of_tuning(monkeypatch, case):
    machine = _compiled(monkeypatch, case)
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    narrow = case.kernel == "expert_sum_over_rows" and case.r < 64  # too few rows for a warp group
    expected = "none" if case.dtype == F32 else "HMMA" if narrow else TENSOR_CORE[case.arch]
    assert machine.tensor_core == expected
    if case.kernel == "expert_gemm_tma":
        assert machine.copies == 0
        assert machine.bulk_copies >= 2, "global to shared memory not by TMA"
    else:
        assert machine.wide_copies == machine.copies > 0, "global to shared memory not in 16-byte copies"
    if machine.tensor_core == "HGMMA" and case.form in ("y", "dX"):
        assert "DEPBAR.LE gsb0, 0x1" in machine.sass, "each product of the main loop waits for its own end"


def test_every_rule_of_tuning_has_a_case():
    for arch in ARCHITECTURES:
        for kernel in FORMS:
            compiled = {_chosen(case) for case in EVERY if (case.arch, case.kernel) == (arch, kernel)}
            rules = [rule for rule in tuning.rules(arch, kernel) if _compiled_for(arch, kernel, rule)]
            assert compiled == {rule.config for rule in rules}
            assert arch != "sm_100" or tuning.rules(arch, kernel) == tuning.rules("sm_90", kernel)


@pytest.mark.parametrize(("form", "dropout"), [("S", True), ("dA", True), ("dA", False), ("dB", False), ("dW", False)])
def test_the_usual_rank(monkeypatch, form, dropout):
    kernel = "expert_down_projection" if form == "S" else "expert_sum_over_rows"
    machine = _compiled(monkeypatch, Case(kernel, "sm_90", BF16, dropout, 128, 16, form))
    assert machine.local_bytes == 0
    assert machine.wide_copies == machine.copies > 0
    assert machine.tensor_core == ("HGMMA" if form in ("S", "dW") else "HMMA")


ODD, ONE = (1001, 1003, 5), (1, 1, 1)


# Sizes of one, which Triton makes constants, in the two loops that there are: over columns and over rows.
@pytest.mark.parametrize(
    ("form", "n", "k", "e"),
    [*((form, *ODD) for form in ("S", "y", "dX", "dA", "dbias")), ("y", *ONE), ("dA", *ONE)],
    ids=str,
)
def test_sizes_that_divide_nothing_compile(monkeypatch, form, n, k, e):
    kernel = next((name for name, forms in FORMS.items() if form in forms), "expert_sum_over_rows")
    case = Case(kernel, "sm_90", BF16, form not in ("y", "dbias"), 77, 5, form)
    assert _compiled(monkeypatch, case, n=n, k=k, e=e).shared_bytes <= SHARED_MEMORY["sm_90"]


def test_the_host_reads_no_offset(monkeypatch):
    """Tensors without memory have no values: two launches forward and, with every gradient, six backward."""
    launched = []
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_launch, "launch", lambda kernel, *_, **options: launched.append(kernel.__name__))
    x, grad_y, weight = (_meta(*shape, dtype=BF16) for shape in ((8192, K), (8192, N), (64, N, K)))
    a, b = (_meta(*shape, dtype=F32) for shape in ((64, 16, K), (64, N, 16)))
    bias, offsets, seed = _meta(64, N, dtype=BF16), _meta(64, dtype=torch.int32), _meta(1, dtype=torch.int64)
    y, s = lora_expert_linear.forward(x, weight, bias, a, b, offsets, 2.0, P, seed)
    assert y.shape == (8192, N)
    assert launched == ["_expert_down_projection", "_expert_gemm"]
    launched.clear()
    lora_expert_linear.backward(grad_y, x, s, weight, a, b, offsets, 2.0, P, seed, (True,) * 5)
    assert launched == ["_expert_down_projection", "_expert_gemm", *["_expert_sum_over_rows"] * 4]
