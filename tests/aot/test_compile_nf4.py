"""The 4-bit kernels as machine code for GPUs that are not here: no spills, shared memory within the limit, tensor
cores, 16-byte loads of the packed weight, and how many instructions a decoded weight costs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_kernels import tuning
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.triton import _launch, nf4_dequantize, nf4_lora_linear
from tests.aot.compiling import SHARED_MEMORY, Machine, by_default, compile_launches, disassemble

if _launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: nothing is compiled in this process", allow_module_level=True)

from peft_kernels.kernels.triton._nf4_gemm import nf4_gemm
from peft_kernels.kernels.triton._nf4_grad_x import nf4_grad_x

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
N = K = 4096
# Instructions of the main loop a decoded weight, of the forms that `tuning` gives to few rows: see docs/kernels.md.
MOST_INSTRUCTIONS = {("nf4_gemm", "sm_90", 16): 5.8, ("nf4_gemm", "sm_90", 64): 6.9, ("nf4_grad_x", "sm_90", 64): 6.5}


class Case(NamedTuple):
    """One launch: a kernel in the configuration of one rule, at the largest sizes that the rule admits."""

    kernel: str
    arch: str
    dtype: torch.dtype
    m: int
    r: int
    dropout: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.arch}-{self.kernel}-{dtype}-m{self.m}-r{self.r}{'-dropout' * self.dropout}"


KERNELS = ("nf4_gemm", "nf4_gemm_any", "nf4_grad_x", "nf4_grad_x_any")


def _cases() -> Iterator[Case]:
    """With a low-rank part, and in backward a mask, since those take the most registers. sm_100 has the rules of sm_90,
    of which those of many rows are compiled for it."""
    for arch in ARCHITECTURES:
        for kernel in KERNELS:
            for rule in tuning.rules(arch, kernel):
                limits = dict(rule.limits)
                dtype, m = getattr(torch, rule.dtype or "bfloat16"), limits.get("m", 1024)
                if arch != "sm_100" or (m > 512 and not kernel.endswith("any")):
                    yield Case(kernel, arch, dtype, m, 16, "grad_x" in kernel)


def _kind(case: Case) -> tuple:
    """As of `lora_linear`: float32 once, sm_100 once, otherwise each kernel for one tile of rows, few rows and many."""
    if case.dtype == F32:
        return "float32", case.kernel
    if case.arch == "sm_100":
        return (case.arch,)
    return case.arch, case.kernel, case.m <= 16, case.m <= 64


EVERY = list(_cases())
CASES = by_default(EVERY, _kind)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(
    n: int, k: int, dtype: torch.dtype, blocksize: int = 64, nested: bool = True, first: int = 0, stride: int = 0
) -> NF4Weight:
    numel = first + n * (stride or k)
    blocks = -(-numel // blocksize)
    packed = _meta(-(-numel // 2), dtype=torch.uint8)
    absmax = _meta(blocks, dtype=torch.uint8 if nested else F32)
    parts = tuple(_meta(*shape, dtype=F32) for shape in ((-(-blocks // 256),), (256,), ())) if nested else (None,) * 3
    return NF4Weight(packed, absmax, *parts, torch.Size((n, k)), dtype, blocksize, first, stride or k)


def _launch_of(case: Case, q: NF4Weight):
    n, k, *_ = q.layout
    m, r, dtype = case.m, case.r, case.dtype
    s, a, b = (_meta(*shape, dtype=dtype) if r else None for shape in ((m, r), (r, k), (n, r)))
    if case.kernel.startswith("nf4_gemm"):
        return lambda: nf4_gemm(_meta(m, k, dtype=dtype), q, _meta(n, dtype=dtype), s, b, 2.0)
    dropout = (0.1, _meta(1, dtype=torch.int64)) if case.dropout else (0.0, None)
    return lambda: nf4_grad_x(_meta(m, n, dtype=dtype), q, s, a, 2.0, *dropout)


def _compiled(monkeypatch, case: Case, q: NF4Weight | None = None) -> Machine:
    if q is None:
        # Rows of 3420 begin within blocks, at even bytes.
        q = _weight(N, 3420 if case.kernel.endswith("any") and case.dtype != F32 else K, case.dtype)
    kernel, *sums = compile_launches(monkeypatch, case.arch, _launch_of(case, q))
    assert all(other.metadata.name == "splitk_reduce" for other in sums)
    return disassemble(kernel)


def main_loop(machine: Machine) -> list[str]:
    """The instructions of the longest loop."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", machine.sass)
    lines = [(int(address, 16), text) for address, text in found]
    loops = []
    for address, text in lines:
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            loops.append([other for place, other in lines if int(jump[1], 16) <= place <= address])
    return max(loops, key=len)


def instructions_a_weight(machine: Machine, config) -> float:
    return len(main_loop(machine)) / (config.block_n * config.block_k / (32 * machine.warps))


def _config(case: Case):
    sizes = {"m": case.m, "n": N, "r": case.r}
    return tuning.config(case.arch, case.kernel, case.dtype, dropout=case.dropout, **sizes)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_configuration_of_tuning(monkeypatch, case):
    machine, config = _compiled(monkeypatch, case), _config(case)
    assert machine.local_bytes == 0, f"{machine.local_bytes} bytes of registers spilled"
    assert machine.shared_bytes <= SHARED_MEMORY[case.arch]
    if case.dtype == F32:
        assert machine.tensor_core == "none"
        return
    # 16 rows of dY are the first operand, too few for the warp-group instructions.
    few = case.kernel == "nf4_grad_x" and case.m == 16
    assert machine.tensor_core == ("HMMA" if few else TENSOR_CORE[case.arch])
    if case.kernel.endswith("any"):
        return
    # W's bytes of a step in copies of 16 bytes a thread; no single bytes but the 8-bit absmax, one a block.
    loop = "\n".join(main_loop(machine))
    bytes_of_thread = config.block_n * config.block_k // 2 // (32 * machine.warps)
    assert len(re.findall(r"\bLDGSTS\.\S*128", loop)) >= bytes_of_thread // 16
    if case.arch == "sm_100":  # whose longest loop is the wait for a product
        return
    assert len(re.findall(r"\bLDG\.\S*U8\b", loop)) <= max(1, bytes_of_thread // 32)
    most = MOST_INSTRUCTIONS.get((case.kernel, case.arch, case.m))
    assert most is None or instructions_a_weight(machine, config) <= most


def test_every_rule_of_tuning_has_a_case():
    for arch in ("sm_80", "sm_90"):
        for kernel in KERNELS:
            compiled = [_config(case) for case in EVERY if (case.arch, case.kernel) == (arch, kernel)]
            assert compiled == [rule.config for rule in tuning.rules(arch, kernel)]


def test_each_block_of_a_lane_has_its_own_table(monkeypatch):
    """A lane that decodes weights of several blocks makes as many tables, 8 conversions of pairs each. Packed by the
    compiler into operands of 4 bytes, bytes of other blocks shared a table, and half of these were optimised away."""
    case = Case("nf4_gemm", "sm_90", BF16, 16, 0, False)
    machine, config = _compiled(monkeypatch, case), _config(case)
    # Lane t of a quad has a quarter of the columns, of two rows.
    blocks = 2 * config.block_k // 4 // 64 * config.block_n // 64
    loop = main_loop(machine)
    assert sum("F2FP" in line for line in loop) == 8 * blocks
    words = config.block_n * config.block_k // 8 // (32 * machine.warps)
    assert sum("PRMT" in line for line in loop) >= 16 * words


@pytest.mark.parametrize(
    ("kernel", "k", "load"),
    [
        ("nf4_gemm", 96, r"LDGSTS\.\S*128"),
        ("nf4_grad_x", 96, r"LDGSTS\.\S*128"),
        ("nf4_grad_x", 3420, r"LDG\.\S*U16"),
        ("nf4_gemm", 65, r"LDG\.\S*U8"),
    ],
)
def test_widths_that_blocks_do_not_divide(monkeypatch, kernel, k, load):
    """Rows of 96 keep loads of 16 bytes, because half a block lies in one block. Those of 3420 begin at even bytes."""
    case = Case(kernel, "sm_90", BF16, 64, 0, False)
    machine = _compiled(monkeypatch, case, _weight(512, k, BF16))
    assert machine.local_bytes == 0
    assert machine.shared_bytes <= SHARED_MEMORY["sm_90"]
    assert machine.tensor_core == "HGMMA"
    loop = "\n".join(main_loop(machine))
    assert re.search(load, loop)
    assert k == 65 or len(re.findall(r"\bLDG\.\S*U8\b", loop)) <= 2  # of absmax


@pytest.mark.parametrize(
    ("arch", "dtype"), [("sm_80", BF16), ("sm_90", BF16), ("sm_90", F32), ("sm_100", BF16)], ids=str
)
def test_dequantise(monkeypatch, arch, dtype):
    """One launch; 16 bytes a load and a store; absmax by a product and a sum that round apart."""
    (kernel,) = compile_launches(monkeypatch, arch, lambda: nf4_dequantize.forward(_weight(N, K, dtype)))
    machine = disassemble(kernel)
    config = tuning.config(arch, "nf4_dequantize", dtype)
    assert machine.local_bytes == 0
    assert machine.count(r"\bFFMA\b") == 0
    assert machine.count(r"\bFADD\b") >= 1
    assert machine.count(r"\bLDG\.[.\w]*128\b") == config.block // 2 // (32 * machine.warps) // 16
    assert machine.count(r"\bSTG\.[.\w]*128\b") == config.block * dtype.itemsize // (32 * machine.warps) // 16
    nops = machine.count(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+NOP")
    per_weight = (machine.instructions - nops) / (config.block / (32 * machine.warps))
    assert per_weight <= (8 if dtype == BF16 else 17)


@pytest.mark.parametrize(("k", "first", "stride"), [(65, 0, 0), (3420, 4, 6840), (64, 1, 65)])
def test_dequantise_of_odd_layouts(monkeypatch, k, first, stride):
    q = _weight(511, k, BF16, first=first, stride=stride)
    (kernel,) = compile_launches(monkeypatch, "sm_90", lambda: nf4_dequantize.forward(q))
    machine = disassemble(kernel)
    assert machine.local_bytes == 0
    if not stride:  # contiguous, though rows are odd: as fast as any other
        assert machine.count(r"\bLDG\.[.\w]*128\b") >= 2
        assert machine.count(r"\bSTG\.[.\w]*128\b") >= 8


def test_launches_of_a_whole_linear(monkeypatch):
    """Two forward and four backward, the sums of partials not counted."""
    launched: list[str] = []
    monkeypatch.setattr(_launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(_launch, "launch", lambda kernel, *_, **options: launched.append(kernel.__name__))
    q = _weight(N, K, BF16)
    x, grad_y = (_meta(*shape, dtype=BF16) for shape in ((512, K), (512, N)))
    a, b = (_meta(*shape, dtype=F32) for shape in ((16, K), (N, 16)))
    _, s = nf4_lora_linear.forward(x, q, None, a, b, 2.0, 0.0, None)
    assert [name for name in launched if name != "splitk_reduce"] == ["_down_projection", "_nf4_gemm"]
    launched.clear()
    nf4_lora_linear.backward(grad_y, x, s, q, a, b, 2.0, 0.0, None, (True, False, False, True, True))
    named = [name for name in launched if name != "splitk_reduce"]
    assert named[0] in ("_grad_s_b", "_down_projection")
    assert "_nf4_grad_x" in named
    assert len(named) <= 4
