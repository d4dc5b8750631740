"""The inline assembly by which 16-bit weights are decoded, executed as the PTX manual defines its instructions.

The interpreter runs none. Bits for every byte and for absmax values of every kind, negative and subnormal ones too.
"""

from __future__ import annotations

import re

import pytest
import torch

from peft_kernels.formats.nf4 import code

MASK = 0xFFFFFFFF
DTYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def _prmt(a: int, b: int, selector: int) -> int:
    """`prmt.b32` in its default mode: each of 4 bytes by the low 3 bits of a nibble; its high bit repeats the sign."""
    pool, result = (b & MASK) << 32 | a & MASK, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pool >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * i
    return result


def _single(bits: str) -> torch.Tensor:
    return torch.tensor(int(bits, 16), dtype=torch.int64).to(torch.int32).view(torch.float32)


class Machine:
    """Registers by name; operands $i are those of the inline assembly."""

    def __init__(self, operands: dict[str, object]) -> None:
        self.registers: dict[str, object] = dict(operands)

    def value(self, name: str):
        if name.startswith("0f"):
            return torch.tensor(int(name[2:], 16) - (int(name[2:], 16) >> 31 << 32), dtype=torch.int32).view(
                torch.float32
            )
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else self.registers[name]

    def run(self, assembly: str) -> dict[str, object]:
        for line in assembly.strip("{}\n ").splitlines():
            if line.startswith(".reg"):
                continue
            name, arguments = re.fullmatch(r"(\S+) (.*);", line).groups()
            if match := re.fullmatch(r"\{(\S+), (\S+)\}, (\S+)", arguments):
                assert name == "mov.b32"
                word = self.value(match[3])
                self.registers |= {match[1]: word & 0xFFFF, match[2]: word >> 16}
                continue
            to, *sources = arguments.split(", ")
            self.registers[to] = self.apply(name, *map(self.value, sources))
        return self.registers

    def apply(self, name: str, *values):
        if name == "prmt.b32":
            return _prmt(*values)
        if name == "mul.rn.f32":
            return values[0] * values[1]
        if match := re.fullmatch(r"cvt\.rn\.(\w+)\.f32", name):  # the first source becomes the upper half
            high, low = (int(v.to(DTYPES[match[1]]).view(torch.int16)) & 0xFFFF for v in values)
            return high << 16 | low
        binary = {"and.b32": int.__and__, "or.b32": int.__or__, "shr.u32": int.__rshift__}
        return binary[name](*values) & MASK


def _table(dtype: str, absmax: torch.Tensor) -> list[int]:
    from peft_kernels.kernels.triton._nf4_tile import table_assembly

    registers = Machine({"$8": absmax}).run(table_assembly(dtype))
    return [registers[f"${i}"] for i in range(8)]


def _looked_up(word: int, table: list[int]) -> list[int]:
    from peft_kernels.kernels.triton._nf4_tile import lookup_assembly

    operands = {"$8": word, **{f"${9 + i}": register for i, register in enumerate(table)}}
    registers = Machine(operands).run(lookup_assembly())
    return [registers[f"${i}"] for i in range(8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("absmax", [1.0, 0.0217, -3.7, 1e-6, 3e-39, 70000.0, 0.0])
def test_bits_of_every_index_in_every_place(dtype, absmax):
    scale = torch.tensor(absmax)
    expected = (code() * scale).to(DTYPES[dtype]).view(torch.int16)
    table = _table(dtype, scale)
    for place in range(8):
        for index in range(16):
            nibbles = [(3 * i + place + index) % 16 for i in range(8)]
            nibbles[place] = index
            # The first of a byte's two weights is its upper half; words are little-endian.
            word = sum((nibbles[2 * i] << 4 | nibbles[2 * i + 1]) << 8 * i for i in range(4))
            found = torch.tensor(_looked_up(word, table), dtype=torch.int32).to(torch.int16)
            assert torch.equal(found, expected[torch.tensor(nibbles)]), (place, index)


def test_operands_agree_with_their_constraints():
    from peft_kernels.kernels.triton import _nf4_tile as tile

    for assembly, operands in (
        (tile.table_assembly("bf16x2"), tile._TABLE_OPERANDS.value),
        (tile.lookup_assembly(), tile._LOOKUP_OPERANDS.value),
    ):
        constraints = operands.split(",")
        used = {int(number) for number in re.findall(r"\$(\d+)", assembly)}
        assert used == set(range(len(constraints)))
        written = {int(n) for n in re.findall(r"(?m)^\w[\w.]* \{?\$(\d+)", assembly)}
        written |= {int(n) for n in re.findall(r"(?m)^mov\S* \{\$\d+, \$(\d+)\}", assembly)}
        # "&": written before the last operand is read.
        assert {i for i, constraint in enumerate(constraints) if constraint.startswith("=&")} == written
