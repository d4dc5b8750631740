"""The k largest of many scores by radix selection: no sort, and no wait for the device.

A float32 read as an integer, its other 31 bits flipped where it is negative, is an integer of the same order. The k-th
largest is found digit by digit: one pass over the scores counts the 2048 values of their first 11 bits, which says what
the first digit of the k-th largest is and how many scores are above; two more passes do the same for the next 11 and
10 bits among the scores that begin with the digits found. (float64: six passes.) Counts are integers, so that every
run, and every rank with the same scores, finds the same. A last pass packs the mask. On a CPU csrc/select.cpp counts
and packs.

Exactly k are kept. Of scores that equal the k-th largest those with the lowest places in the flattened matrix are, and
of several matrices the earlier ones first; -0 equals 0. Infinities are the largest and smallest numbers; NaN is never
kept, so that fewer than k are where fewer are numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels.formats.mask import PackedMask, words_of
from peft_kernels.functional import mask_pack
from peft_kernels.kernels.cpu import _select as native
from peft_kernels.ops._eager import is_plain
from peft_kernels.pruning._scores import Scores, scores_of

_DIGIT = 11
# Of a single row more bins than scores would have to be gone through.
_ROW_DIGIT = 8


def kth_largest(scores: Tensor | Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest of the scores of one or of several tensors together, without a sort or a wait for the device.

    Args:
        scores: floating-point tensors of any shapes.
        k: 1 <= k <= how many scores there are.

    Returns:
        [] in float32 (float64 where a tensor is), on the first tensor's device; NaN where fewer than k are numbers.

    Raises:
        ValueError: no such k, or no tensor.
        TypeError: no floating-point tensors.
    """
    tensors = [scores] if isinstance(scores, Tensor) else list(scores)
    parts = [scores_of(tensor.reshape(-1, 1) if isinstance(tensor, Tensor) else tensor) for tensor in tensors]
    _check_count("kth_largest", k, sum(part.numel for part in parts), least=1)
    parts = _of_one_dtype(parts)
    search = _Search(parts[0].device, parts[0].dtype, 1, k)
    search.run(lambda: (strip for part in parts for _, strip in part.strips()))
    return _numbers(search.prefix).squeeze()


def keep_largest(scores: Any, k: int) -> Any:
    """Masks of the k largest scores of one matrix, or of several together: the module says which of equal ones.

    Args:
        scores: [out_features, in_features], floating-point, any strides; or a sequence of such.
        k: how many weights are kept in all, 0 <= k <= how many there are.

    Returns:
        A `PackedMask`, of a sequence a list of them, each on the device of its scores.

    Raises:
        ValueError: no such k, or scores without two dimensions.
        TypeError: no floating-point tensors.
    """
    if isinstance(scores, (Tensor, Scores)):
        return keep_largest([scores], k)[0]
    parts = [scores_of(values, f"scores[{i}]") for i, values in enumerate(scores)]
    _check_count("keep_largest", k, sum(part.numel for part in parts))
    if not parts:
        return []
    parts = _of_one_dtype(parts)
    search = _Search(parts[0].device, parts[0].dtype, 1, k)
    search.run(lambda: (strip for part in parts for _, strip in part.strips()))
    masks = []
    for part in parts:
        n, columns = part.shape
        words = search.prefix.new_empty(n, words_of(columns), dtype=torch.int32, device=part.device)
        for rows, strip in part.strips():
            words[rows] = search.kept_words(strip)
        masks.append(PackedMask(words, part.shape))
    return masks


def keep_largest_by_row(scores: Any, k: int) -> PackedMask:
    """The mask of the k largest scores of each row.

    Args:
        scores: [out_features, in_features], floating-point, any strides.
        k: how many weights are kept in each row, 0 <= k <= in_features.

    Returns:
        A `PackedMask` on the device of the scores.

    Raises:
        ValueError: no such k, or scores without two dimensions.
        TypeError: no floating-point tensor.
    """
    part = scores_of(scores)
    n, columns = part.shape
    _check_count("keep_largest_by_row", k, columns)
    words = torch.empty(n, words_of(columns), dtype=torch.int32, device=part.device)
    for rows, strip in part.strips(1 << _ROW_DIGIT):
        search = _Search(part.device, part.dtype, len(strip), k, _ROW_DIGIT)
        search.run(functools.partial(iter, (strip,)))
        words[rows] = search.kept_words(strip)
    return PackedMask(words, part.shape)


class _Search:
    """The k-th largest key of all scores together (`rows` = 1), or of each of `rows` rows by itself.

    Attributes:
        prefix: [rows, 1], the digits found so far; at the end the k-th largest key.
        wanted: int64 [rows, 1], how many of the keys that begin with these digits are to be kept.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, rows: int, k: int, digit: int = _DIGIT) -> None:
        self.digit, self.bins = digit, 1 << digit
        self.integer = torch.int64 if dtype == torch.float64 else torch.int32
        self.prefix = torch.zeros(rows, 1, dtype=self.integer, device=device)
        self.wanted = torch.full((rows, 1), k, dtype=torch.int64, device=device)
        plain = rows == 1 and device.type == "cpu" and dtype == torch.float32
        self.native = plain and not torch.compiler.is_compiling() and native.is_available()

    def run(self, strips: Callable[[], Iterable[Tensor]]) -> None:
        """Finds the digits. `strips()` gives all scores, once for each digit."""
        for top in range(8 * self.integer.itemsize, 0, -self.digit):
            low = max(0, top - self.digit)
            first = top == 8 * self.integer.itemsize
            self._narrow(self._count(strips(), top, low), top - low)
            if first:
                self.prefix -= self.bins // 2

    def _count(self, strips: Iterable[Tensor], top: int, low: int) -> Tensor:
        """int64 [rows, bins]: how often each value of the bits [low, top) follows the digits found."""
        rows, device = len(self.prefix), self.prefix.device
        counts = torch.zeros(rows * self.bins, dtype=torch.int64, device=device)
        for strip in strips:
            if self._by_csrc(strip):
                native.count(strip, top, low, int(self.prefix), counts)
                continue
            keys = _keys(strip)
            digits = ((keys >> low) & ((1 << (top - low)) - 1)).to(torch.int32)
            if top == 8 * self.integer.itemsize:
                digits ^= self.bins // 2  # its first bit is the sign: negative keys are the lower ones
            else:
                follows = (keys >> top) == self.prefix.to(keys.device)
                digits.masked_fill_(~follows, rows * self.bins + 1)  # counted nowhere, whatever a row's number adds
            if rows > 1:
                digits += torch.arange(rows, dtype=torch.int32, device=keys.device).unsqueeze(1) * self.bins
            counts += _histogram(digits, rows * self.bins).to(device)
        return counts.view(rows, self.bins)

    def _by_csrc(self, strip: Tensor) -> bool:
        """Whether csrc reads the strip: not on another device than the digits, nor past who watches PyTorch's ops."""
        return self.native and strip.device.type == "cpu" and is_plain(strip)

    def _narrow(self, counts: Tensor, bits: int) -> None:
        """Appends the digit: the largest one that, with all above it, has as many keys as are wanted."""
        up_to = counts.cumsum(1)
        above = up_to[:, -1:] - up_to
        digit = ((above + counts >= self.wanted).sum(1, keepdim=True) - 1).clamp_(0, (1 << bits) - 1)
        self.wanted -= above.gather(1, digit)
        self.prefix = (self.prefix << bits) | digit.to(self.integer)

    def kept_words(self, strip: Tensor) -> Tensor:
        """The words of a mask of what `kept` gives."""
        if not self._by_csrc(strip):
            return mask_pack(self.kept(strip)).words
        words, ties = native.kept_words(strip, int(self.prefix), int(self.wanted))
        self.wanted -= ties
        return words

    def kept(self, strip: Tensor) -> Tensor:
        """bool, of the shape of `strip`. All scores are to come by in order: ties are counted."""
        keys = _keys(strip)
        last, wanted = self.prefix.to(keys.device), self.wanted.to(keys.device)
        ties = (keys == last) & (keys > _nan_key(keys.dtype))
        if len(last) > 1:
            return (keys > last) | (ties & (ties.cumsum(1, dtype=torch.int32) <= wanted))
        order = ties.flatten().cumsum(0, dtype=torch.int32).view(ties.shape)
        self.wanted = self.wanted - ties.sum().to(self.wanted.device)
        return (keys > last) | (ties & (order <= wanted))


def _keys(scores: Tensor) -> Tensor:
    """Integers in the order of the scores, int32 or int64; those of NaN are one, the lowest that occurs.

    NaNs of both signs stand at the two ends of the order. Adding how many there are of one sign pushes the upper ones
    over the largest integer, to the lower ones at the other end.
    """
    integer, inf = _INTEGERS[scores.dtype]
    bits = (scores + 0.0).view(integer)  # -0 + 0 is 0
    bits = bits ^ ((bits >> (8 * integer.itemsize - 1)) & torch.iinfo(integer).max)
    return bits.add_(torch.iinfo(integer).max - inf).clamp_(min=_nan_key(integer))


def _numbers(keys: Tensor) -> Tensor:
    """The scores that have these keys."""
    dtype, inf = _FLOATS[keys.dtype]
    highest = torch.iinfo(keys.dtype).max
    bits = keys - (highest - inf)
    return (bits ^ ((bits >> (8 * keys.dtype.itemsize - 1)) & highest)).view(dtype)


_INTEGERS = {torch.float32: (torch.int32, 0x7F80_0000), torch.float64: (torch.int64, 0x7FF0_0000_0000_0000)}
_FLOATS = {integer: (dtype, inf) for dtype, (integer, inf) in _INTEGERS.items()}


def _nan_key(integer: torch.dtype) -> int:
    highest = torch.iinfo(integer).max
    return -highest - 2 + 2 * (highest - _FLOATS[integer][1])


def _histogram(digits: Tensor, bins: int) -> Tensor:
    """int64 [bins]: how often each number of [0, bins) occurs; others, above `bins`, are not counted."""
    flat = digits.flatten()
    if flat.device.type != "cpu":  # bincount would wait for the largest digit; over integers histc is deterministic
        return torch.histc(flat, bins, 0, bins).to(torch.int64)
    return torch.bincount(flat, minlength=bins)[:bins]


def _of_one_dtype(parts: list[Scores]) -> list[Scores]:
    widest = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    return [part._replace(dtype=widest) for part in parts]


def _check_count(where: str, k: Any, total: int, least: int = 0) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{where}: k is {k!r}; expected an integer")
    if not least <= k <= total:
        raise ValueError(f"{where}: k is {k}; expected {least} <= k <= {total}, the number of scores")
