"""What modules do with a frozen weight that is a dense tensor or an `NF4Weight`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peft_kernels.checks import check_floating, check_nf4
from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.kernels.composed.nf4_linear import pieces


def check_weight(module: str, weight: Any) -> None:
    if isinstance(weight, NF4Weight):
        check_nf4(module, "weight", weight)
    else:
        check_floating(module, "weight", weight)


def frozen(weight: Any) -> Any:
    """The weight itself; a parameter stops requiring gradients, one of 4 bits never did."""
    return weight if isinstance(weight, NF4Weight) else weight.requires_grad_(False)


def widened(weight: Tensor | NF4Weight) -> Tensor:
    """The weight in float32 (float64 for float64). One of 4 bits is unpacked without rounding."""
    if isinstance(weight, NF4Weight):
        return weight.dequantize(torch.float32)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def dense_rows(q: NF4Weight, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rows) of a matrix, or of a stack seen as one, unpacked no more than 64 MiB at a time."""
    n, k, *_ = q.layout
    for start, stop in pieces(n, dtype.itemsize * k):
        yield start, stop, q.rows(start, stop).dequantize(dtype)


def row_norm(weight: Tensor | NF4Weight) -> Tensor:
    """‖W‖ by row, [N], in float32 (float64 for float64); of 4 bits in the dtype that was quantised."""
    if isinstance(weight, NF4Weight):
        norms = torch.empty(weight.layout[0], dtype=torch.float32, device=weight.device)
        for start, stop, rows in dense_rows(weight, weight.dtype):
            norms[start:stop] = row_norm(rows)
        return norms
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=wide)


def moved(q: NF4Weight, fn: Callable[[Tensor], Tensor]) -> NF4Weight:
    """What `nn.Module._apply(fn)` makes of a quantised weight: fn may move it, but its bits are no numbers to cast."""

    def move(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return q.with_tensors([move(tensor) for tensor in q.tensors])


def state_of(q: NF4Weight, key: str) -> dict[str, Tensor]:
    """The entries of a state dict, under bitsandbytes' keys. On the meta device all of them are there."""
    if q.device.type != "meta":
        return nf4.to_state(q, key)
    if q.is_nested:  # its number stands in a text
        q = q._replace(nested_offset=torch.zeros(()))
    return {name: tensor.to("meta") for name, tensor in nf4.to_state(q, key).items()}
