"""The machine code of `multi_lora_linear` in the installed `_cuda`: resources, accesses, and their order."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.csrc.test_cubins import archs, dump, functions

KERNELS = 18  # x in two types, adapters in three, buckets of 16, 32 and 64 ranks
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # csrc/numeric.h


class Code(NamedTuple):
    arch: str
    x_type: int
    a_type: int
    bucket: int
    instructions: list[str]

    @property
    def clusters(self) -> bool:
        return int(re.sub(r"\D", "", self.arch)) >= 90

    def first(self, pattern: str, after: int = 0) -> int:
        """Where the first instruction is that matches; -1 for none."""
        found = (i for i, line in enumerate(self.instructions) if i >= after and re.search(pattern, line))
        return next(found, -1)

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.instructions)


NAME = re.compile(r"\S*multi_lora_kernelI\S*?MultiLoraShapeILi(\d)ELi(\d)ELi(\d+)E")


@pytest.fixture(scope="module")
def code() -> list[Code]:
    from peft_kernels import _native

    if _native.why_not("_cuda") is not None:
        pytest.skip(str(_native.why_not("_cuda")))
    module, found = _native.load("_cuda"), []
    for arch, function, sass in functions(module.__file__, "multi_lora_linear"):
        if name := NAME.match(function):
            lines = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);\s*/\*", sass)
            found.append(Code(arch, *map(int, name.groups()), lines))
    assert len(found) == KERNELS * len(archs(module))
    return found


def test_no_spills_and_enough_blocks_fit(cuda):
    """As many registers as MultiLoraShape::kResident allows: of the usual kernel, 64 tokens then run at once."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", dump(cuda.__file__, "-res-usage"))
    usage = [(match, *row[1:]) for row in usage if (match := NAME.match(row[0]))]
    assert len(usage) == KERNELS * len(archs(cuda))
    for name, registers, stack, local in usage:
        assert (int(stack), int(local)) == (0, 0), name[0]
        usual = int(name[3]) == 64 or (int(name[3]) == 16 and int(name[2]) != FLOAT32)
        assert int(registers) <= (64 if usual else 80), name[0]


def test_tiles_are_asked_for_before_anything_is_computed(code):
    """B and y go to shared memory by asynchronous copies ahead of the first load of A, all of a tile at once."""
    for kernel in code:
        what = kernel[:4]
        size = 4 if kernel.a_type == FLOAT32 else 2
        copies = 512 * kernel.bucket * size // 16 // (512 if kernel.bucket == 64 else 256)
        if kernel.bucket == 64 and kernel.a_type == FLOAT32:
            copies //= 2  # a tile of 256 rows
        ahead = kernel.instructions[: kernel.first(r"LDG\S*\.NA\.128")]
        assert sum(bool(re.search(r"LDGSTS\.E\.BYPASS\.128 ", line)) for line in ahead) == copies + 1, what


def test_loads_of_a_turn_come_before_their_use(code):
    """The main loop of the usual kernel: all four loads of A and two of x, then the sums."""
    for kernel in code:
        if (kernel.bucket, kernel.a_type == FLOAT32) != (16, False):
            continue
        first = kernel.first(r"LDG\S*\.NA\.128")
        turn = kernel.instructions[first : kernel.first("FFMA|HFMA2", first)]
        assert sum("LDG" in line and ".NA.128" in line for line in turn) == 4, kernel[:4]
        assert kernel.count(r"LDG\S*\.NA\.128") == 6, kernel[:4]


def test_blocks_send_without_fences(code):
    """Sums go to the other blocks by STAS, counted by a barrier in shared memory; no fence, no scratch memory, no
    atomics, no second wait of the cluster."""
    for kernel in code:
        what = kernel[:4]
        assert kernel.count("STAS") == (1 if kernel.clusters else 0), what
        assert kernel.count("UCGABAR_ARV") == kernel.count("UCGABAR_WAIT") == (1 if kernel.clusters else 0), what
        assert kernel.count(r"MEMBAR|ERRBAR|RED\b|ATOM") == 0, what
        if kernel.clusters:
            loads = kernel.first(r"LDG\S*\.NA\.128")
            assert kernel.first("UCGABAR_ARV") < loads < kernel.first("UCGABAR_WAIT") < kernel.first("STAS"), what


def test_rows_of_the_table_are_read_16_bytes_at_a_time(code):
    for kernel in code:
        ahead = kernel.instructions[: kernel.first("LDGSTS")]
        assert sum(bool(re.search(r"LDG\.E\.128", line)) for line in ahead) == 2, kernel[:4]
