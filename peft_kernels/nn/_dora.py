"""The row norms that DoRA divides by, kept where nothing can have changed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter
from torch.utils.weak import WeakIdRef

from peft_kernels import functional
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.nn._weights import row_norm

_PLAIN = frozenset((Tensor, Parameter))


class WeightNorms:
    """‖W‖² and ‖W + s B A‖ by row, of one layer.

    ‖W‖² is kept while W is frozen and the same tensor, at the same address and version. The norm of the sum is kept in
    evaluation mode only: a change that does not count as one (through `.data`, or by an optimizer that writes to raw
    pointers, as bitsandbytes' do) leaves address and version as they are, and training consists of changes to A and B.
    Without ‖W‖² the norm costs one [N, K] x [K, r] product, about r / M of the layer.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._squared: tuple[tuple, Tensor] | None = None
        self.clear_sum()

    def clear_sum(self) -> None:
        self._sum: tuple[tuple, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightNorms, ()  # a copy of the layer has other tensors

    def of(
        self, weight: Tensor | NF4Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, training: bool
    ) -> Tensor | None:
        """‖W + s B A‖ by row, [N] in float32 (float64 for float64), without gradient.

        Returns:
            None where nothing may be kept: in compiled code, in a CUDA graph (which would go on reading memory that
            this object no longer holds), for tensors that are not plain or whose changes are not counted.
        """
        if torch.compiler.is_compiling():
            return None
        held = weight.packed if isinstance(weight, NF4Weight) else weight
        if not all(map(_is_traceable, (held, lora_A, lora_B))):
            return None
        if held.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        stream = _stream(held)
        key = (stream, *_state(held), *_state(lora_A), *_state(lora_B), scaling)
        if not training and self._sum is not None and self._sum[0] == key:
            return self._sum[1]
        # Not inference tensors even if made under torch.inference_mode, so that a later call can save them.
        with torch.inference_mode(False), torch.no_grad():
            squared = None if held.requires_grad else self._weight_norm_squared(weight, (stream, *_state(held)))
            norm = functional.dora_weight_norm(weight, lora_A, lora_B, scaling=scaling, weight_norm_squared=squared)
        if not training:
            self._sum = key, norm
        return norm

    def _weight_norm_squared(self, weight: Tensor | NF4Weight, key: tuple) -> Tensor:
        known = self._squared
        if known is not None and known[0] == key:
            return known[1]
        squared = row_norm(weight).square_()
        self._squared = key, squared
        return squared


def _is_traceable(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and not tensor.is_inference()


def _stream(tensor: Tensor) -> int:
    """What is kept serves the stream that computed it: others would have to wait for it, and nobody tells them."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _state(tensor: Tensor) -> tuple:
    # The address alone could be that of a new tensor in the place of the old one.
    return WeakIdRef(tensor), tensor.data_ptr(), tensor._version
