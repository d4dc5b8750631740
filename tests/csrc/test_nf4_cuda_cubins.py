"""The machine code of `nf4_linear` in the installed `_cuda`: resources, accesses, and instructions in its main loop."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import pytest

from tests.csrc.test_cubins import archs, dump, functions

PLAIN, NESTED, ANY = "plain", "nested", "any"
# Of a lane, in a turn of the main loop: 4 units of 2 rows and 32 columns.
WEIGHTS = 4 * 2 * 32


class Code(NamedTuple):
    arch: str
    element: str  # of the mangled name
    tokens: int
    rows: str
    instructions: list[str]
    loop: Counter  # of the main loop, by opcode without modifiers

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.instructions)


def kernels(cuda) -> list[Code]:
    found = []
    for arch, function, sass in functions(cuda.__file__, "nf4_linear"):
        name = re.match(r"\S*nf4_linear_kernelI(6__half|13__nv_bfloat16)Li(\d)ELNS_4RowsE(\d)E", function)
        if name:
            lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);\s*/\*", sass)]
            found.append(_code(arch, name, lines))
    return found


def _code(arch: str, name: re.Match, lines: list[tuple[int, str]]) -> Code:
    jumps = [(int(m[1], 16), at) for at, line in lines if (m := re.search(r"BRA.*?(0x[0-9a-f]+)", line))]
    loops = [[line for at, line in lines if first <= at <= last] for first, last in jumps if first <= last]
    main = min((loop for loop in loops if any("HMMA" in line for line in loop)), key=len)
    opcodes = Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in main)
    rows = (PLAIN, NESTED, ANY)[int(name[3])]
    return Code(arch, name[1], 8 * int(name[2]), rows, [line for _, line in lines], opcodes)


def _total(code: Code, start: str) -> int:
    return sum(count for opcode, count in code.loop.items() if opcode.startswith(start))


@pytest.fixture(scope="module")
def code(request: pytest.FixtureRequest) -> list[Code]:
    from peft_kernels import _native

    if _native.why_not("_cuda") is not None:
        pytest.skip(str(_native.why_not("_cuda")))
    module = _native.load("_cuda")
    found = kernels(module)
    assert len(found) == 10 * len(archs(module))
    return found


def test_no_spills_and_one_block_fits(cuda):
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", dump(cuda.__file__, "-res-usage"))
    usage = [row for row in usage if "nf4_linear_kernel" in row[0] or "lora_down_kernel" in row[0]]
    assert len(usage) == 12 * len(archs(cuda))
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), name
        assert int(registers) <= (64 if "lora_down" in name else 255), name


def test_main_loop(code):
    """Tensor cores, the packed weight in 16 bytes a lane, the pair table in 8; every other lower row by byte planes."""
    for kernel in code:
        if kernel.rows == ANY:
            continue
        what = kernel[:4]
        assert _total(kernel, "HMMA.16816.F32") == 4 * kernel.tokens, what
        assert _total(kernel, "LDG.E.NA.128") == 8, what
        assert _total(kernel, "LDG.E.128") == kernel.tokens // 2, what
        assert kernel.loop["LDS.64"] == WEIGHTS // 2 * 3 // 4, what
        assert _total(kernel, "F2FP") == WEIGHTS // 2 * 3 // 4 + 16, what
        assert _total(kernel, "STS") == 0, what
        assert _total(kernel, "BAR") == 0, what


@pytest.mark.parametrize(
    ("rows", "tokens", "most"),
    [(PLAIN, 8, 3.6), (PLAIN, 16, 3.8), (NESTED, 8, 3.9), (NESTED, 16, 4.1), (ANY, 16, 13.5)],
)
def test_instructions_for_each_weight(code, rows, tokens, most):
    """All of the main loop over the weights that it decodes. Of any rows less than two thirds run: the form for double
    quantisation or the one without, for odd starts or even ones, and for columns past K seldom."""
    chosen = [kernel for kernel in code if (kernel.rows, kernel.tokens) == (rows, tokens)]
    assert chosen
    for kernel in chosen:
        assert sum(kernel.loop.values()) / WEIGHTS <= most, kernel[:4]


def test_absmax_is_rounded_twice(code):
    """No contraction of map · group + offset, nor of code · absmax."""
    for kernel in code:
        assert _total(kernel, "FFMA") == 0, kernel[:4]
        assert (_total(kernel, "FADD") == 8) == (kernel.rows == NESTED) or kernel.rows == ANY, kernel[:4]


def test_clusters_and_overlapping_launches(code, cuda):
    """From sm_90 on blocks of a cluster wait for each other, and S is waited for once, before it is read."""
    for kernel in code:
        new = int(re.sub(r"\D", "", kernel.arch)) >= 90
        assert kernel.count("UCGABAR_WAIT") == (2 if new else 0), kernel[:4]
        assert kernel.count("ACQBULK") == (1 if new else 0), kernel[:4]
    down = [sass for _, name, sass in functions(cuda.__file__, "lora_down") if "lora_down" in name]
    assert sum("PREEXIT" in f for f in down) == 2 * sum(int(re.sub(r"\D", "", arch)) >= 90 for arch in archs(cuda))
