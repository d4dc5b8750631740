"""`FusedLoRAExperts`: the frozen weight stack of a mixture of experts, with a trained low-rank update for each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.checks import check_probability, check_rank, check_shape, shape_text
from peft_kernels.functional.lora_expert_linear import lora_expert_linear
from peft_kernels.nn._layers import check_flags, resolve_adapter_dtype, scaling_of
from peft_kernels.nn._merge import Mergeable, rounded
from peft_kernels.nn._weights import check_weight, frozen, widened


class FusedLoRAExperts(Mergeable):
    """y[m] = x[m] W_eᵀ + b_e + scaling · (dropout(x)[m] A_eᵀ) B_eᵀ for the rows m of expert e, with frozen W and b.

    Computed by `functional.lora_expert_linear`; nothing of the stack's size is formed. A starts Kaiming-uniform and B
    at zero, so that the stack first equals the frozen one.

    Args:
        num_experts: E.
        in_features: K.
        out_features: N.
        r: rank of each update, 1 <= r <= 512.
        lora_alpha: scaling = lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`).
        lora_dropout: probability, in [0, 1], that an element of x is zeroed for the low-rank branch in training mode.
        bias: whether the frozen experts have biases.
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        device: device of all parameters.
        dtype: dtype of W and b; the default dtype when None.
        adapter_dtype: dtype of A and B. None means float32 where `dtype` has 16 bits, else `dtype`.

    Attributes:
        weight: [num_experts, out_features, in_features], frozen.
        bias: [num_experts, out_features] or None, frozen.
        lora_A: [num_experts, r, in_features], trained.
        lora_B: [num_experts, out_features, r], trained. (PEFT's layout of both: `formats.peft_experts`.)
        scaling: the factor of the low-rank branch.
        merged: whether `weight` currently includes the update.

    Raises:
        ValueError: r outside 1..512, a probability outside [0, 1], a non-finite alpha.
        TypeError: a number of the wrong type, or an integer dtype.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        weight, vector = new_stack(num_experts, in_features, out_features, bias, device, dtype)
        self._set_up(weight, vector, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)

    def _set_up(self, weight, bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype) -> None:
        kind = type(self).__name__
        check_weight(kind, weight)
        check_rank(kind, "r", r)
        check_probability(kind, "lora_dropout", lora_dropout)
        check_flags(kind, bias is not None, use_rslora=use_rslora)
        options: dict[str, Any] = {
            "device": weight.device,
            "dtype": resolve_adapter_dtype(kind, weight, adapter_dtype),
        }
        self.num_experts, self.out_features, self.in_features = weight.shape
        self.r, self.lora_dropout = r, float(lora_dropout)
        self.scaling = scaling_of(kind, lora_alpha, r, use_rslora)
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self._put("weight", frozen(weight))
        self.register_parameter("bias", None if bias is None else bias.requires_grad_(False))
        self.lora_A = nn.Parameter(torch.empty(self.num_experts, r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.num_experts, self.out_features, r, **options))
        self._set_aside = {}
        self.reset_lora_parameters()

    @classmethod
    def from_experts(
        cls,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        r: int = 8,
        *,
        is_transposed: bool = False,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> FusedLoRAExperts:
        """Puts low-rank updates beside an existing stack, sharing and freezing its weight and bias.

        Args:
            weight: [experts, out_features, in_features], or [experts, in_features, out_features] with `is_transposed`
                (transformers' name for that), which is shared as a transposed view.
            bias: [experts, out_features] or None.
            r and the others: as for the class.

        Returns:
            A module whose `weight` has the same storage as `weight`.

        Raises:
            TypeError: weight or bias is no parameter of a floating-point dtype.
            ValueError: weight has not three dimensions, bias does not fit, or as for the class.
        """
        check_parameter(cls.__name__, "weight", weight)
        check_stack(cls.__name__, weight)
        shared = nn.Parameter(weight.detach().mT, requires_grad=False) if is_transposed else weight
        stack = cls._beside(shared, bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)
        weight.requires_grad_(False)
        return stack

    @classmethod
    def _beside(cls, weight: Any, bias: nn.Parameter | None, *settings: Any) -> Any:
        """A stack with this weight and bias, and `settings` as `_set_up` takes them."""
        if bias is not None:
            check_parameter(cls.__name__, "bias", bias)
            e, n, _ = weight.shape
            check_shape(cls.__name__, "bias", bias, (e, n), f"weight has {e} experts and {n} output features")
        stack = cls.__new__(cls)
        nn.Module.__init__(stack)
        stack._set_up(weight, bias, *settings)
        return stack

    @property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def reset_lora_parameters(self) -> None:
        """A ~ Kaiming uniform with a = sqrt(5) for each expert, B = 0: the stack, unmerged, is the frozen one again."""
        self.unmerge()
        if self.lora_A.is_meta:
            return
        for matrix in self.lora_A.detach():
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """The output of each row's expert.

        Args:
            x: [M, in_features], sorted by expert.
            offsets: int32 [num_experts], ascending: the row after the last one of each expert.

        Returns:
            y: [M, out_features] in x's dtype; 0 for rows from the last offset on.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        scaling, dropout_p = self.scaling, self.lora_dropout
        if self.merged:  # the op has no form without an update; one times 0 costs about r / N of the layer
            lora_A, lora_B, scaling, dropout_p = lora_A.detach(), lora_B.detach(), 0.0, 0.0
        weight, bias = self._frozen_for(x)
        return lora_expert_linear(
            x, weight, lora_A, lora_B, offsets,
            scaling=scaling, bias=bias, dropout_p=dropout_p, training=self.training,
        )  # fmt: skip

    def _frozen_for(self, x: Tensor) -> tuple[Any, Any]:
        """The weight and bias that x is multiplied with."""
        return self.weight, self.bias

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W_e + scaling · B_e A_e, summed in float32 (float64 for float64 weights) and rounded once to W's dtype.

        Raises:
            ValueError: a sum is not finite.
        """
        return rounded(self._merged_sum(), self._unmerged("weight").dtype, type(self).__name__)

    def _merged_sum(self) -> Tensor:
        base = widened(self._unmerged("weight"))
        return torch.baddbmm(base, self.lora_B.to(base.dtype), self.lora_A.to(base.dtype), alpha=self.scaling)

    def _merged_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.merged_weight()}

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"
            + (", merged" if self.merged else "")
        )


def new_stack(
    num_experts: int, in_features: int, out_features: int, bias: bool, device: Any, dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight [num_experts, out_features, in_features] and bias, each expert's as `nn.Linear` starts them."""
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **options))
    vector = nn.Parameter(torch.empty(num_experts, out_features, **options)) if bias else None
    bound = 1 / math.sqrt(in_features) if in_features > 0 else 0.0
    for parameter in (weight, vector):
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)
    return weight, vector


def check_stack(module: str, weight: Any) -> None:
    if len(weight.shape) != 3:
        shape = shape_text(weight.shape)
        raise ValueError(f"{module}.from_experts: weight has shape {shape}; expected (experts, out, in)")


def check_parameter(module: str, name: str, value: Any) -> None:
    if not isinstance(value, nn.Parameter):
        raise TypeError(f"{module}.from_experts: {name} is {type(value).__name__}; expected an nn.Parameter")
