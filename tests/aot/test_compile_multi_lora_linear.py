"""The kernels of `multi_lora_linear` for prefill and training, in each configuration that `tuning` can choose, as
machine code, and that their host side needs no id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.formats.adapter_table import PoolAdapters
from peft_kernels.kernels.triton import _launch, multi_lora_linear
from peft_kernels.ops.multi_lora_linear import MultiNeeds
from tests.aot.compiling import SHARED_MEMORY, Machine, by_default, compile_launches, disassemble

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._multi_down_projection import multi_down_projection
from peft_kernels.kernels.triton._multi_gemm import config_of, multi_gemm
from peft_kernels.kernels.triton._multi_rows import SortedPlaces
from peft_kernels.kernels.triton._multi_sum_over_rows import multi_sum_over_rows
from peft_kernels.kernels.triton._multi_table import Factors
from peft_kernels.kernels.triton._multi_update import multi_update

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
COUNT, N, K, WIDEST_RANK = 8, 1408, 2048, 128
BF16, F32 = torch.bfloat16, torch.float32
# The form that takes the most registers of each kernel.
FORMS = {"multi_down_projection": "S", "multi_gemm": "dX", "multi_update": "dX", "multi_sum_over_rows": "dA"}


class Case(NamedTuple):
    """One launch: a kernel in the configuration of one rule, at the largest sizes that the rule admits, with float32
    adapters, which take the most."""

    kernel: str
    arch: str
    dtype: torch.dtype
    dropout: bool
    rows: int  # for each adapter
    r: int
    form: str
    mix: bool = False
    adapters: torch.dtype = F32
    wide: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        suffix = "-dropout" * self.dropout + "-weighted" * self.mix
        return f"{self.arch}-{self.kernel}-{self.form}-{dtype}-rows{self.rows}-r{self.r}{suffix}"


def _cases() -> Iterator[Case]:
    for arch in ARCHITECTURES:
        for kernel, form in FORMS.items():
            for rule in tuning.rules(arch, kernel):
                if not _own(arch, kernel, rule):
                    continue
                limits, dtype = dict(rule.limits), getattr(torch, rule.dtype or "bfloat16")
                for dropout in (True, False):
                    rows, r = limits.get("m", 1024), limits.get("r", WIDEST_RANK)
                    case = Case(kernel, arch, dtype, dropout, rows, r, form)
                    if _chosen(case) == rule.config:
                        yield case
                        break  # the mask takes the most registers


def _own(arch: str, kernel: str, rule) -> bool:
    """Whether sm_90 says nothing about it: sm_100 has its rules (a test below), and other instructions for 16-bit
    products only, which the widest rule shows."""
    if arch != "sm_100":
        return True
    return rule.dtype != "float32" and not rule.limits and kernel in ("multi_gemm", "multi_down_projection")


def _chosen(case: Case):
    sizes = {"m": case.rows, "n": N, "r": case.r}
    if case.kernel in ("multi_update", "multi_sum_over_rows"):
        del sizes["m"]
    return tuning.config(case.arch, case.kernel, case.dtype, dropout=case.dropout, **sizes)


def _kind(case: Case) -> tuple:
    """As of `lora_linear`: float32 once, otherwise each kernel, and few ranks of sums over rows."""
    if case.dtype == F32:
        return "float32", case.kernel
    return case.arch, case.kernel, case.kernel == "multi_sum_over_rows" and case.r < 64


EVERY = list(_cases())
CASES = by_default(EVERY, _kind)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _launch_of(case: Case, n: int = N, k: int = K):
    """The host call of the case, on tensors without memory."""
    m, r, dtype = case.rows * COUNT, case.r, case.dtype
    x, grad_y, weight, s, bias = (
        _meta(*shape, dtype=dtype) for shape in ((m, k), (m, n), (n, k), (m, 1, r), (n,))
    )  # fmt: skip
    rows = _meta(COUNT, 3, 4, dtype=torch.int64)
    a, b = (Factors(rows, 1, lora_b, case.adapters, case.wide) for lora_b in (False, True))
    mix = _meta(m, 1, dtype=F32) if case.mix else None
    mask = (_meta(COUNT, 2, dtype=F32), _meta(1, dtype=torch.int64)) if case.dropout else (None, None)

    def host() -> None:
        ids = _meta(m, 1, dtype=torch.int64)
        places = SortedPlaces(ids, COUNT)
        config = config_of(x, n, r, places.rows_each, case.dropout)
        call = {
            ("multi_down_projection", "S"): lambda: multi_down_projection(x, a, r, places, *mask),
            ("multi_down_projection", "dS"): lambda: multi_down_projection(grad_y, b, r, places, mix=mix, s=s),
            ("multi_gemm", "y"): lambda: multi_gemm(x, weight.t(), s, b, places, config, mix, bias),
            ("multi_gemm", "dX"): lambda: multi_gemm(grad_y, weight, s, a, places, config, None, None, *mask, total=x),
            ("multi_update", "y"): lambda: multi_update(grad_y, s, b, ids, places, mix),
            ("multi_update", "dX"): lambda: multi_update(x, s, a, ids, places, None, *mask),
            ("multi_sum_over_rows", "dA"): lambda: multi_sum_over_rows(s, x, a, COUNT * r, places, None, *mask),
            ("multi_sum_over_rows", "dB"): lambda: multi_sum_over_rows(s, grad_y, b, COUNT * r, places, mix),
        }
        call[case.kernel, case.form]()

    return host


def _compiled(monkeypatch, case: Case, **sizes: int) -> Machine:
    compiled = compile_launches(monkeypatch, case.arch, _launch_of(case, **sizes))
    return disassemble(next(kernel for kernel in compiled if kernel.metadata.name == f"_{case.kernel}"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_configuration_of_tuning(monkeypatch, case):
    machine = _compiled(monkeypatch, case)
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    narrow = case.kernel == "multi_sum_over_rows" and case.r < 64  # too few rows for a warp group
    expected = "none" if case.dtype == F32 else "HMMA" if narrow else TENSOR_CORE[case.arch]
    assert machine.tensor_core == expected
    if case.kernel == "multi_sum_over_rows":
        assert 0 < machine.wide_copies < machine.copies, "x in 16-byte copies; those of places are 8 bytes each"
    elif case.kernel != "multi_update":  # which has no loop
        assert machine.wide_copies == machine.copies > 0, "global to shared memory not in 16-byte copies"
    if machine.tensor_core == "HGMMA" and case.kernel == "multi_gemm":
        assert "DEPBAR.LE gsb0, 0x1" in machine.sass, "each product of the main loop waits for its own end"


def test_every_rule_of_tuning_has_a_case():
    for arch in ARCHITECTURES:
        for kernel in FORMS:
            compiled = {_chosen(case) for case in EVERY if (case.arch, case.kernel) == (arch, kernel)}
            rules = [rule for rule in tuning.rules(arch, kernel) if _own(arch, kernel, rule)]
            assert compiled == {rule.config for rule in rules}
            assert arch != "sm_100" or tuning.rules(arch, kernel) == tuning.rules("sm_90", kernel)


@pytest.mark.parametrize(
    ("arch", "kernel", "form"),
    [("sm_90", "multi_gemm", "y"), ("sm_90", "multi_down_projection", "dS"), ("sm_80", "multi_update", "y")],
)
def test_the_usual_rank_with_weights(monkeypatch, arch, kernel, form):
    """With 16-bit adapters, forward and dS: what the table points to is loaded 16 bytes at a time."""
    machine = _compiled(monkeypatch, Case(kernel, arch, BF16, False, 1024, 16, form, True, BF16))
    assert machine.local_bytes == 0
    assert machine.tensor_core == TENSOR_CORE[arch]
    if kernel == "multi_update":
        assert machine.count(r"\bLDG\.[.\w]*128\b") > 0
        assert machine.count(r"\bLDG\.[.\w]*U16\b") == 0
    else:
        assert machine.wide_copies == machine.copies > 0


@pytest.mark.parametrize("kernel", ["multi_gemm", "multi_sum_over_rows"])
def test_sizes_that_divide_nothing_compile(monkeypatch, kernel):
    case = Case(kernel, "sm_90", BF16, True, 77, 5, FORMS[kernel], False, BF16, False)
    machine = _compiled(monkeypatch, case, n=1001, k=1003)
    assert machine.shared_bytes <= SHARED_MEMORY["sm_90"]


def test_the_host_reads_no_id(monkeypatch):
    """Tensors without memory have no values. Two launches for each projection, forward and backward, as a pool's
    adapters have no gradients; tiles are listed once for all projections and each height of a tile."""
    launched = []
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_launch, "launch", lambda kernel, *_, **options: launched.append(kernel.__name__))
    x, grad_y, weight = (_meta(*shape, dtype=BF16) for shape in ((8192, K), (8192, N), (N, K)))
    rows = _meta(8, 5, 4, dtype=torch.int64)
    adapters = PoolAdapters(_meta(1 << 20, dtype=BF16), rows, rows, [2, 3], [(N, K)] * 2, [16, 40])
    ids, seeds = _meta(8192, 1, dtype=torch.int64), _meta(2, dtype=torch.int64)
    arguments = (adapters, ids, None, [0.1] * 8, seeds)
    ys, ss = multi_lora_linear.forward(x, [weight] * 2, [None] * 2, *arguments, True)
    assert [y.shape for y in ys] == [(8192, N)] * 2
    assert [s.shape for s in ss] == [(8192, 1, 16), (8192, 1, 40)]
    heights = launched.count("_list_tiles")
    assert 1 <= heights <= 2
    assert [name for name in launched if name != "_list_tiles"] == ["_multi_down_projection", "_multi_gemm"] * 2
    launched.clear()
    needs = MultiNeeds(True, False, (False, False), (False, False), (), ())
    multi_lora_linear.backward([grad_y, grad_y], x, ss, [weight] * 2, *arguments, needs)
    assert [name for name in launched if name != "_list_tiles"] == ["_multi_down_projection", "_multi_gemm"] * 2
