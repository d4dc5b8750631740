"""The machine code of csrc/csr_linear.cu in the installed `_cuda`: resources, accesses, and how many instructions a
kept weight takes."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.csrc.test_bitmap_cubins import INTEGER, opcode, starting
from tests.csrc.test_cubins import archs, dump, functions

WEIGHTS = 16  # of a turn of the loop, in two groups
ROWS = (1, 2, 4, 8)


class Code(NamedTuple):
    arch: str
    element: str  # of the mangled name
    rows: int
    lines: list[str]
    loop: list[str]  # over a thread's groups

    @property
    def number(self) -> int:
        """Of the architecture."""
        return int(re.sub(r"\D", "", self.arch))

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.lines)


def _code(arch: str, element: str, rows: int, function: str) -> Code:
    found = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);\s*/\*", function)]
    products = [at for at, line in found if opcode(line).startswith("FFMA")]
    jumps = [(int(m[1], 16), at) for at, line in found if (m := re.search(r"BRA.*?(0x[0-9a-f]+)", line))]
    around = [(begin, end) for begin, end in jumps if begin < products[0] and products[-1] < end]
    begin, end = min(around, key=lambda jump: jump[1] - jump[0])
    return Code(arch, element, rows, [line for _, line in found], [line for at, line in found if begin <= at <= end])


@pytest.fixture(scope="module")
def code(request: pytest.FixtureRequest) -> list[Code]:
    from peft_kernels import _native

    if _native.why_not("_cuda") is not None:
        pytest.skip(str(_native.why_not("_cuda")))
    module = _native.load("_cuda")
    found = []
    for arch, name, function in functions(module.__file__, "csr_linear"):
        if kernel := re.search(r"csr_linear_kernelI(6__half|13__nv_bfloat16)Li\dELi(\d)E", name):
            found.append(_code(arch, kernel[1], int(kernel[2]), function))
    assert len(found) == 2 * len(ROWS) * len(archs(module))
    return found


def test_no_spills_and_a_block_of_1024_threads_fits(cuda):
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", dump(cuda.__file__, "-res-usage"))
    usage = [row for row in usage if "csr_linear_kernel" in row[0]]
    assert len(usage) == 2 * len(ROWS) * len(archs(cuda))
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= 64, name


def test_instructions_of_a_kept_weight(code):
    """One load of x's column in all rows, a product for each row, what unpacks them, and little else: nothing is paid
    for a weight that is not kept."""
    for kernel in code:
        what, rows = kernel[:3], kernel.rows
        width = {1: "LDS", 2: "LDS", 4: "LDS.64", 8: "LDS.128"}[rows]
        assert [opcode(line) for line in kernel.loop if opcode(line).startswith("LDS")] == [width] * WEIGHTS, what
        assert starting(kernel.loop, "FFMA") == rows * WEIGHTS, what
        unpacked, more = 1 if rows == 1 else 1 + rows, 2 if kernel.number >= 100 else 0
        assert len(kernel.loop) <= (rows + unpacked + 6 + more) * WEIGHTS, what
        integer = starting(kernel.loop, *INTEGER)  # of bfloat16 also those that unpack
        assert integer <= (4 + more + (unpacked if "bfloat" in kernel.element else 0)) * WEIGHTS, what
        assert starting(kernel.loop, "BAR", "STS", "LDL", "STL", "POPC", "FADD", "FMUL") == 0, what


def test_how_bytes_arrive(code):
    """A group is two loads of 16 bytes, of which two are on their way while one is used; before all, blocks ask the L2
    cache for what they will read, by bulk from sm_90 on."""
    for kernel in code:
        what = kernel[:3]
        assert starting(kernel.loop, "LDG") == 4, what
        assert sum(bool(re.search(r"LDG\.E\.NA\.128", line)) for line in kernel.loop) == 4, what
        is_new = kernel.number >= 90
        asks = [i for i, line in enumerate(kernel.lines) if re.search(r"UBLKPF|CCTL\.E\.PF2", line)]
        assert (kernel.count("UBLKPF") == 2) == is_new, what
        assert len(asks) >= 2, what
        first = next(i for i, line in enumerate(kernel.lines) if "LDG.E.NA.128" in line)
        assert asks[-1] < first or not is_new, what
