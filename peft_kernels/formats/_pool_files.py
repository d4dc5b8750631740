"""Adapters as a pool's memory holds them: one run of bytes, made on the host from PEFT's files or from tensors.

For each layer in which the adapter has rank r > 0: A [r_pad, in_features], then B [out_features, r_pad], r_pad being r
rounded up to a page of `PAGE` ranks; each starts at a multiple of `ALIGN` bytes, and what is beyond r is zero. So mixed
ranks cost no padding to the largest, and rows of B can be read in 16-byte loads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.checks import check_adapter, check_finite, shape_text
from peft_kernels.formats.adapter_table import ROW, WORDS
from peft_kernels.formats.peft_adapter import Adapter, open_adapter
from peft_kernels.formats.strict_json import short

PAGE = 8
ALIGN = 256

Sizes = Mapping[str, tuple[int, int]]
Scalings = float | Mapping[str, float]
_FLOAT32_MAX = torch.finfo(torch.float32).max


class Layout(NamedTuple):
    """Where the factors of an adapter are within its run.

    Attributes:
        nbytes: length of the run, a multiple of `ALIGN`.
        ranks: r in each layer of the pool, 0 where the adapter has nothing.
        words: int64 [layers, 4], its rows of the table if the run began at address 0.
        addresses: int64 [layers, 4], 1 where `words` is an address, else 0.
    """

    nbytes: int
    ranks: tuple[int, ...]
    words: Tensor
    addresses: Tensor

    def rows(self, address: int) -> Tensor:
        """Its rows of the table where the run begins at `address`."""
        return self.words + self.addresses * address


class Packed(NamedTuple):
    """An adapter on the host. `blob`: the run, 1-D in the pool's dtype; page-locked for a pool on a GPU."""

    layout: Layout
    blob: Tensor


class Factors(NamedTuple):
    """A [r, in], B [out, r] and the scaling of one layer."""

    A: Tensor
    B: Tensor
    scaling: float


def layout_of(ranks: Sequence[int], scalings: Sequence[float], sizes: Sequence[tuple[int, int]], dtype) -> Layout:
    """Places the factors of these ranks, 0 for none, in layers of these sizes (out, in)."""
    rows, addresses = bytearray(ROW.size * len(sizes)), torch.zeros(len(sizes), WORDS, dtype=torch.int64)
    end = 0
    for i, (r, scaling, (n, k)) in enumerate(zip(ranks, scalings, sizes, strict=True)):
        if r:
            padded = _up(r, PAGE)
            lora_A, lora_B = end, end + _up(padded * k * dtype.itemsize, ALIGN)
            end = lora_B + _up(n * padded * dtype.itemsize, ALIGN)
            ROW.pack_into(rows, i * ROW.size, lora_A, lora_B, r, scaling, k, padded)
            addresses[i, :2] = 1
    words = torch.frombuffer(rows, dtype=torch.int64).view(len(sizes), WORDS)
    return Layout(end, tuple(ranks), words, addresses)


def from_tensors(
    where: str, factors: Mapping[str, Any], scaling: Any, lora_alpha: Any, sizes: Sizes, max_rank: int
) -> dict[str, Factors]:
    """Checks an adapter given as {layer: (A, B)}.

    Raises:
        ValueError: no layer, one that the pool does not know, or a shape, rank or number that does not fit.
        TypeError: no tensors, two dtypes in a layer, or not just one of `scaling` and `lora_alpha`.
    """
    if (scaling is None) == (lora_alpha is None):
        raise TypeError(f"{where}: expected either scaling or lora_alpha beside tensors, which do not say it")
    if not factors:
        raise ValueError(f"{where}: holds no layers; expected {{layer: (A, B)}}")
    name, numbers = ("scaling", scaling) if lora_alpha is None else ("lora_alpha", lora_alpha)
    if isinstance(numbers, Mapping) and numbers.keys() != factors.keys():
        wrong = sorted(map(str, numbers.keys() ^ factors.keys()))
        raise ValueError(f"{where}: {name} and the tensors name different layers: {short(wrong)}; expected the same")
    found = {}
    for layer, pair in factors.items():
        n, k = _size(where, layer, sizes)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"{where}: {short(layer)} has {type(pair).__name__}; expected (A, B)")
        lora_A, lora_B = pair
        check_adapter(f"{where}: {layer}", lora_A, lora_B, (k, "input features"), (n, "output features"))
        check_rank(where, layer, lora_A.shape[0], max_rank)
        if lora_A.is_meta or lora_B.is_meta:
            raise ValueError(f"{where}: {short(layer)} is on the meta device and has no values")
        number = numbers[layer] if isinstance(numbers, Mapping) else numbers
        check_finite(where, name, number)
        number = number if lora_alpha is None else number / lora_A.shape[0]
        if abs(number) > _FLOAT32_MAX:
            raise ValueError(f"{where}: the scaling of {short(layer)} is {short(number)}; expected one of float32")
        found[layer] = Factors(lora_A.detach(), lora_B.detach(), float(number))
    return found


def from_folder(folder: str | os.PathLike, sizes: Sizes, max_rank: int) -> dict[str, Factors]:
    """Reads an adapter of PEFT, checking everything before its data are read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is wrong (`formats.peft_adapter.open_adapter`), does not fit the pool's layers, or holds more
            than plain LoRA on linear layers.
    """
    with open_adapter(folder) as adapter:
        where = str(adapter.path)
        for layer, keys in adapter.layers.items():
            _check_plain(where, layer, keys, adapter)
            n, k = _size(where, layer, sizes)
            lora_A, lora_B = (adapter.info(layer, matrix).shape for matrix in ("lora_A", "lora_B"))
            for matrix, shape, expected in (("lora_A", lora_A, (lora_A[0], k)), ("lora_B", lora_B, (n, lora_A[0]))):
                if shape != expected:
                    raise ValueError(
                        f"{where}: {short(layer)} has {matrix} of shape {shape_text(shape)}, but the pool's layer is "
                        f"for a weight of shape {shape_text((n, k))}; expected {shape_text(expected)}"
                    )
            check_rank(where, layer, lora_A[0], max_rank)
        settings, tensors = adapter.settings, adapter.read()
    found = {}
    for layer, pair in tensors.items():
        r = pair["lora_A"].shape[0]
        scaling = settings.alpha_of(layer) / (math.sqrt(r) if settings.use_rslora else r)
        found[layer] = Factors(pair["lora_A"], pair["lora_B"], scaling)
    return found


def check_rank(where: str, layer: str, r: int, max_rank: int) -> None:
    if r > max_rank:
        raise ValueError(f"{where}: {short(layer)} has rank {r}; expected at most the pool's max_rank, {max_rank}")


def pack(where: str, factors: Mapping[str, Factors], sizes: Sizes, dtype: torch.dtype, pinned: bool) -> Packed:
    """Lays checked factors out as the pool's memory will hold them.

    Raises:
        ValueError: a value is not finite, or not in the pool's dtype.
    """
    of_layers = [factors.get(layer) for layer in sizes]
    ranks = [0 if f is None else f.A.shape[0] for f in of_layers]
    layout = layout_of(ranks, [0.0 if f is None else f.scaling for f in of_layers], list(sizes.values()), dtype)
    blob = torch.zeros(layout.nbytes // dtype.itemsize, dtype=dtype, pin_memory=pinned)
    for f, (lora_A, lora_B, *_) in zip(of_layers, layout.words.tolist(), strict=True):
        if f is not None:
            r, k = f.A.shape
            _view(blob, lora_A, r, k).copy_(f.A)
            _view(blob, lora_B, f.B.shape[0], _up(r, PAGE))[:, :r].copy_(f.B)
    low, high = torch.aminmax(blob)  # a tenth of the time of isfinite; NaN comes through
    if not (low > -math.inf and high < math.inf):
        raise ValueError(_not_finite(where, factors, dtype))
    return Packed(layout, blob)


def _view(blob: Tensor, start: int, rows: int, columns: int) -> Tensor:
    first = start // blob.itemsize
    return blob[first : first + rows * columns].view(rows, columns)


def _not_finite(where: str, factors: Mapping[str, Factors], dtype: torch.dtype) -> str:
    for layer, (lora_A, lora_B, _) in factors.items():
        for name, factor in (("A", lora_A), ("B", lora_B)):
            if not factor.isfinite().all():
                return f"{where}: {name} of {short(layer)} holds non-finite values"
            if not factor.to(dtype).isfinite().all():
                return f"{where}: {name} of {short(layer)} holds values that are too large for the pool's {dtype}"
    return f"{where}: the tensors changed while they were read"


def _size(where: str, layer: object, sizes: Sizes) -> tuple[int, int]:
    size = sizes.get(layer) if isinstance(layer, str) else None
    if size is None:
        raise ValueError(f"{where}: the pool has no layer {short(layer)}; {some(sizes, 'layer')}")
    return size


def some(names: Mapping[str, Any] | Sequence[str], what: str, limit: int = 5) -> str:
    """The first of these names and how many more there are, for messages."""
    if not names:
        return f"it has no {what}s"
    first = [name for name, _ in zip(names, range(limit), strict=False)]
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return f"its {what}s are {', '.join(map(short, first))}{more}"


def _check_plain(where: str, layer: str, keys: Mapping[str, str], adapter: Adapter) -> None:
    refused = {
        "lora_magnitude_vector": "DoRA",
        "lora_bias": "a bias of the update (lora_bias)",
        "bias": "a trained bias",
        "lora_embedding_A": "an embedding's adapter",
    }
    for name, what in refused.items():
        if name in keys:
            raise ValueError(f"{where}: {short(layer)} has {what}, which a pool does not hold; expected only A and B")


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
