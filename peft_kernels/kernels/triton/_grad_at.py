"""(dYᵀ x) at chosen places: a GEMM over tiles of W that stores a list of places instead of the tile.

A tile's sums go to shared memory once for some hundred places, each of which is then gathered by its 2-byte number
within the tile. Lists lie tile after tile; in a tile, the places of a row are neighbours, in the result as in the list,
so a number for each row of a tile says where they go: the result has the order of the `Positions`. A tile without
places does not sum.

Floor as of a dense dW; 2 bytes of index and one number a place to write instead of W's size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from peft_kernels import tuning
from peft_kernels.formats.positions import Positions
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._gemm_tile import tile_of
from peft_kernels.kernels.triton._masked_grad_weight import tile_of_grad

# Places that a thread gathers at a time.
_OF_THREAD = 8
_SORTED_BLOCK = 1024


class TilePlaces(NamedTuple):
    """Places tile by tile of [block_n, block_k], tiles row by row.

    Attributes:
        numbers: int16 [nnz]: row · block_k + column within the tile.
        starts: int64 [tiles + 1]: where a tile's begin in `numbers`.
        shifts: [tiles · block_n]: place in the result - place in `numbers`, of each row of each tile.
    """

    numbers: Tensor
    starts: Tensor
    shifts: Tensor


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Tiles made before, by the tensor of places while it lives and is not written to: {flat: (version, {tile: made})}."""


def tile_places(places: Positions, block_n: int, block_k: int) -> TilePlaces:
    """The places by tiles, made on the device without a wait, once for the steps that use the same `places.flat`.

    While a CUDA graph is captured they are made in the graph, from the places as they are at each replay, and not kept:
    their memory is the graph's, and that of lists made before would be freed under it when the places change.
    """
    flat, sizes = places.flat, (*places.shape, block_n, block_k)
    if _captured(flat):
        return _by_tiles(flat, *sizes)
    version = 0 if flat.is_inference() else flat._version
    if flat not in _known or _known[flat][0] != version:
        _known[flat] = version, {}
    made = _known[flat][1]
    # Another stream would read the lists before the stream that makes them has.
    key = (*sizes, torch.cuda.current_stream(flat.device) if flat.is_cuda else None)
    if key not in made:
        made[key] = _by_tiles(flat, *sizes)
    return made[key]


def _captured(flat: Tensor) -> bool:
    return flat.is_cuda and torch.cuda.is_current_stream_capturing()


def _by_tiles(flat: Tensor, n: int, k: int, block_n: int, block_k: int) -> TilePlaces:
    tiles_n, tiles_k = _launch.blocks(n, block_n), _launch.blocks(k, block_k)
    rows = torch.arange(tiles_n * block_n, device=flat.device)
    edges = (rows[:, None] * k + torch.arange(tiles_k, device=flat.device) * block_k).clamp_(max=n * k)
    begins = torch.searchsorted(flat, edges.flatten().to(flat.dtype))
    counts = begins.diff(append=begins.new_full((1,), flat.numel()))
    begins, counts = (t.view(tiles_n, block_n, tiles_k).transpose(1, 2).flatten() for t in (begins, counts))
    ends = counts.cumsum(0)
    lists = ends - counts
    starts = torch.cat((lists[::block_n], ends[-1:]))
    shifts = (begins - lists).to(flat.dtype)
    numbers = torch.empty(flat.shape, dtype=torch.int16, device=flat.device)
    if flat.numel():
        _launch.launch(
            _number, (_launch.blocks(flat.numel(), _SORTED_BLOCK),), flat.device,
            flat, shifts, numbers, flat.numel(), k, tiles_k,
            BLOCK=_SORTED_BLOCK, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return TilePlaces(numbers, starts, shifts)


def grad_at(grad_y: Tensor, x: Tensor, places: Positions, dtype: torch.dtype) -> Tensor:
    """(dYᵀ x) at `places` for dY [M, N] and x [M, K] of one dtype and any strides; [nnz] in `dtype`, rounded once."""
    (m, n), k = grad_y.shape, x.shape[1]
    out = torch.empty(places.flat.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = tuning.config(_launch.architecture(x.device), "masked_grad_weight", x.dtype)
    tiles = tile_places(places, config.block_n, config.block_k)
    _launch.launch(
        _grad_at, (tiles.starts.numel() - 1,), x.device,
        grad_y, x, *tiles, out, m, n, k, grad_y.stride(), x.stride(),
        CHUNK=32 * config.num_warps * _OF_THREAD, PRECISION=_launch.dot_precision(x.dtype), **config.options(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count"])
def _number(
    flat, shifts, numbers, count, K, tiles_k, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Puts the number of each place within its tile where the tile's list has it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    place = tl.load(flat + at, mask=inside, other=0)
    row, column = place // K, place % K
    tile = (row // BLOCK_N).to(tl.int64) * tiles_k + column // BLOCK_K
    to = at - tl.load(shifts + tile * BLOCK_N + row % BLOCK_N, mask=inside, other=0)
    number = row % BLOCK_N * BLOCK_K + column % BLOCK_K
    tl.store(numbers + to, number.to(tl.int16), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _grad_at(
    grad_y, x, numbers, starts, shifts, out, M, N, K, y_strides, x_strides,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [nnz]."""
    row, column = tile_of(tl.program_id(0), N, K, BLOCK_N, BLOCK_K, GROUP_M)
    tile = row // BLOCK_N * tl.cdiv(K, BLOCK_K) + column // BLOCK_K
    begin, end = tl.load(starts + tile), tl.load(starts + tile + 1)
    if begin == end:
        return
    total = tile_of_grad(grad_y, x, row, column, M, N, K, y_strides, x_strides, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    sums = tl.reshape(total, (BLOCK_N * BLOCK_K,))
    for first in tl.range(begin, end, CHUNK, num_stages=1):
        at = first + tl.arange(0, CHUNK)
        inside = at < end
        number = tl.load(numbers + at, mask=inside, other=0).to(tl.int32)
        value = tl.gather(sums, number, 0)
        to = at + tl.load(shifts + tile * BLOCK_N + number // BLOCK_K, mask=inside, other=0)
        tl.store(out + to, value.to(out.dtype.element_ty), mask=inside)
