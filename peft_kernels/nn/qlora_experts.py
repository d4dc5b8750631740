"""`FusedQLoRAExperts`: the weight stack of a mixture of experts frozen in 4 bits, with a trained update for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.nn._quantised import QuantisedMergeable
from peft_kernels.nn.experts import FusedLoRAExperts, check_parameter, check_stack, new_stack


class FusedQLoRAExperts(QuantisedMergeable, FusedLoRAExperts):
    """y[m] = x[m] W_eᵀ + b_e + scaling · (dropout(x)[m] A_eᵀ) B_eᵀ for the rows m of expert e, with W frozen in 4 bits.

    `FusedLoRAExperts` in all but the weight: one `NF4Weight` for the whole stack, whose experts are rounded to x's
    dtype one at a time (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). How it moves, is saved, loaded
    and distributed: `_quantised.Quantised`.

    Args:
        num_experts, in_features, out_features, r, lora_alpha, lora_dropout, bias, use_rslora: as for
            `FusedLoRAExperts`.
        blocksize: elements that share an absmax; one of 32, 64, ..., 4096.
        double_quant: keep the absmax values in 8 bits too.
        device: device of all tensors.
        dtype: dtype of b, and of W before it is quantised: float32, float16 or bfloat16; the default dtype when None.
        adapter_dtype: dtype of A and B; float32 when None.

    Attributes:
        weight: an `NF4Weight` [num_experts, out_features, in_features]; while merged without `requantize` a parameter.
            The others are those of `FusedLoRAExperts`.

    Raises:
        ValueError, TypeError: as for `FusedLoRAExperts`, and a blocksize or dtype that the format does not have.
    """

    weight: NF4Weight | nn.Parameter  # type: ignore[assignment]

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = False,
        use_rslora: bool = False,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        weight, vector = new_stack(num_experts, in_features, out_features, bias, device, dtype)
        q = nf4.quantize(weight, blocksize, double_quant)
        self._set_up(q, vector, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)

    @classmethod
    def from_experts(
        cls,
        weight: nn.Parameter | NF4Weight,
        bias: nn.Parameter | None = None,
        r: int = 8,
        *,
        is_transposed: bool = False,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> FusedQLoRAExperts:
        """Puts low-rank updates beside an existing stack in 4 bits, sharing and freezing its bias.

        Args:
            weight: [experts, out_features, in_features], or [experts, in_features, out_features] with `is_transposed`
                (transformers' name for that), which is quantised and stays as it is; or an `NF4Weight` of the first
                shape, which is shared.
            bias: [experts, out_features] or None.
            r and the others: as for the class; what is quantised already keeps its blocksize.

        Raises:
            TypeError: weight or bias is no parameter of a floating-point dtype.
            ValueError: weight has not three dimensions or is not finite, bias does not fit, `is_transposed` with an
                `NF4Weight`, or as for the class.
        """
        if not isinstance(weight, NF4Weight):
            check_parameter(cls.__name__, "weight", weight)
        check_stack(cls.__name__, weight)
        if isinstance(weight, NF4Weight):
            if is_transposed:
                raise ValueError(f"{cls.__name__}.from_experts: is_transposed is set, but weight is quantised already")
            q = weight
        else:
            dense = weight.detach()
            q = nf4.quantize(dense.mT if is_transposed else dense, blocksize, double_quant)
        return cls._beside(q, bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W without the updates, in full; None takes the dtype of what was quantised."""
        return self._unmerged("weight").dequantize(dtype)

    def _frozen_for(self, x: Tensor) -> tuple[Any, Any]:
        weight, bias = self.weight, self.bias
        if isinstance(weight, NF4Weight):
            return weight, bias
        return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)  # merged: takes x as 4 bits do

    def extra_repr(self) -> str:
        return super().extra_repr() + self._quantised_repr()
