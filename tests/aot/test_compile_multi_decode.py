"""The decode kernels of `multi_lora_linear` in each configuration that `tuning` can choose, as machine code."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.formats.adapter_table import Table
from peft_kernels.kernels.triton import _launch
from tests.aot.compiling import SHARED_MEMORY, by_default, compile_launches, disassemble

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._multi_decode import multi_decode

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
K = 4096


class Case(NamedTuple):
    """Adapters of this dtype over a layer of another, or the same, in groups of these widths."""

    arch: str
    adapters: torch.dtype
    layer: torch.dtype = BF16
    ns: tuple[int, ...] = (4096,)
    per_row: int = 1

    def __str__(self) -> str:
        names = (str(dtype).removeprefix("torch.") for dtype in (self.adapters, self.layer))
        return "-".join((self.arch, *names, "x".join(map(str, self.ns)), f"{self.per_row} a row"))


GROUP = (4096, 1024, 1024)
EVERY = [
    Case("sm_100", BF16),
    Case("sm_80", BF16),
    Case("sm_80", F32, F16, GROUP),
    Case("sm_90", BF16, BF16, GROUP, 4),
    Case("sm_90", F32),
]
# sm_100 has sm_90's rules, and no instructions of its own without tensor cores.
CASES = by_default(EVERY, lambda case: (case.arch.replace("sm_100", "sm_90"), case.adapters))


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _call(case: Case, rows: int, r: int = 16, k: int = K):
    """A call on tensors without memory: the host reads no id, no rank and no address."""
    x, ids = _meta(rows, k, dtype=case.layer), _meta(rows, case.per_row, dtype=torch.int64)
    mix = None if case.per_row == 1 else _meta(rows, case.per_row, dtype=F32)
    table = Table(_meta(1000, 224, 4, dtype=torch.int64), range(5, 5 + len(case.ns)))
    ys = [_meta(rows, n, dtype=case.layer) for n in case.ns]
    return lambda: multi_decode(x, ys, table, [r] * len(ys), ids, mix, case.adapters)


def _compiled(monkeypatch, case: Case, rows: int, **sizes: int) -> dict:
    compiled = compile_launches(monkeypatch, case.arch, _call(case, rows, **sizes))
    return {kernel.metadata.name: kernel for kernel in compiled}


# What a thread loads of A and B in the form for rows of 16-byte multiples, r=16: per step of K, and per program.
def _pieces(case: Case) -> tuple[int, int]:
    config = tuning.config(case.arch, "multi_decode", case.adapters, k=K)
    threads, size = 32 * config.num_warps, case.adapters.itemsize
    return tuple(16 * block * size // 16 // threads for block in (config.block_k, config.block_n))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_configuration_of_tuning(monkeypatch, case):
    """One launch for a few rows, two for more. No spills; A and B 16 bytes at a time, in the first form A through a
    ring in shared memory."""
    kernels = _compiled(monkeypatch, case, 16) | _compiled(monkeypatch, case, 64)
    assert list(kernels) == ["_multi_decode", "_multi_shrink", "_multi_expand"]
    machines = {name: disassemble(kernel) for name, kernel in kernels.items()}
    of_a, of_b = _pieces(case)
    stages = tuning.config(case.arch, "multi_decode", case.adapters, k=K).num_stages
    for name, machine in machines.items():
        assert machine.local_bytes == 0, f"{name}: {machine.local_bytes} bytes of registers spilled"
        assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
        assert machine.tensor_core == "none"
    wide = r"\bLDG\.[.\w]*128\b"
    assert machines["_multi_decode"].wide_copies >= stages * of_a
    assert machines["_multi_decode"].count(wide) >= of_b
    assert machines["_multi_shrink"].count(wide) >= of_a
    assert machines["_multi_expand"].count(wide) >= of_b


def test_every_rule_of_tuning_is_compiled():
    for arch in ("sm_80", "sm_90"):  # sm_100 has sm_90's, and in float32 no instructions that sm_90 has not
        compiled = {tuning.config(arch, "multi_decode", case.adapters, k=K) for case in CASES if case.arch == arch}
        assert compiled == {rule.config for rule in tuning.rules(arch, "multi_decode")}


@pytest.mark.parametrize("rows", [16, 64])
def test_sizes_that_divide_nothing_compile(monkeypatch, rows):
    for kernel in _compiled(monkeypatch, Case("sm_90", BF16, BF16, (1001,)), rows, r=5, k=1003).values():
        machine = disassemble(kernel)
        assert machine.shared_bytes <= SHARED_MEMORY["sm_90"]
        assert machine.local_bytes == 0


def test_the_second_launch_begins_under_the_first(monkeypatch):
    """On sm_90 B and y are on their way before the kernel waits for the partial sums."""
    monkeypatch.setattr(_launch, "overlaps", lambda device: True)
    kernels = _compiled(monkeypatch, Case("sm_90", BF16), 64)
    shrink, expand = (disassemble(kernels[name]).sass for name in ("_multi_shrink", "_multi_expand"))
    assert shrink.index("PREEXIT") < shrink.index("LDG.E.128")
    waits = [match.start() for match in re.finditer("ACQBULK", expand)]
    loads = [match.start() for match in re.finditer(r"LDG\.E\.128", expand)]
    assert len(loads) == 4
    assert max(loads) < min(waits)
    assert expand.index("STG") > min(waits)


# The same bits in either form.


def _sums(ttgir: str, shape: str) -> set[str]:
    """The layouts in which tensors of this shape are summed along their last dimension."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked<.*>)$", ttgir, re.MULTILINE))
    operands = re.findall(rf"\}}\) : \(tensor<{shape}xf32, (#\w+)>\) -> tensor<", ttgir)
    return {layouts[name] for name in operands}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_forms_sum_in_one_layout(monkeypatch, case):
    """Which numbers a thread adds, in which order, and what threads then exchange follows from the layout."""
    kernels = _compiled(monkeypatch, case, 16) | _compiled(monkeypatch, case, 64)
    config = tuning.config(case.arch, "multi_decode", case.adapters, k=K)
    of = {name: kernel.asm["ttgir"] for name, kernel in kernels.items()}
    for shape, other in (f"16x{config.block_k}", "_multi_shrink"), (f"{config.block_n}x16", "_multi_expand"):
        one, two = _sums(of["_multi_decode"], shape), _sums(of[other], shape)
        assert one == two
        assert len(one) == 1, "other layouts for rows of 16-byte multiples than for others"
    # An FMA takes one product of a sum unrounded, and the compiler chooses which: only where products are exact.
    inexact = kernels if F32 in (case.adapters, case.layer) else ["_multi_expand"]
    assert not any("fma.rn.f32" in kernels[name].asm["ptx"] for name in inexact)
