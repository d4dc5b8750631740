"""The machine code of csrc/bitmap_linear.cu in the installed `_cuda`: resources, accesses, and how many instructions a
weight takes."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.csrc.test_cubins import archs, dump, functions

WEIGHTS = 16 * 8  # of a lane, in a chunk

# What the integer units of a multiprocessor do; loads, tensor cores and moves of zeros are counted apart.
INTEGER = (
    "IADD3", "VIADD", "IMAD", "LOP3", "SHF", "PRMT", "LEA", "R2P", "P2R", "PLOP3", "ISETP", "SEL", "VIMNMX", "IMNMX",
)  # fmt: skip


class Code(NamedTuple):
    arch: str
    element: str  # of the mangled name
    lines: list[str]
    loop: list[str]  # over chunks
    decode: list[str]  # from the first predicates of a chunk to its last product

    @property
    def is_new(self) -> bool:
        return int(re.sub(r"\D", "", self.arch)) >= 90

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.lines)


def opcode(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]


def starting(lines: list[str], *starts: str) -> int:
    return sum(opcode(line).startswith(starts) for line in lines)


def _code(arch: str, element: str, function: str) -> Code:
    found = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);\s*/\*", function)]
    lines = [line for _, line in found]
    first = next(i for i, line in enumerate(lines) if opcode(line) == "R2P")
    last = max(i for i, line in enumerate(lines) if opcode(line).startswith("HMMA"))
    jumps = [(int(m[1], 16), at) for at, line in found if (m := re.search(r"BRA.*?(0x[0-9a-f]+)", line))]
    begin, end = min((j for j in jumps if j[0] <= found[first][0] and j[1] > found[last][0]), key=lambda j: j[1] - j[0])
    loop = [line for at, line in found if begin <= at <= end]
    return Code(arch, element, lines, loop, lines[first : last + 1])


@pytest.fixture(scope="module")
def code(request: pytest.FixtureRequest) -> list[Code]:
    from peft_kernels import _native

    if _native.why_not("_cuda") is not None:
        pytest.skip(str(_native.why_not("_cuda")))
    module = _native.load("_cuda")
    found = []
    for arch, function, sass in functions(module.__file__, "bitmap_linear"):
        if name := re.match(r"\S*bitmap_linear_kernelI(6__half|13__nv_bfloat16)E", function):
            found.append(_code(arch, name[1], sass))
    assert len(found) == 2 * len(archs(module))
    return found


def test_no_spills_and_two_blocks_fit(cuda):
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", dump(cuda.__file__, "-res-usage"))
    usage = [row for row in usage if "bitmap_linear_kernel" in row[0]]
    assert len(usage) == 2 * len(archs(cuda))
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 128, name


def test_instructions_of_a_weight(code):
    """A predicated load and a predicated step of its stream for each, products by tensor cores, no branches; counts of
    bits only where streams begin."""
    for kernel in code:
        what = kernel[:2]
        assert starting(kernel.decode, "HMMA.16816.F32") == 16, what
        loads = [line for line in kernel.decode if opcode(line) == "LDS.U16"]
        assert len(loads) + 4 >= WEIGHTS, what  # the first may stand above the first predicates
        assert all(line.startswith("@") for line in loads), what
        assert starting(kernel.decode, "BRA", "BAR", "WARPSYNC", "STS", "LDL", "STL") == 0, what
        assert starting(kernel.decode, "R2P") >= 16, what
        assert len(kernel.decode) <= 4 * WEIGHTS, what
        assert starting(kernel.decode, *INTEGER) <= 3 * WEIGHTS, what
        # Before the streams begin for all chunks of a warp, and once more for each.
        assert 4 <= starting(kernel.lines, "POPC") <= 16 <= 0.25 * WEIGHTS, what


def test_integer_operations_of_a_weight_with_all_that_surrounds_it(code):
    """At most 6, of all that stands in the loop over a warp's chunks, waits included."""
    for kernel in code:
        assert starting(kernel.loop, "HMMA") == 16, kernel[:2]
        assert starting(kernel.loop, *INTEGER) <= 6 * WEIGHTS, kernel[:2]


def test_how_bytes_arrive(code):
    """Values by bulk copies from sm_90 on, by asynchronous copies of 16 bytes before; bits in 16 bytes a lane."""
    for kernel in code:
        what = kernel[:2]
        assert kernel.count(r"LDG\.E\.NA\.128") == 3, what
        assert kernel.count(r"LDG\.E\.128") == 16, what
        assert (kernel.count(r"UBLKCP") > 0) == kernel.is_new, what
        assert (kernel.count(r"LDGSTS\.E\.BYPASS\.128") > 0) == (not kernel.is_new), what
        assert kernel.count(r"UCGABAR_WAIT|BAR\.CGA") == 0 or kernel.is_new, what


def test_no_load_of_values_above_the_wait(code):
    """The last wait for copies stands before the first load of a value in the machine code of the loop."""
    for kernel in code:
        waits = [
            i for i, line in enumerate(kernel.lines) if re.search(r"SYNCS\.PHASECHK|TRYWAIT|LDS\.64|ARRIVES", line)
        ]
        first = next(i for i, line in enumerate(kernel.lines) if opcode(line) == "LDS.U16")
        assert any(i < first for i in waits), kernel[:2]
