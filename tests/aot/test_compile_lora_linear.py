"""Every kernel of `lora_linear`, in each configuration that `tuning` can choose, as machine code for GPUs that are not
here: no spills, shared memory within the limit, tensor cores, 16-byte copies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.kernels.triton import _extended_gemm, _launch, lora_linear, philox_dropout, splitk_reduce
from peft_kernels.tuning.configs import ExtendedGemm
from tests.aot.compiling import SHARED_MEMORY, by_default, compile_launches, disassemble

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._down_projection import down_projection
from peft_kernels.kernels.triton._extended_gemm import extended_gemm
from peft_kernels.kernels.triton._grad_s_b import grad_s_b
from peft_kernels.kernels.triton._single_pass import single_pass
from peft_kernels.kernels.triton._sum_over_rows import partial_sums

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
N, K, WIDEST_RANK, P = 4096, 4096, 128, 0.1


PERSISTENT, FEW = "extended_gemm_persistent", "y, few rows"


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
        dtype, form = str(self.dtype).removeprefix("torch."), self.form.replace(",", "").replace(" ", "-")
        return f"{self.arch}-{self.kernel}-{form}-{dtype}-m{self.m}-r{self.r}{'-dropout' * self.dropout}"


FORMS = {
    "down_projection": ("S",),
    "extended_gemm": ("y", "dX"),
    "extended_gemm_tma": ("y", "dX"),
    "extended_gemm_persistent": ("y", "dX"),
    "single_pass": (FEW,),
    "grad_s_b": ("dS+dB",),
    "sum_over_rows": ("dA",),
}


def _compiled_for(arch: str, kernel: str, rule) -> bool:
    """sm_100 has the rules of sm_90 (a test below). What differs there are the tensor cores, in 16-bit types and large
    tiles: one rule of each kernel shows it, the one of the widest tiles, and of sums over rows also one of few ranks,
    which multiply otherwise; of the persistent kernel also the one that serves the mask."""
    if arch != "sm_100":
        return True
    limits = dict(rule.limits)
    narrow = {"grad_s_b": 32, "sum_over_rows": 32, "extended_gemm_persistent": 16}.get(kernel)
    wide = "r" not in limits or (limits["r"] == narrow and (rule.dropout or kernel == "extended_gemm_persistent"))
    return rule.dtype not in ("float32", "float16") and "m" not in limits and bool(wide)


def _forms(arch: str, kernel: str, rule) -> tuple[str, ...]:
    """Where y and dX are the same kernel, dX takes the mask and with it the most registers: it is compiled by every
    rule. y, which adds the bias, is compiled by the widest one; in float32 on sm_80 in place of dX."""
    forms, limits = FORMS[kernel], dict(rule.limits)
    if len(forms) == 1:
        return forms
    if rule.dtype == "float32":
        return forms[:1] if arch == "sm_80" else forms[1:]
    if arch == "sm_100" and kernel == "extended_gemm":  # its y differs from that of TMA in the copies only
        return forms[1:]
    return forms[1:] if limits else forms


def _cases() -> Iterator[Case]:
    """With the mask where a rule serves both, since that takes the most registers."""
    for arch in ARCHITECTURES:
        for kernel in FORMS:
            for rule in tuning.rules(arch, kernel):
                if not _compiled_for(arch, kernel, rule):
                    continue
                limits = dict(rule.limits)
                dtype = getattr(torch, rule.dtype or "bfloat16")
                for form in _forms(arch, kernel, rule):
                    for dropout in (False,) if form.startswith("y") else (True, False):
                        case = Case(kernel, arch, dtype, dropout, limits.get("m", 8192), limits.get("r", 128), form)
                        if _chosen(case) == rule.config:
                            yield case
                            break


def _chosen(case: Case):
    sizes = {"m": case.m, "n": N, "r": case.r}
    return tuning.config(case.arch, case.kernel, case.dtype, dropout=case.dropout, **sizes)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _kind(case: Case) -> tuple:
    """In float32, where no tensor core multiplies, architectures have the same instructions; sm_100 has sm_90's rules.
    Otherwise kernels, their forms and masks, few rows or many, and few ranks of sums are kinds of their own."""
    family = case.kernel.partition("_tma")[0].partition("_persistent")[0]
    narrow = case.kernel == "sum_over_rows" and case.r < 64
    if case.dtype == F32:
        return "float32", family
    if case.arch == "sm_100":
        return case.arch, family
    mask = case.kernel == PERSISTENT and case.dropout
    return case.arch, case.kernel, case.form, mask, case.m < 1024, narrow


EVERY = list(_cases())
CASES = by_default(EVERY, _kind)


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
        FEW: lambda: single_pass(x, weight, bias, a, b, 2.0),
        "dX": lambda: extended_gemm(grad_y, weight, s, a, 2.0, None, *dropout, overlap=True),
        "dS+dB": lambda: grad_s_b(grad_y, s, b, dropout=case.dropout),
        "dA": lambda: partial_sums(s, x, *dropout, overlap=True),
        "dB": lambda: partial_sums(s, grad_y, transposed=True, overlap=True),
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


def test_every_rule_of_tuning_has_a_case():
    for arch in ARCHITECTURES:
        for kernel in FORMS:
            compiled = {_chosen(case) for case in EVERY if (case.arch, case.kernel) == (arch, kernel)}
            assert compiled == {rule.config for rule in tuning.rules(arch, kernel) if _compiled_for(arch, kernel, rule)}


@pytest.mark.parametrize("kernel", FORMS)
def test_sm_100_has_the_rules_of_sm_90(kernel):
    assert tuning.rules("sm_100", kernel) == tuning.rules("sm_90", kernel)


USUAL = [(form, BF16) for form in ("S", "y", "dX", "dS+dB", "dA", "dB")] + [("y", F16)]


@pytest.mark.parametrize(("form", "dtype"), USUAL, ids=str)
def test_the_usual_rank(monkeypatch, form, dtype):
    kernel = {"y": PERSISTENT, "dX": PERSISTENT, "dB": "sum_over_rows"}.get(form)
    kernel = kernel or next(name for name, forms in FORMS.items() if form in forms)
    # Without a mask bfloat16 takes two passes in place of the kernel for dS and dB.
    machine = _compiled(monkeypatch, Case(kernel, "sm_90", dtype, form == "dS+dB", 8192, 16, form))
    assert machine.local_bytes == 0
    assert machine.tensor_core == ("HMMA" if kernel == "sum_over_rows" else "HGMMA")


_EVENTS = re.compile(r"\b(ACQBULK|PREEXIT|LDGSTS|LDG|STG|UTMALDG|UTMASTG|HGMMA|DEPBAR\.LE gsb0, 0x[01])\b")


def _events(machine) -> list[str]:
    """What happens in the order of the machine code; ACQBULK is griddepcontrol.wait, PREEXIT launch_dependents."""
    return _EVENTS.findall(machine.sass)


def _gemm(monkeypatch, form: str, dropout: bool) -> list[str]:
    return _events(_compiled(monkeypatch, Case(PERSISTENT, "sm_90", BF16, dropout, 8192, 16, form)))


@pytest.mark.parametrize(("m", "shape"), [(1, "64x16x16"), (20, "64x32x16"), (64, "64x64x16")])
def test_few_rows_take_the_narrow_side_of_the_tensor_cores(monkeypatch, m, shape):
    """W's rows on the 64-row side: at one row of x the instruction is 16 wide, and three are in flight."""
    (kernel,) = compile_launches(
        monkeypatch, "sm_90", _launch_of(Case("single_pass", "sm_90", BF16, False, m, 16, FEW))
    )
    machine = disassemble(kernel)
    assert set(re.findall(r"HGMMA\.(\w+)", machine.sass)) == {shape}
    assert machine.count(r"\bHMMA\b") == 0
    assert "DEPBAR.LE gsb0, 0x2" in machine.sass


@pytest.mark.parametrize("form", ["y", "dX"])
def test_the_gemm_waits_for_s_after_its_main_loop(monkeypatch, form):
    """Under programmatic dependent launch x and W are loaded and multiplied before the wait, s, b and the bias are
    loaded after it; dependents are released after it too, because they rely on it."""
    events = _gemm(monkeypatch, form, dropout=False)
    wait = events.index("ACQBULK")
    before, after = events[:wait], events[wait:]
    assert events.count("ACQBULK") == 1
    assert {"UTMALDG", "HGMMA"} <= set(before)
    assert "DEPBAR.LE gsb0, 0x1" in before, "each product of the main loop waits for its own end"
    assert not {"LDG", "LDGSTS", "STG", "UTMASTG", "PREEXIT"} & set(before)
    assert {"LDG", "HGMMA", "UTMASTG", "PREEXIT"} <= set(after)
    assert "UTMALDG" not in after, "the loads of the next tile wait for the low-rank step"


SPECIALIZED = ExtendedGemm(num_warps=8, block_m=128, block_n=256, block_k=64, block_r=64, group_m=8, num_stages=3)


@pytest.mark.parametrize("form", ["y", "dX"])
def test_experimental_form_with_two_kinds_of_warps(monkeypatch, form):
    """Compiled only. One warp loads (240 registers for the others, 24 for it) and alone waits for S, between the loads
    of the main loop and those of the low-rank step; a product is in flight while the next is issued."""
    choose = tuning.config
    monkeypatch.setattr(
        tuning,
        "config",
        lambda arch, k, *a, **s: SPECIALIZED if k.endswith("_specialized") else choose(arch, k, *a, **s),
    )
    case = Case("extended_gemm_specialized", "sm_90", BF16, False, 8192, 16, form)
    (kernel,) = compile_launches(monkeypatch, "sm_90", _launch_of(case))
    machine = disassemble(kernel)
    assert machine.name == "_extended_gemm_specialized"
    assert machine.local_bytes == 0
    assert machine.shared_bytes <= SHARED_MEMORY["sm_90"]
    registers = re.findall(r"setmaxnreg\.(\w+)\.sync\.aligned\.u32\s+(\d+)", kernel.asm["ptx"])
    assert {("inc", "240"), ("dec", "24")} <= set(registers)
    events = _events(machine)
    producer = [event for event in events if event in ("UTMALDG", "ACQBULK")]
    wait = producer.index("ACQBULK")
    assert producer[:wait] == producer[wait + 1 :] == ["UTMALDG"] * wait
    consumer = events[max(i for i, event in enumerate(events) if event == "UTMALDG") + 1 :]
    assert consumer[:5] == ["HGMMA"] * 4 + ["DEPBAR.LE gsb0, 0x1"]
    assert "PREEXIT" in consumer
    assert "UTMASTG" in consumer


def test_no_rule_takes_the_experimental_form():
    assert not any(tuning.rules(arch, "extended_gemm_specialized") for arch in tuning.known_architectures())


def test_under_dropout_the_gemm_waits_first(monkeypatch):
    events = _gemm(monkeypatch, "dX", dropout=True)
    assert events[0] == "ACQBULK"
    assert events.count("ACQBULK") == 1
    assert "DEPBAR.LE gsb0, 0x1" in events
    assert events.index("PREEXIT") > events.index("UTMALDG")


def test_passes_beside_the_gemm(monkeypatch):
    """The pass for S releases its dependents at once and waits for nobody. Those for dA and dB wait at their end."""
    s = _events(_compiled(monkeypatch, Case("down_projection", "sm_90", BF16, False, 8192, 16, "S")))
    assert s[0] == "PREEXIT"
    assert "ACQBULK" not in s
    for form in ("dA", "dB"):
        events = _events(_compiled(monkeypatch, Case("sum_over_rows", "sm_90", BF16, False, 8192, 16, form)))
        assert events[0] == "PREEXIT"
        assert events[-1] == "ACQBULK"


def test_what_runs_beside_the_gemm_fits_beside_it(monkeypatch):
    """One program of each on a multiprocessor: 228 KiB of shared memory, 1 KiB of each program's for the system, and
    65536 registers, given to warps in units of 256."""
    gemm = _compiled(monkeypatch, Case(PERSISTENT, "sm_90", BF16, False, 8192, 16, "y"))
    for kernel, form, dropout in (
        ("down_projection", "S", False), ("down_projection", "S", True), ("sum_over_rows", "dA", False),
        ("sum_over_rows", "dB", False),
    ):  # fmt: skip
        other = _compiled(monkeypatch, Case(kernel, "sm_90", BF16, dropout, 8192, 16, form))
        assert gemm.shared_bytes + other.shared_bytes + 2048 <= 228 << 10, form
        assert sum(-(-machine.registers // 8) * 8 * 32 * machine.warps for machine in (gemm, other)) <= 1 << 16, form


def test_launches_of_a_whole_linear(monkeypatch):
    """Two forward and four backward, the sums of partials (`splitk_reduce`) not counted, and which may overlap."""
    launched = []
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(
        _launch, "launch", lambda kernel, *_, **options: launched.append((kernel.__name__, "launch_pdl" in options))
    )
    x, grad_y, weight = (_meta(*shape, dtype=BF16) for shape in ((8192, K), (8192, N), (N, K)))
    a, b = (_meta(*shape, dtype=F32) for shape in ((16, K), (N, 16)))
    _, s = lora_linear.forward(x, weight, None, a, b, 2.0, 0.0, None)
    assert launched == [("_down_projection", False), ("_extended_gemm_persistent", True)]
    launched.clear()
    lora_linear.backward(grad_y, x, s, weight, a, b, 2.0, 0.0, None, (True, False, False, True, True))
    passes = [("_sum_over_rows", True)] * 2
    assert launched == [("_down_projection", False), ("_extended_gemm_persistent", True), *passes]
    launched.clear()
    seed = _meta(1, dtype=torch.int64)
    lora_linear.backward(grad_y, x, s, weight, a, b, 2.0, 0.1, seed, (True, False, False, True, True))
    assert launched == [("_grad_s_b", False), ("_extended_gemm_persistent", True), ("_sum_over_rows", True)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_tf32_uses_tensor_cores(monkeypatch, arch):
    monkeypatch.setattr(_launch, "dot_precision", lambda dtype: "tf32")
    machine = _compiled(monkeypatch, Case("extended_gemm", arch, F32, False, 8192, 16, "dX"))
    assert machine.tensor_core == TENSOR_CORE[arch]
    assert machine.local_bytes == 0


@pytest.mark.parametrize("form", ["S", "dX", "dS+dB", "dA"])
def test_sizes_that_divide_nothing_compile(monkeypatch, form):
    kernel = next(name for name, forms in FORMS.items() if form in forms)
    machine = _compiled(monkeypatch, Case(kernel, "sm_90", BF16, True, 8191, 5, form), n=1001, k=1003)
    assert machine.shared_bytes <= SHARED_MEMORY["sm_90"]


@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", F32), ("sm_90", BF16), ("sm_100", BF16)], ids=str)
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
