"""`FusedLoRALinear`: a frozen linear layer with a trained low-rank update, in the place of `nn.Linear`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels import functional
from peft_kernels.checks import check_probability, check_rank
from peft_kernels.functional import lora_linear
from peft_kernels.nn._dora import WeightNorms
from peft_kernels.nn._layers import check_flags, is_conv1d, resolve_adapter_dtype, scaling_of
from peft_kernels.nn._merge import Mergeable, rounded
from peft_kernels.nn._weights import check_weight, frozen, row_norm, widened


class FusedLoRALinear(Mergeable):
    """y = x Wᵀ + b + scaling · (dropout(x) Aᵀ) Bᵀ with frozen W and b, computed by `functional.lora_linear`.

    A starts Kaiming-uniform and B at zero, as in Hugging Face PEFT, so that the layer first equals the frozen one.

    With `use_dora` the rows of the sum get trained lengths m: W' = m / ‖W + scaling · B A‖ · (W + scaling · B A), the
    norm counted as constant in backward (DoRA, Liu et al. 2024, https://arxiv.org/abs/2402.09353; computed by
    `functional.dora_linear`, which says what dropout means there). m starts at ‖W‖. ‖W‖² is kept while W is frozen and
    unchanged, in evaluation mode the norm of the sum too: whoever then changes parameters through `.data`, which leaves
    no trace, calls `.eval()` afterwards, so that it is computed anew.

    Args:
        in_features: K, the size of x's last dimension.
        out_features: N, the size of y's last dimension.
        r: rank of the update, 1 <= r <= 512.
        lora_alpha: scaling = lora_alpha / r (lora_alpha / sqrt(r) with `use_rslora`).
        lora_dropout: probability, in [0, 1], that an element of x is zeroed for the low-rank branch in training mode.
        bias: whether the frozen layer has a bias.
        use_rslora: rank-stabilised scaling (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732).
        use_dora: train the lengths of the rows as well.
        lora_bias: train a bias of the update, which starts at zero: scaling · lora_bias is added. Not with DoRA.
        train_bias: train b as well (PEFT's bias="lora_only").
        freeze_A: train B only (LoRA-FA, Zhang et al. 2023, https://arxiv.org/abs/2308.03303); x is then not kept for
            backward.
        device: device of all parameters.
        dtype: dtype of W and b; the default dtype when None.
        adapter_dtype: dtype of A, B, m and lora_bias. None means float32 where `dtype` has 16 bits (PEFT's default),
            else `dtype`.

    Attributes:
        weight: [out_features, in_features], frozen.
        bias: [out_features] or None, frozen unless `train_bias`.
        lora_A: [r, in_features], trained unless `freeze_A`.
        lora_B: [out_features, r], trained.
        lora_bias: [out_features], trained, or None.
        lora_magnitude_vector: m, [out_features], trained, or None without `use_dora`.
        scaling: the factor of the low-rank branch.
        merged: whether `weight` currently includes the update.
        fan_in_fan_out: whether the layer took over a `Conv1D`, whose own weight is [in_features, out_features].

    Raises:
        ValueError: r outside 1..512, a probability outside [0, 1], a non-finite alpha, a size below zero, `lora_bias`
            with `use_dora`, `train_bias` without bias.
        TypeError: an argument of the wrong type, or an integer dtype.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_bias: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
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
        use_dora: bool = False,
        lora_bias: bool = False,
        train_bias: bool = False,
        freeze_A: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._set_up(
            base.weight, base.bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, use_dora, lora_bias,
            train_bias, freeze_A,
        )  # fmt: skip

    def _set_up(
        self, weight, bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, use_dora, lora_bias, train_bias,
        freeze_A,
    ) -> None:  # fmt: skip
        kind = type(self).__name__
        check_weight(kind, weight)
        check_rank(kind, "r", r)
        check_probability(kind, "lora_dropout", lora_dropout)
        check_flags(
            kind, bias is not None, use_rslora=use_rslora, use_dora=use_dora, lora_bias=lora_bias,
            train_bias=train_bias, freeze_A=freeze_A,
        )  # fmt: skip
        self.out_features, self.in_features = weight.shape
        self.r, self.lora_dropout = r, float(lora_dropout)
        self._set_scaling(lora_alpha, use_rslora)
        options = {"device": weight.device, "dtype": resolve_adapter_dtype(kind, weight, adapter_dtype)}
        self._put("weight", frozen(weight))
        self.register_parameter("bias", None if bias is None else bias.requires_grad_(train_bias))
        self.train_bias, self.freeze_A = train_bias, freeze_A
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options), requires_grad=not freeze_A)
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **options))
        for name, wanted in (("lora_bias", lora_bias), ("lora_magnitude_vector", use_dora)):
            self.register_parameter(name, nn.Parameter(torch.empty(self.out_features, **options)) if wanted else None)
        self._norms = WeightNorms()  # empty without DoRA
        self._set_aside = {}
        self._merge_changed()
        self.reset_lora_parameters()

    def _set_scaling(self, lora_alpha: float, use_rslora: bool) -> None:
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self.scaling = scaling_of(type(self).__name__, lora_alpha, self.r, use_rslora)

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
    ) -> FusedLoRALinear:
        """Puts a low-rank update beside an existing layer, sharing and freezing its weight and bias.

        Args:
            linear: an `nn.Linear`, or a transformers `Conv1D`, whose [in, out] weight is shared as a transposed view.
            r and the others: as for the class.

        Returns:
            A layer in the same training mode as `linear`, whose `weight` has the same storage as `linear.weight`.

        Raises:
            TypeError: `linear` is neither (a subclass may compute something else, so it is refused too), or its weight
                is not floating-point.
            ValueError: as for the class.
        """
        weight = dense_weight_of(cls.__name__, linear)
        layer = cls._beside(
            linear, weight, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, use_dora, lora_bias, train_bias,
            freeze_A,
        )  # fmt: skip
        linear.weight.requires_grad_(False)
        return layer

    @classmethod
    def _beside(cls, linear: Any, weight: Any, *settings: Any) -> Any:
        """A layer with this weight, the bias of `linear`, and `settings` as `_set_up` takes them."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(weight, linear.bias, *settings)
        layer.fan_in_fan_out = is_conv1d(linear)
        return layer.train(linear.training)

    @property
    def use_dora(self) -> bool:
        return self.lora_magnitude_vector is not None

    @property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What a file of the adapter holds, by name: its parameters, and the bias of the layer if that is trained."""
        names = ("lora_A", "lora_B", "lora_bias", "lora_magnitude_vector", *(("bias",) if self.train_bias else ()))
        return {name: p for name in names if (p := self._unmerged(name)) is not None}

    def reset_lora_parameters(self) -> None:
        """A ~ Kaiming uniform with a = sqrt(5), B = 0, m = ‖W‖: the layer, unmerged, equals the frozen one again."""
        self.unmerge()
        if self.lora_A.is_meta:
            return
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)
        if self.lora_magnitude_vector is not None:
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(row_norm(self.weight))

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features].
            token_mask: boolean [...] or None: rows where it is False get no update (activated LoRA). A layer called
                with it cannot stand merged: the mask has nothing left to switch off.

        Returns:
            y: [..., out_features] in x's dtype.

        Raises:
            ValueError: an argument does not fit, or `token_mask` for a layer that is merged or has DoRA.
        """
        if not self._lean or token_mask is not None:
            return self._forward(x, token_mask)
        held: dict[str, Any] = self._parameters  # looked up here: nn.Module's attribute access costs 2 µs a parameter
        try:
            bias, lora_A, lora_B = held["bias"], held["lora_A"], held["lora_B"]
        except KeyError:  # parametrised or sharded: the attributes compute or hold the tensors
            bias, lora_A, lora_B = self.bias, self.lora_A, self.lora_B
        weight = held.get("weight")
        if weight is None:  # of 4 bits, or as above
            weight = self.weight
        return lora_linear(
            x, weight, lora_A, lora_B,
            scaling=self.scaling, bias=bias, dropout_p=self.lora_dropout, training=self.training,
        )  # fmt: skip

    def _forward(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """What is not plain LoRA; decided when the layer is made or merged, so that plain LoRA does not pay for it."""
        if token_mask is not None and (self.merged or self.use_dora):
            state = "merged, so that the update is part of the weight" if self.merged else "a layer with DoRA"
            raise ValueError(f"{type(self).__name__}: token_mask is given, but the layer is {state}; expected None")
        if self.merged:
            return self._merged_linear(x)
        options: dict[str, Any] = {
            "scaling": self.scaling, "bias": self.bias, "dropout_p": self.lora_dropout, "training": self.training,
        }  # fmt: skip
        weight, lora_A, lora_B, magnitude = self.weight, self.lora_A, self.lora_B, self.lora_magnitude_vector
        if magnitude is None:
            return lora_linear(x, weight, lora_A, lora_B, lora_bias=self.lora_bias, token_mask=token_mask, **options)
        norm = self._norms.of(weight, lora_A, lora_B, self.scaling, self.training)
        return functional.dora_linear(x, weight, lora_A, lora_B, magnitude, weight_norm=norm, **options)

    def _merged_linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _merge_changed(self) -> None:
        self._lean = not self.merged and not self.use_dora and self.lora_bias is None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + scaling · B A, with DoRA its rows scaled to the lengths m; summed in float32 (float64 for float64
        weights) and rounded once to W's dtype.

        Raises:
            ValueError: the sum is not finite.
        """
        return rounded(self._merged_sum(), self._unmerged("weight").dtype, type(self).__name__)

    def _merged_sum(self) -> Tensor:
        base = widened(self._unmerged("weight"))
        wide = base.dtype
        merged = torch.addmm(base, self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scaling)
        if self.lora_magnitude_vector is not None:
            merged *= (self.lora_magnitude_vector.to(wide) / row_norm(merged)).unsqueeze(1)
        return merged

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """b + scaling · lora_bias, rounded once to W's dtype; b itself without `lora_bias`; None without either.

        Raises:
            ValueError: the sum is not finite.
        """
        bias = self._unmerged("bias")
        if self.lora_bias is None:
            return bias
        dtype = self.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        shift = self.scaling * self.lora_bias.to(wide)
        return rounded(shift if bias is None else bias.to(wide) + shift, dtype, type(self).__name__, "bias")

    def _merged_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.merged_weight(), **self._merged_vectors()}

    def _merged_vectors(self) -> dict[str, Tensor]:
        bias = self.merged_bias() if self.lora_bias is not None else None
        return {} if bias is None else {"bias": bias}

    def to_linear(self) -> nn.Linear:
        """A new, plain `nn.Linear` with the merged weight and bias, not requiring gradients.

        Raises:
            ValueError: the merged weight or bias is not finite.
        """
        bias = self.merged_bias()
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None)
        linear.weight = nn.Parameter(self.merged_weight(), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(linear.weight.dtype, copy=True), requires_grad=False)
        return linear.train(self.training)

    def train(self, mode: bool = True) -> FusedLoRALinear:
        self._norms.clear_sum()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._norms.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        flags = {
            "lora_bias": self.lora_bias is not None, "use_dora": self.use_dora, "train_bias": self.train_bias,
            "freeze_A": self.freeze_A,
        }  # fmt: skip
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._unmerged('bias') is not None}, r={self.r}, scaling={self.scaling:g}, "
            f"lora_dropout={self.lora_dropout:g}"
            + "".join(f", {name}=True" for name, on in flags.items() if on)
            + (", merged" if self.merged else "")
        )


def is_linear(module: nn.Module) -> bool:
    """Whether `from_linear` takes the module. A subclass may compute something else, so it is none."""
    return type(module) is nn.Linear or is_conv1d(module)


def dense_weight_of(name: str, linear: Any) -> nn.Parameter:
    """The weight [out, in] of a layer that `from_linear` takes, shared.

    Raises:
        TypeError: it is none.
    """
    if not is_linear(linear):
        kind = type(linear)
        raise TypeError(
            f"{name}.from_linear: got {kind.__module__}.{kind.__qualname__}; "
            "expected exactly torch.nn.Linear or transformers' Conv1D"
        )
    return nn.Parameter(linear.weight.detach().t(), requires_grad=False) if is_conv1d(linear) else linear.weight


def plain_linear(kind: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> Any:
    """A layer of the kind that `dense_weight_of` took its weight from, an `nn.Linear` or a `Conv1D`, sharing both."""
    n, k = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(k, n, bias=bias is not None) if kind is nn.Linear else kind(n, k)
    linear.weight = weight if kind is nn.Linear else nn.Parameter(weight.detach().t(), requires_grad=False)
    linear.bias = bias
    return linear
