"""`FusedLoRALinear`: a frozen linear layer with a trained low-rank update, in the place of `nn.Linear`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.checks import FLOATS, check_finite, check_floating, check_probability, check_rank
from peft_kernels.functional import lora_linear

_NAME = "FusedLoRALinear"


class FusedLoRALinear(nn.Module):
    """y = x Wᵀ + b + scaling · (dropout(x) Aᵀ) Bᵀ with frozen W and b, computed by `functional.lora_linear`.

    A starts Kaiming-uniform and B at zero, as in Hugging Face PEFT, so that the layer first equals the frozen one.

    Args:
        in_features: K, the size of x's last dimension.
        out_features: N, the size of y's last dimension.
        r: rank of the update, 1 <= r <= 512.
        lora_alpha: scaling = lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`).
        lora_dropout: probability, in [0, 1], that an element of x is zeroed for the low-rank branch in training mode.
        bias: whether the frozen layer has a bias.
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        device: device of all parameters.
        dtype: dtype of W and b; the default dtype when None.
        adapter_dtype: dtype of A and B. None means float32 where `dtype` has 16 bits (PEFT's default), else `dtype`.

    Attributes:
        weight: [out_features, in_features], frozen.
        bias: [out_features] or None, frozen.
        lora_A: [r, in_features], trained.
        lora_B: [out_features, r], trained.
        scaling: the factor of the low-rank branch.
        merged: whether `weight` currently includes the update.
        fan_in_fan_out: whether the layer took over a `Conv1D`, whose own weight is [in_features, out_features].

    Raises:
        ValueError: r outside 1..512, a probability outside [0, 1], a non-finite alpha, a size below zero.
        TypeError: a number of the wrong type, or an integer dtype.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    fan_in_fan_out = False

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_up(base.weight, base.bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)

    def _set_up(self, weight, bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype) -> None:
        check_floating(_NAME, "weight", weight)
        check_rank(_NAME, "r", r)
        check_probability(_NAME, "lora_dropout", lora_dropout)
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(weight.dtype, torch.float32)
        if adapter_dtype not in FLOATS:
            raise TypeError(f"{_NAME}: adapter_dtype is {adapter_dtype}; expected a floating-point dtype")
        self.out_features, self.in_features = weight.shape
        self.r, self.lora_dropout = r, float(lora_dropout)
        self._set_scaling(lora_alpha, use_rslora)
        self.weight = weight.requires_grad_(False)
        self.register_parameter("bias", None if bias is None else bias.requires_grad_(False))
        options = {"device": weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **options))
        self._unmerged_weight: nn.Parameter | None = None
        self.reset_lora_parameters()

    def _set_scaling(self, lora_alpha: float, use_rslora: bool) -> None:
        check_finite(_NAME, "lora_alpha", lora_alpha)
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(self.r) if use_rslora else self.r)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        *,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> FusedLoRALinear:
        """Puts a low-rank update beside an existing layer, sharing and freezing its weight and bias.

        Args:
            linear: an `nn.Linear`, or a transformers `Conv1D`, whose [in, out] weight is shared as a transposed view.
            r, lora_alpha, lora_dropout, use_rslora, adapter_dtype: as for the class.

        Returns:
            A layer in the same training mode as `linear`, whose `weight` has the same storage as `linear.weight`.

        Raises:
            TypeError: `linear` is neither (a subclass may compute something else, so it is refused too), or its weight
                is not floating-point.
            ValueError: as for the class.
        """
        weight = _weight_of(linear)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(weight, linear.bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)
        linear.weight.requires_grad_(False)
        layer.fan_in_fan_out = weight is not linear.weight
        return layer.train(linear.training)

    def reset_lora_parameters(self) -> None:
        """A ~ Kaiming uniform with a = sqrt(5), B = 0: the layer, unmerged, equals the frozen one again."""
        self.unmerge()
        if self.lora_A.is_meta:
            return
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self._unmerged_weight is not None:
            return F.linear(x, self.weight, self.bias)
        held: dict[str, Any] = self._parameters  # looked up here: nn.Module's attribute access costs 2 µs a parameter
        try:
            weight, bias, lora_A, lora_B = held["weight"], held["bias"], held["lora_A"], held["lora_B"]
        except KeyError:  # parametrised or sharded: the attributes compute or hold the tensors
            weight, bias, lora_A, lora_B = self.weight, self.bias, self.lora_A, self.lora_B
        return lora_linear(
            x, weight, lora_A, lora_B,
            scaling=self.scaling, bias=bias, dropout_p=self.lora_dropout, training=self.training,
        )  # fmt: skip

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scaling · B A, summed in float32 (float64 for float64 weights) and rounded once to W's dtype.

        Raises:
            ValueError: the sum is not finite.
        """
        base = self.weight if self._unmerged_weight is None else self._unmerged_weight
        wide = torch.promote_types(base.dtype, torch.float32)
        merged = torch.addmm(base.to(wide), self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scaling)
        merged = merged.to(base.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"{_NAME}: the merged weight is not finite; nothing was changed")
        return merged

    def merge(self) -> None:
        """Folds the update into `weight`, so that forward is one matmul. Merging twice is harmless.

        The original weight is kept aside untouched, so that tied or shared weights do not change and `unmerge`
        restores it bit for bit. For a layer without that second copy take `to_linear`.

        Raises:
            ValueError: the merged weight would not be finite; the layer is unchanged.
        """
        if self._unmerged_weight is None:
            merged = nn.Parameter(self.merged_weight(), requires_grad=False)
            self.__dict__["_unmerged_weight"] = self.weight
            self.weight = merged

    def unmerge(self) -> None:
        """Puts back the weight that `merge` set aside. Does nothing on a layer that is not merged."""
        if self._unmerged_weight is not None:
            self.weight = self._unmerged_weight
            self.__dict__["_unmerged_weight"] = None

    def to_linear(self) -> nn.Linear:
        """A new, plain `nn.Linear` with the merged weight and a copy of the bias, not requiring gradients.

        Raises:
            ValueError: the merged weight is not finite.
        """
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def _apply(self, fn, recurse=True):
        # The weight set aside by `merge` is no registered parameter, but follows .to(), .half() and the like as one.
        if self._unmerged_weight is None:
            return super()._apply(fn, recurse)
        self._parameters["_unmerged_weight"] = self.__dict__.pop("_unmerged_weight")
        try:
            return super()._apply(fn, recurse)
        finally:
            self.__dict__["_unmerged_weight"] = self._parameters.pop("_unmerged_weight")

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        # A checkpoint holds W itself: one with the merged weight would apply the update twice when loaded.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged_weight is not None:
            weight = self._unmerged_weight
            destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        # What is loaded is W, A and B; a merged layer is merged again from them.
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"
            + (", merged" if self.merged else "")
        )


def is_linear(module: nn.Module) -> bool:
    """Whether `from_linear` takes the module. A subclass may compute something else, so it is none."""
    return type(module) is nn.Linear or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _weight_of(linear: Any) -> nn.Parameter:
    if not is_linear(linear):
        kind = type(linear)
        raise TypeError(
            f"{_NAME}.from_linear: got {kind.__module__}.{kind.__qualname__}; "
            "expected exactly torch.nn.Linear or transformers' Conv1D"
        )
    return nn.Parameter(linear.weight.detach().t(), requires_grad=False) if _is_conv1d(linear) else linear.weight
