"""`FusedQLoRALinear`: a linear layer frozen in 4 bits with a trained low-rank update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional import nf4_linear
from peft_kernels.nn._quantised import QuantisedMergeable
from peft_kernels.nn.lora import FusedLoRALinear
from peft_kernels.nn.nf4 import weight_of


class FusedQLoRALinear(QuantisedMergeable, FusedLoRALinear):
    """y = x Wᵀ + b + scaling · (dropout(x) Aᵀ) Bᵀ with W frozen in 4 bits, computed by `functional.nf4_lora_linear`.

    `FusedLoRALinear` in all but the weight (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): W is
    rounded to x's dtype, whatever that is, and y has it. With `use_dora` ‖W‖ is that of W in the dtype that was
    quantised. How W moves, is saved, loaded and distributed: `_quantised.Quantised`.

    Args:
        in_features, out_features, r, lora_alpha, lora_dropout, bias, use_rslora, use_dora, lora_bias, train_bias,
            freeze_A: as for `FusedLoRALinear`.
        blocksize: elements that share an absmax; one of 32, 64, ..., 4096.
        double_quant: keep the absmax values in 8 bits too.
        device: device of all tensors.
        dtype: dtype of b, and of W before it is quantised: float32, float16 or bfloat16; the default dtype when None.
        adapter_dtype: dtype of A, B, m and lora_bias; float32 when None.

    Attributes:
        weight: an `NF4Weight` [out_features, in_features]; while merged without `requantize` a parameter. The others
            are those of `FusedLoRALinear`.

    Raises:
        ValueError, TypeError: as for `FusedLoRALinear`, and a blocksize or dtype that the format does not have.
    """

    weight: NF4Weight | nn.Parameter  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        train_bias: bool = False,
        freeze_A: bool = False,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_up(
            nf4.quantize(base.weight, blocksize, double_quant), base.bias, r, lora_alpha, lora_dropout, use_rslora,
            adapter_dtype, use_dora, lora_bias, train_bias, freeze_A,
        )  # fmt: skip

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        *,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        train_bias: bool = False,
        freeze_A: bool = False,
        adapter_dtype: torch.dtype | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> FusedQLoRALinear:
        """Puts a low-rank update beside an existing layer in 4 bits, sharing and freezing its bias.

        Args:
            linear: an `nn.Linear` or a transformers `Conv1D`, whose weight is quantised and stays as it is; or one that
                is quantised, an `NF4Linear` or bitsandbytes' `Linear4bit`, whose weight is shared.
            r and the others: as for the class; what is quantised already keeps its blocksize.

        Returns:
            A layer in the same training mode as `linear`.

        Raises:
            TypeError: `linear` is none of these (a subclass may compute something else).
            ValueError: its weight is not finite or of another 4-bit format, or as for the class.
        """
        weight = weight_of(cls.__name__, linear, blocksize, double_quant)
        return cls._beside(
            linear, weight, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, use_dora, lora_bias, train_bias,
            freeze_A,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W without the update, in full; None takes the dtype of what was quantised."""
        return self._unmerged("weight").dequantize(dtype)

    def _merged_linear(self, x: Tensor) -> Tensor:
        return merged_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._quantised_repr()


def merged_linear(x: Tensor, weight: NF4Weight | Tensor, bias: Tensor | None) -> Tensor:
    """A layer whose update has been merged into 4 bits again, or into a weight in the dtype that was quantised, which
    need not be that of x."""
    if isinstance(weight, NF4Weight):
        return nf4_linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
