"""`sparse_linear` as PyTorch's matmuls: on one dense piece of W after another, or on the kept blocks alone.

y is cut along N and dx along K, so that each element is summed in one matmul and rounded once; where a layout can be
decoded by rows only, dx is summed over its pieces in at least float32.

Blocks on a CPU: a block row's kept columns of x are gathered for matmuls with its blocks, so that what is not kept
takes no time. From `DENSE_FROM` on a matmul over everything is faster than the copies. A GPU would wait for so many
small launches: there it is dense pieces always.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.formats.sparse import BitmapWeight, BlockWeight, CsrWeight, SparseWeight
from peft_kernels.kernels._masked import strips
from peft_kernels.kernels.composed._passes import sum_rows

DENSE_FROM = 0.5
CHAIN = 32  # terms of a matmul's sum


def unsupported(problem) -> str | None:
    return None


def forward(x, weight, bias):
    y = x.new_empty(x.shape[0], weight.shape[0])
    if _skips(weight):
        _block_rows(y, x, weight, bias)
        return y
    for rows, piece in _row_pieces(weight, x.dtype):
        y[:, rows] = F.linear(x, piece, None if bias is None else bias[rows])
    return y


def backward(grad_y, x, weight, needs):
    """Gradients (dx, dvalues, dbias); None where `needs` says that nobody asked."""
    return (
        _grad_x(grad_y, weight) if needs[0] else None,
        _grad_values(grad_y, x, weight) if needs[1] else None,
        sum_rows(grad_y) if needs[2] else None,
    )


def _skips(weight: SparseWeight) -> bool:
    return isinstance(weight, BlockWeight) and weight.device.type == "cpu" and weight.density < DENSE_FROM


def _row_pieces(weight: SparseWeight, dtype: torch.dtype) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """(rows, W[rows] in `dtype`), each row once."""
    if isinstance(weight, BitmapWeight):
        yield from weight.pieces(dtype)
        return
    n, k = weight.shape
    for start, stop in strips(n, k * dtype.itemsize, weight.device):
        yield slice(start, stop), weight.dense_rows(start, stop, dtype)


def _grad_x(grad_y, weight):
    n, k = weight.shape
    grad_x = grad_y.new_empty(grad_y.shape[0], k)
    if _skips(weight):
        _block_columns(grad_x, grad_y, weight)
        return grad_x
    if isinstance(weight, BitmapWeight | CsrWeight):
        return _grad_x_by_rows(grad_y, weight)
    for start, stop in strips(k, n * grad_y.element_size(), weight.device):
        torch.mm(grad_y, weight.dense_columns(start, stop, grad_y.dtype), out=grad_x[:, start:stop])
    return grad_x


def _grad_x_by_rows(grad_y, weight):
    wide = torch.promote_types(torch.float32, grad_y.dtype)
    total = torch.zeros(grad_y.shape[0], weight.shape[1], dtype=wide, device=grad_y.device)
    for rows, piece in _row_pieces(weight, grad_y.dtype):
        total.addmm_(grad_y[:, rows].to(wide), piece.to(wide))
    return total.to(grad_y.dtype)


def _grad_values(grad_y, x, weight: BlockWeight):
    """The kept blocks of dYᵀ x, in the values' dtype: block row by block row, each a matmul with the columns that it
    keeps."""
    grad = torch.empty(weight.values.shape, dtype=weight.dtype, device=weight.device)
    block, wide = weight.block, torch.promote_types(torch.float32, grad_y.dtype)
    xs = _Columns(x, block)
    for row, chosen, columns in _lines(weight.starts, weight.structure.columns, 0, weight.grid[0]):
        some = _padded(grad_y[:, row * block : (row + 1) * block], block)
        if some.dtype != weight.dtype or wide != some.dtype:
            some = some.to(wide)
        product = torch.mm(some.t(), xs.gathered(columns).to(some.dtype))
        grad[chosen] = product.view(block, -1, block).transpose(0, 1)
    return grad


class _Columns:
    """The columns of a matrix in blocks, of which some are gathered."""

    def __init__(self, matrix: Tensor, block: int) -> None:
        self.matrix, self.block = matrix, block
        self.whole = matrix.shape[1] // block
        self.blocks = matrix[:, : self.whole * block].unflatten(1, (self.whole, block)) if self.whole else None

    def gathered(self, blocks: Tensor) -> Tensor:
        """[M, len(blocks) · B], the last block of the matrix padded with zeros."""
        m = self.matrix.shape[0]
        if self.blocks is not None and (not len(blocks) or int(blocks.max()) < self.whole):
            return self.blocks.index_select(1, blocks).view(m, -1)
        parts = [_padded(self.matrix[:, b * self.block : (b + 1) * self.block], self.block) for b in blocks.tolist()]
        return torch.cat(parts, 1)


def _padded(matrix: Tensor, columns: int) -> Tensor:
    missing = columns - matrix.shape[1]
    return F.pad(matrix, (0, missing)) if missing else matrix


def _lines(starts: Tensor, others: Tensor, first: int, count: int) -> Iterator[tuple[int, slice, Tensor]]:
    """(block row or column, places of its blocks, the columns or rows of these), of those that have any."""
    bounds = starts[first : first + count + 1].tolist()
    for i in range(count):
        if bounds[i] < bounds[i + 1]:
            chosen = slice(bounds[i], bounds[i + 1])
            yield i, chosen, others[chosen]


def _block_rows(y, x, weight: BlockWeight, bias) -> None:
    """y = x Wᵀ + bias, block row by block row."""
    block, n = weight.block, weight.shape[0]
    y[:] = 0 if bias is None else bias
    xs = _Columns(x, block)
    for row, chosen, columns in _lines(weight.starts, weight.structure.columns, 0, weight.grid[0]):
        rows = slice(row * block, min((row + 1) * block, n))
        blocks = weight.values[chosen].mT[..., : rows.stop - rows.start]
        _add_line(y[:, rows], xs, columns, blocks)


def _block_columns(grad_x, grad_y, weight: BlockWeight) -> None:
    """dx = dY W, block column by block column."""
    block, k, structure = weight.block, weight.shape[1], weight.structure
    grad_x.zero_()
    ys = _Columns(grad_y, block)
    for column, chosen, rows in _lines(weight.starts, structure.rows, weight.grid[0] + 1, weight.grid[1]):
        columns = slice(column * block, min((column + 1) * block, k))
        blocks = weight.values[structure.order[chosen].long()][..., : columns.stop - columns.start]
        _add_line(grad_x[:, columns], ys, rows, blocks)


def _add_line(out: Tensor, operand: _Columns, columns: Tensor, blocks: Tensor) -> None:
    """out [M, some of B] += the operand's gathered columns times blocks [., B, some of B], rounded once. In float32 in
    short sums: without the zeros between them, a matmul would sum in longer chains than of the dense weight."""
    gathered, total = operand.gathered(columns), out.clone()
    flat = blocks.reshape(-1, out.shape[1]).to(out.dtype)
    step = CHAIN if out.dtype == torch.float32 else max(1, len(flat))
    for i in range(0, len(flat), step):
        # Not `addmm`, which goes on with the chain that `total` is.
        total += torch.mm(gathered[:, i : i + step], flat[i : i + step])
    out.copy_(total)
