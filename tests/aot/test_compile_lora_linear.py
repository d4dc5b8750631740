"""Every kernel of `lora_linear`, in each configuration that `tuning` can choose, as machine code for GPUs that are not
here: no spills, shared memory within the limit, tensor cores, 16-byte copies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.kernels.triton import _extended_gemm, _launch, philox_dropout, splitk_reduce
from tests.aot.compiling import SHARED_MEMORY, compile_launches, disassemble

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._down_projection import down_projection
from peft_kernels.kernels.triton._extended_gemm import extended_gemm
from peft_kernels.kernels.triton._grad_s_b import grad_s_b
from peft_kernels.kernels.triton._sum_over_rows import sum_over_rows

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
N, K, WIDEST_RANK, P = 4096, 4096, 128, 0.1


PERSISTENT = "extended_gemm_persistent"


class Case(NamedTuple):
    """One launch: a kernel in the configuration of one rule, at the largest sizes that the rule admits."""

    kernel: str
    arch: str
    dtype: torch.dtype
    dropout: bool
    m: int
    r: int
    form: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.arch}-{self.kernel}-{self.form}-{dtype}-m{self.m}-r{self.r}{'-dropout' * self.dropout}"


FORMS = {
    "down_projection": ("S",),
    "extended_gemm": ("y", "dX"),
    "extended_gemm_tma": ("y", "dX"),
    "extended_gemm_persistent": ("y", "dX"),
    "grad_s_b": ("dS+dB",),
    "sum_over_rows": ("dA",),
}


def _cases() -> Iterator[Case]:
    """With the mask where a rule serves both, since that takes the most registers; without it too on sm_90."""
    for arch in ARCHITECTURES:
        for kernel, forms in FORMS.items():
            for rule, form in itertools.product(tuning.rules(arch, kernel), forms):
                limits = dict(rule.limits)
                dtype = getattr(torch, rule.dtype or "bfloat16")
                for dropout in (False,) if form in ("y", "dS+dB") else (True, False):
                    case = Case(kernel, arch, dtype, dropout, limits.get("m", 8192), limits.get("r", 128), form)
                    if _chosen(case) == rule.config:
                        yield case
                        if arch != "sm_90" or rule.dtype == "float32":
                            break


def _chosen(case: Case):
    sizes = {"m": case.m, "n": N, "r": case.r}
    return tuning.config(case.arch, case.kernel, case.dtype, dropout=case.dropout, **sizes)


CASES = list(_cases())
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _launch_of(case: Case, n: int = N, k: int = K):
    """The host call of the case, on tensors without memory."""
    m, r = case.m, case.r
    x, grad_y, weight, a, b, s = (
        _meta(*shape, dtype=case.dtype) for shape in ((m, k), (m, n), (n, k), (r, k), (n, r), (m, r))
    )
    bias = _meta(n, dtype=case.dtype)
    dropout = (P, _meta(1, dtype=torch.int64)) if case.dropout else (0.0, None)
    return {
        "S": lambda: down_projection(x, a, *dropout),
        "y": lambda: extended_gemm(x, weight.t(), s, b.t(), 2.0, bias, overlap=True),
        "dX": lambda: extended_gemm(grad_y, weight, s, a, 2.0, None, *dropout, overlap=True),
        "dS+dB": lambda: grad_s_b(grad_y, s, b),
        "dA": lambda: sum_over_rows(s, x, 2.0, torch.float32, *dropout, overlap=True),
        "dB": lambda: sum_over_rows(s, grad_y, 2.0, torch.float32, transposed=True),
    }[case.form]


def _compiled(monkeypatch, case: Case, **sizes: int):
    if case.kernel == "extended_gemm":  # otherwise for operands that TMA cannot address
        monkeypatch.setattr(_extended_gemm, "fits", lambda x, w: False)
    elif case.kernel == "extended_gemm_tma":  # ... and this for results that it cannot
        monkeypatch.setattr(_extended_gemm, "rows_fit", lambda out: False)
    (kernel,) = compile_launches(monkeypatch, case.arch, _launch_of(case, **sizes))
    return disassemble(kernel)


def _expected_tensor_core(case: Case) -> str:
    if case.dtype == torch.float32:
        return "none"
    # Sums over rows multiply [r, M] by [M, K]: below 64 ranks too few for the warp-group instructions.
    narrow = case.kernel == "sum_over_rows" and case.r < 64
    return "HMMA" if narrow else TENSOR_CORE[case.arch]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_configuration_of_tuning(monkeypatch, case):
    machine = _compiled(monkeypatch, case)
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    assert machine.tensor_core == _expected_tensor_core(case)
    if case.kernel in ("extended_gemm_tma", "extended_gemm_persistent"):
        assert machine.copies == 0
        assert machine.bulk_copies >= 2, "global to shared memory not by TMA"
    else:
        assert machine.wide_copies == machine.copies > 0, "global to shared memory not in 16-byte copies"


def test_every_rule_of_tuning_is_compiled():
    for arch in ARCHITECTURES:
        for kernel in FORMS:
            compiled = {_chosen(case) for case in CASES if (case.arch, case.kernel) == (arch, kernel)}
            assert compiled == {rule.config for rule in tuning.rules(arch, kernel)}


@pytest.mark.parametrize("form", ["S", "y", "dX", "dS+dB", "dA", "dB"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_the_usual_rank(monkeypatch, form, dtype):
    kernel = {"y": PERSISTENT, "dX": PERSISTENT, "dB": "sum_over_rows"}.get(form)
    kernel = kernel or next(name for name, forms in FORMS.items() if form in forms)
    machine = _compiled(monkeypatch, Case(kernel, "sm_90", dtype, False, 8192, 16, form))
    assert machine.local_bytes == 0
    assert machine.tensor_core == ("HMMA" if kernel == "sum_over_rows" else "HGMMA")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tf32_uses_tensor_cores(monkeypatch, arch):
    monkeypatch.setattr(_launch, "dot_precision", lambda dtype: "tf32")
    machine = _compiled(monkeypatch, Case("extended_gemm", arch, F32, False, 8192, 16, "dX"))
    assert machine.tensor_core == TENSOR_CORE[arch]
    assert machine.local_bytes == 0


@pytest.mark.parametrize("form", ["S", "dX", "dS+dB", "dA"])
def test_sizes_that_divide_nothing_compile(monkeypatch, form):
    kernel = next(name for name, forms in FORMS.items() if form in forms)
    dropout = form != "dS+dB"
    machine = _compiled(monkeypatch, Case(kernel, "sm_90", BF16, dropout, 8191, 5, form), n=1001, k=1003)
    assert machine.shared_bytes <= SHARED_MEMORY["sm_90"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
def test_elementwise_kernels_move_16_bytes_a_thread(monkeypatch, arch, dtype):
    seed, partials = _meta(1, dtype=torch.int64), _meta(32, N, 16, dtype=F32)
    (drop,) = compile_launches(monkeypatch, arch, lambda: philox_dropout.forward(_meta(8192, K, dtype=dtype), P, seed))
    (reduce,) = compile_launches(monkeypatch, arch, lambda: splitk_reduce.forward(partials, 1.0, dtype))
    for machine, loads in ((disassemble(drop), 2), (disassemble(reduce), 8)):
        assert machine.local_bytes == 0
        assert machine.count(r"\bLDG\.[.\w]*128\b") >= loads
    assert disassemble(drop).count(r"\bSTG\.[.\w]*128\b") >= 2


def test_dropout_costs_one_philox_call_per_eight_elements(monkeypatch):
    """Philox 4x32-10 has 20 wide multiplications, the counter a few; a call per element would have eight times more."""
    form = Case("down_projection", "sm_90", BF16, True, 8192, 16, "S")
    config = _chosen(form)
    per_thread = config.block_m * config.block_k // (32 * config.num_warps)
    multiplications = _compiled(monkeypatch, form).count(r"\bIMAD\.(?:HI|WIDE)\.U32\b")
    assert 18 * per_thread / 8 <= multiplications <= 30 * per_thread / 8
