"""`NF4Linear`: a frozen linear layer whose weight stays in 4 bits, in the place of `nn.Linear` or `Linear4bit`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats import nf4
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional import nf4_linear
from peft_kernels.nn._layers import is_conv1d
from peft_kernels.nn._quantised import Quantised
from peft_kernels.nn.lora import is_linear

_FOUR_BIT = frozenset(("Linear4bit", "LinearNF4"))


class NF4Linear(Quantised):
    """y = x Wᵀ + b with W in the 4 bits of QLoRA, computed by `functional.nf4_linear`.

    W is rounded to x's dtype, and y has it: there is no `compute_dtype`. (bitsandbytes' `Linear4bit` casts x to one,
    float32 unless told otherwise, and casts y back; its backward takes W in the dtype that was quantised.) Under
    autocast x is cast as for `F.linear`.

    How W moves, is saved, loaded and distributed: `_quantised.Quantised`. The state dict is bitsandbytes', both ways.

    Args:
        in_features: K, the size of x's last dimension.
        out_features: N, the size of y's last dimension.
        bias: whether there is a bias. It is a parameter that trains, as in `nn.Linear`.
        blocksize: elements that share an absmax; one of 32, 64, ..., 4096.
        double_quant: keep the absmax values in 8 bits too.
        device: device of all tensors.
        dtype: dtype of b, and of W before it is quantised: float32, float16 or bfloat16; the default dtype when None.

    Attributes:
        weight: an `NF4Weight` [out_features, in_features]; neither parameter nor buffer, and never written to.
        bias: [out_features] or None.

    Raises:
        ValueError: a blocksize that the format does not have.
        TypeError: a dtype that it does not have.
    """

    weight: NF4Weight
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_up(nf4.quantize(base.weight, blocksize, double_quant), base.bias)

    def _set_up(self, weight: NF4Weight, bias: nn.Parameter | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: Any, *, blocksize: int = 64, double_quant: bool = True) -> NF4Linear:
        """Quantises the weight of an existing layer, which stays as it is, and shares its bias.

        Args:
            linear: an `nn.Linear` or a transformers `Conv1D`; or one that is quantised, an `NF4Linear` or bitsandbytes'
                `Linear4bit`, whose weight is shared as it is.
            blocksize, double_quant: as for the class; what is quantised already keeps its own.

        Returns:
            A layer in the same training mode as `linear`.

        Raises:
            TypeError: `linear` is none of these (a subclass may compute something else), or its weight has another
                dtype than float32, float16 or bfloat16.
            ValueError: the weight is not finite, of another 4-bit format, or as for the class.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(weight_of(cls.__name__, linear, blocksize, double_quant), linear.bias)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features].

        Returns:
            y: [..., out_features] in x's dtype.

        Raises:
            ValueError, TypeError: as `functional.nf4_linear`.
        """
        return nf4_linear(x, self.weight, self.bias)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in full; None takes the dtype of what was quantised."""
        return self.weight.dequantize(dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A new, plain `nn.Linear` with the weight in full and a copy of the bias, not requiring gradients.

        Args:
            dtype: of both; None takes the dtype of what was quantised.
        """
        weight = self.dequantize(dtype)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(weight.dtype, copy=True), requires_grad=False)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            + self._quantised_repr()
        )


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is in 4 bits already: ours or bitsandbytes'."""
    return type(module) is NF4Linear or _is_bitsandbytes(module)


def _is_bitsandbytes(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ in _FOUR_BIT and kind.__module__.startswith("bitsandbytes.")


def weight_of(name: str, linear: Any, blocksize: int, double_quant: bool) -> NF4Weight:
    """The weight of a layer in 4 bits: its own where it has one, else quantised.

    Raises:
        TypeError: `linear` is no layer that `from_linear` takes.
        ValueError, TypeError: as `functional.nf4_quantize` and `formats.nf4.from_bitsandbytes`.
    """
    if type(linear) is NF4Linear:
        return linear.weight
    if _is_bitsandbytes(linear):
        return nf4.from_bitsandbytes(linear.weight)
    if not is_linear(linear):
        kind = type(linear)
        raise TypeError(
            f"{name}.from_linear: got {kind.__module__}.{kind.__qualname__}; expected exactly torch.nn.Linear, "
            "transformers' Conv1D, NF4Linear or bitsandbytes' Linear4bit"
        )
    weight = linear.weight.detach()
    return nf4.quantize(weight.t() if is_conv1d(linear) else weight, blocksize, double_quant)
