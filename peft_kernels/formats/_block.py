"""Block-sparse weights: square blocks that hold anything are kept, all others take neither memory nor time.

The kept blocks lie in the order of a BSR matrix: block row by block row, by column within one. What the kernels need
to walk them by rows (y), by columns (dx) or one by one (dW) is one tensor of int32, so that dx reads the same blocks
and no transposed copy exists. Blocks at the lower and right edges are padded with zeros, which reach no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.positions import extremes

LAYOUT = "block"
BLOCKS = (32, 64, 128)


class BlockStructure(NamedTuple):
    """Where the kept blocks are, all int32 and views of one memory. R and C are the numbers of block rows and columns.

    Attributes:
        row_starts: [R + 1]: the blocks of block row r are row_starts[r] to row_starts[r + 1] of the values.
        columns: [blocks]: the block column of each.
        column_starts: [C + 1]: places of block column c in the two tensors that follow.
        rows: [blocks]: column by column, the block row of each block.
        order: [blocks]: column by column, the block's place in the values.
        long_rows: [R]: block rows, those with the most blocks first, so that no long one is left for the end.
        long_columns: [C]: the same of block columns.
        block_rows: [blocks]: the block row of each block, in the order of the values.
    """

    row_starts: Tensor
    columns: Tensor
    column_starts: Tensor
    rows: Tensor
    order: Tensor
    long_rows: Tensor
    long_columns: Tensor
    block_rows: Tensor


class BlockWeight(NamedTuple):
    """A matrix of which some blocks are kept. `values` may be a parameter that trains.

    Attributes:
        values: [blocks, B, B], out_features before in_features.
        indices: int32, the tensors of a `BlockStructure` one behind another, on the device of `values`.
        starts: int32 [R + 1 + C + 1] on the CPU: `row_starts` and `column_starts`, so that nobody waits for the device.
        shape: of the matrix, [out_features, in_features].
    """

    values: Tensor
    indices: Tensor
    starts: Tensor
    shape: torch.Size

    @property
    def layout(self) -> str:
        return LAYOUT

    @property
    def tensors(self) -> list[Tensor]:
        """[values, indices, starts]."""
        return [self.values, self.indices, self.starts]

    @property
    def numbers(self) -> list[int]:
        """out_features, in_features, block, blocks."""
        return [*self.shape, self.block, self.values.shape[0]]

    @property
    def block(self) -> int:
        """B, the side of a block."""
        return self.values.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return -(-self.shape[0] // self.block), -(-self.shape[1] // self.block)

    @property
    def structure(self) -> BlockStructure:
        (r, c), blocks = self.grid, self.values.shape[0]
        return BlockStructure(*self.indices.split((r + 1, blocks, c + 1, blocks, blocks, r, c, blocks)))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def density(self) -> float:
        """Kept blocks / all blocks; 1.0 of an empty matrix."""
        r, c = self.grid
        return self.values.shape[0] / (r * c) if r * c else 1.0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> BlockWeight:
        """The same shape over other tensors, in the order of `tensors`."""
        values, indices, starts = tensors
        return BlockWeight(values, indices, starts, self.shape)

    def to(self, device: torch.device | str) -> BlockWeight:
        """The same weight on another device; itself where it is there already."""
        return self._replace(values=self.values.to(device), indices=self.indices.to(device))

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """[out_features, in_features] with zeros where no block is, in `dtype` (None: the values')."""
        return self.dense_rows(0, self.shape[0], dtype)

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) of `dense`."""
        first, last = start // self.block, -(-stop // self.block)
        chosen = slice(int(self.starts[first]), int(self.starts[last]))
        structure = self.structure
        tiles = self.values.new_zeros(last - first, self.block, self.grid[1], self.block, dtype=dtype)
        rows, columns = structure.block_rows[chosen].long() - first, structure.columns[chosen].long()
        tiles[rows, :, columns] = self.values[chosen].detach().to(tiles.dtype)
        dense = tiles.view((last - first) * self.block, self.grid[1] * self.block)
        return dense[start - first * self.block :][: stop - start, : self.shape[1]]

    def dense_columns(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Columns [start, stop) of `dense`."""
        first, last = start // self.block, -(-stop // self.block)
        starts = self.starts[self.grid[0] + 1 :]
        chosen = slice(int(starts[first]), int(starts[last]))
        structure = self.structure
        tiles = self.values.new_zeros(self.grid[0], self.block, last - first, self.block, dtype=dtype)
        places = structure.order[chosen].long()
        rows, columns = structure.rows[chosen].long(), structure.columns[places].long() - first
        tiles[rows, :, columns] = self.values[places].detach().to(tiles.dtype)
        dense = tiles.view(self.grid[0] * self.block, (last - first) * self.block)
        return dense[: self.shape[0], start - first * self.block :][:, : stop - start]

    def check(self, where: str) -> None:
        """Refuses a structure that is none (waits for the device): for what comes from a file.

        Raises:
            ValueError: a tensor of another dtype or size, an index out of range, blocks not in order.
        """
        (r, c), blocks, block = self.grid, self.values.shape[0], self.block
        sizes = (r + 1) + (c + 1) + r + c + 4 * blocks
        if block not in BLOCKS or self.values.shape != (blocks, block, block):
            raise ValueError(
                f"{where}: values have shape {tuple(self.values.shape)}; expected (blocks, B, B), B of 32, 64 or 128"
            )
        for name, tensor, size in (("indices", self.indices, sizes), ("starts", self.starts, r + c + 2)):
            if tensor.dtype != torch.int32 or tensor.shape != (size,):
                raise ValueError(
                    f"{where}: {name} have dtype {tensor.dtype} and shape {tuple(tensor.shape)}; expected torch.int32 "
                    f"and ({size},) for {blocks} blocks of {block} in {tuple(self.shape)}"
                )
        rows, columns = self.structure.block_rows.long(), self.structure.columns.long()
        for name, found, end in (("row", rows, r), ("column", columns, c)):
            least, most = extremes(found)
            if least < 0 or most >= end:
                raise ValueError(f"{where}: block {name}s {least} to {most}; expected ones in [0, {end})")
        if bool(((rows * c + columns).diff() <= 0).any()):
            raise ValueError(f"{where}: the blocks are not in order, or one occurs twice")
        again = assembled(self.values, rows, columns, self.shape)
        if not (torch.equal(again.indices, self.indices) and torch.equal(again.starts, self.starts)):
            raise ValueError(f"{where}: the indices contradict each other")


def assembled(values: Tensor, rows: Tensor, columns: Tensor, shape: Sequence[int]) -> BlockWeight:
    """The weight of these blocks (waits for the device).

    Args:
        values: [blocks, B, B], by rows and then by columns.
        rows, columns: int64 [blocks], the block row and the block column of each.
        shape: of the matrix.
    """
    block = values.shape[1]
    r, c = (-(-size // block) for size in shape)
    row_starts, row_counts = _starts(rows, r)
    column_starts, column_counts = _starts(columns, c)
    order = columns.argsort(stable=True)
    long_rows, long_columns = (counts.argsort(descending=True, stable=True) for counts in (row_counts, column_counts))
    parts = (row_starts, columns, column_starts, rows[order], order, long_rows, long_columns, rows)
    starts = torch.cat([row_starts, column_starts]).to(torch.int32).cpu()
    return BlockWeight(values, torch.cat(parts).to(torch.int32), starts, torch.Size(shape))


def _starts(indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """([count + 1] where each of `count` begins, [count] how many each has)."""
    counts = torch.bincount(indices, minlength=count)
    return F.pad(counts.cumsum(0), (1, 0)), counts


def compress_blocks(weight: Tensor, block: int, kept: Tensor | None = None) -> BlockWeight:
    """Keeps the blocks of a matrix that hold a number other than 0 (-0 is 0, NaN is not), or one that is `kept`.

    Args:
        weight: [out_features, in_features]; zero outside `kept`.
        block: 32, 64 or 128.
        kept: bool [out_features, in_features], or None.
    """
    if block not in BLOCKS:
        raise ValueError(f"compress: block is {block!r}; expected 32, 64 or 128")
    tiles = _tiles(weight, block)
    rows, columns = _tiles(weight != 0 if kept is None else kept, block).any(3).any(2).nonzero().unbind(1)
    return assembled(tiles[rows, columns].contiguous(), rows, columns, weight.shape)


def _tiles(matrix: Tensor, block: int) -> Tensor:
    """[R, C, B, B], a view unless the matrix is padded."""
    n, k = matrix.shape
    if n % block or k % block:
        matrix = F.pad(matrix, (0, -k % block, 0, -n % block))
    r, c = (size // block for size in matrix.shape)
    return matrix.reshape(r, block, c, block).transpose(1, 2)
