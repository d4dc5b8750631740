"""The kernels of groups, DoRA and the gated activation as machine code for GPUs that are not here: no spills, shared
memory within the limit, tensor cores, 16-byte copies. Each rule of `tuning` for sm_90; for sm_80 and sm_100 those of
the usual sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch, _product, dora_weight_norm, gated_activation
from tests.aot.compiling import SHARED_MEMORY, by_default, compile_launches, disassemble

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._dora_gemm import dora_gemm
from peft_kernels.kernels.triton._grad_scale import grad_scale
from peft_kernels.kernels.triton._group_gemm import group_gemm
from peft_kernels.kernels.triton._group_grad_s_b import group_grad_s_b
from peft_kernels.kernels.triton._group_grad_x import group_grad_x
from peft_kernels.kernels.triton._group_passes import group_down_projection, group_sum_over_rows

BF16, F32 = torch.bfloat16, torch.float32
M, K, NS, P = 8192, 4096, (4096, 1024), 0.1
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
# The first form of a kernel is compiled by every rule of sm_90, the others by the rule of the usual sizes.
FORMS = {
    "product": ("dX", "y", "u and y", "dX, dropout"),
    "product_tma": ("y", "u and y"),
    "group_down_projection": ("S, dropout", "S, token mask"),
    "group_grad_s_b": ("dS and dB", "dS and dB, token mask"),
    "group_sum_over_rows": ("dA, dropout",),
    "dora_weight_norm": ("norm", "norm, float32 adapters"),
}


# On sm_80 each kernel is compiled in the form of its mask, which takes the most registers; that of the adapter's dtype
# for the norm. The others have the same copies and products there.
SM_80 = ("y", "u and y", "dX, dropout", "S, dropout", "dS and dB, token mask", "dA, dropout", "norm, float32 adapters")


class Case(NamedTuple):
    kernel: str
    arch: str
    dtype: torch.dtype
    m: int
    r: int
    form: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.arch}-{self.kernel}-{self.form}-{dtype}-m{self.m}-r{self.r}"


def _cases() -> Iterator[Case]:
    for kernel, (first, *others) in FORMS.items():
        for rule in tuning.rules("sm_90", kernel):
            limits = dict(rule.limits)
            form = "dX, dropout" if rule.dropout else first
            dtype = getattr(torch, rule.dtype or "bfloat16")
            yield Case(kernel, "sm_90", dtype, limits.get("m", M), limits.get("r", 64), form)
        for form in others:
            yield Case(kernel, "sm_90", BF16, M, 16, form)
        for form in (first, *others):
            if form in SM_80 and tuning.rules("sm_80", kernel):
                yield Case(kernel, "sm_80", BF16, M, 16, form)
    for form in (*FORMS["product_tma"], "dX"):
        yield Case("product_tma", "sm_100", BF16, M, 16, form)


def _kind(case: Case) -> tuple:
    """As of `lora_linear`: sm_100 once, otherwise forms, dtypes, few rows or many, and few ranks of sums over rows."""
    if case.arch == "sm_100":
        return (case.arch,)
    narrow = case.kernel == "group_sum_over_rows" and case.r < 64
    return case.arch, case.kernel, case.form, case.dtype, case.m < 1024, narrow


EVERY = list(_cases())
CASES = by_default(EVERY, _kind)


def _meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _host(case: Case):
    """The host call of the case, on tensors without memory."""
    m, r, dtype, count = case.m, case.r, case.dtype, len(NS)
    x, grad_ys = _meta(m, K, dtype=dtype), [_meta(m, n, dtype=dtype) for n in NS]
    weights, bs = [_meta(n, K, dtype=dtype) for n in NS], [_meta(n, r, dtype=dtype) for n in NS]
    s, a, ranks = _meta(m, count * r, dtype=dtype), _meta(count * r, K, dtype=dtype), [r] * count
    one_s, one_a, bias = _meta(m, r, dtype=dtype), _meta(r, K, dtype=dtype), _meta(NS[0], dtype=dtype)
    vectors, columns = (
        (_meta(NS[0], dtype=F32), _meta(NS[0], dtype=F32)),
        [slice(j * r, j * r + r) for j in range(count)],
    )
    dropout, token_mask = ([P] * count, _meta(count, dtype=torch.int64)), _meta(m, dtype=torch.bool)
    no_dropout, firsts, scalings = ([0.0] * count, None), [j * r for j in range(count)], [2.0] * count
    wide_a, wide_b = _meta(r, K, dtype=F32), _meta(NS[0], r, dtype=F32)
    return {
        "y": lambda: group_gemm(x, weights, [bias, None], s, bs, firsts, scalings),
        "dX": lambda: group_grad_x(grad_ys, weights, s, a, ranks, *no_dropout),
        "dX, dropout": lambda: group_grad_x(grad_ys, weights, s, a, ranks, *dropout),
        "u and y": lambda: dora_gemm(x, weights[0].t(), one_s, bs[0].t(), 2.0, bias, *vectors),
        "S, dropout": lambda: group_down_projection(x, a, ranks, *dropout, None),
        "S, token mask": lambda: group_down_projection(x, a, ranks, *no_dropout, token_mask),
        "dS and dB": lambda: group_grad_s_b(grad_ys, s, bs, columns, firsts, scalings, None, F32),
        "dS and dB, token mask": lambda: group_grad_s_b(grad_ys, s, bs, columns, firsts, scalings, token_mask, F32),
        "dA, dropout": lambda: group_sum_over_rows(s, x, ranks, F32, *dropout),
        "norm": lambda: dora_weight_norm.forward(weights[0], one_a, bs[0], 2.0, None),
        "norm, float32 adapters": lambda: dora_weight_norm.forward(weights[0], wide_a, wide_b, 2.0, None),
    }[case.form]


NAMES = {"y": "_group_gemm", "dX": "_group_grad_x", "u and y": "_dora_gemm", "S": "_group_down_projection",
         "dS and dB": "_group_grad_s_b", "dA": "_group_sum_over_rows", "norm": "dora_weight_norm"}  # fmt: skip


def _chosen(monkeypatch, case: Case, launches: Callable) -> tuple:
    """What `launches` makes of the case, and the configuration that the host asked for."""
    if case.kernel == "product":  # otherwise for operands that TMA cannot address
        monkeypatch.setattr(_product, "fits", lambda x, w: False)
    asked, choose = [], tuning.config

    def config(arch, kernel, *arguments, **sizes):
        asked.append((kernel, choose(arch, kernel, *arguments, **sizes)))
        return asked[-1][1]

    monkeypatch.setattr(tuning, "config", config)
    return launches(monkeypatch, case.arch, _host(case)), dict(asked)[case.kernel]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_configuration_of_tuning(monkeypatch, case):
    launched, _ = _chosen(monkeypatch, case, compile_launches)
    wanted = NAMES[case.form.partition(",")[0]]
    machine = disassemble([kernel for kernel in launched if kernel.metadata.name == wanted][-1])
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    assert machine.tensor_core == _expected_tensor_core(case)
    if case.kernel == "product_tma":
        assert machine.copies == 0
        assert machine.bulk_copies >= 2 * (1 if case.form == "u and y" else len(NS)), "not by TMA"
    elif case.kernel == "group_grad_s_b":  # S, a small part, is loaded once, into registers
        assert machine.wide_copies >= 0.8 * machine.copies > 0
    else:
        assert machine.wide_copies == machine.copies > 0, "global to shared memory not in 16-byte copies"


def _expected_tensor_core(case: Case) -> str:
    if case.dtype == F32:
        return "none"
    # Too few rows for the warp-group instructions: ranks below 64, and 32 rows of the weight.
    narrow = case.kernel == "dora_weight_norm" or (case.kernel == "group_sum_over_rows" and case.r < 64)
    return "HMMA" if narrow else TENSOR_CORE[case.arch]


def test_every_rule_of_sm_90_has_a_case(monkeypatch):
    seen = set()
    for case in EVERY:
        with monkeypatch.context() as patch:
            seen.add((case.arch, case.kernel, _chosen(patch, case, run_on_nothing)[1]))
    for kernel in FORMS:
        rules = {("sm_90", kernel, rule.config) for rule in tuning.rules("sm_90", kernel)}
        assert rules <= seen


def run_on_nothing(monkeypatch, arch: str, host: Callable) -> None:
    """Runs `host` as if on a GPU of `arch`, without compiling what it launches."""
    monkeypatch.setattr(_launch, "architecture", lambda device: arch)
    monkeypatch.setattr(_launch, "launch", lambda *arguments, **options: None)
    host()


def test_masks_of_four_adapters_take_two_launches_and_do_not_spill(monkeypatch):
    ranks, seeds = [16] * 4, _meta(4, dtype=torch.int64)
    low, a = _meta(M, 64), _meta(64, K)

    def host() -> None:
        group_down_projection(_meta(M, K), a, ranks, [P] * 4, seeds, None)
        group_sum_over_rows(low, _meta(M, K), ranks, F32, [P] * 4, seeds)

    launched = compile_launches(monkeypatch, "sm_90", host)
    machines = [disassemble(kernel) for kernel in launched if kernel.metadata.name != "splitk_reduce"]
    assert len(machines) == 4
    assert all(machine.local_bytes == 0 for machine in machines)


@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", F32), ("sm_90", BF16)], ids=str)
def test_elementwise_kernels_move_16_bytes_a_thread(monkeypatch, arch, dtype):
    h, vector = _meta(M, 14336, dtype=dtype), _meta(14336, dtype=F32)

    def host() -> None:
        gated_activation.forward(h, h, "gelu")
        gated_activation.backward(h, h, h, "gelu")
        grad_scale(h, h, vector, vector, scaled=True, bias=True)

    forward, backward, scale = (
        disassemble(kernel)
        for kernel in compile_launches(monkeypatch, arch, host)
        if kernel.metadata.name != "splitk_reduce"
    )
    for machine, reads, writes in ((forward, 2, 1), (backward, 3, 2), (scale, 2, 1)):
        assert machine.local_bytes == 0
        assert machine.count(r"\bLDG\.[.\w]*128\b") >= reads
        assert machine.count(r"\bSTG\.[.\w]*128\b") >= writes
    for machine in (forward, backward):
        assert machine.count(r"\bLDG\b") == machine.count(r"\bLDG\.[.\w]*128\b")
        assert machine.count(r"\bSTG\b") == machine.count(r"\bSTG\.[.\w]*128\b")
