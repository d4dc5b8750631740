"""`MaskedLoRALinear`: a low-rank update of a frozen pruned layer, whose zeros survive training and merging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats import nf4
from peft_kernels.formats.mask import PackedMask, full
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional import mask_apply, mask_apply_, masked_lora_linear
from peft_kernels.nn._layers import check_flags, is_conv1d
from peft_kernels.nn._masked_state import Masked, is_masked, mask_of
from peft_kernels.nn._merge import Mergeable, MergeError
from peft_kernels.nn._quantised import QuantisedMergeable
from peft_kernels.nn.lora import FusedLoRALinear, dense_weight_of, is_linear
from peft_kernels.nn.masked import MaskedLinear
from peft_kernels.nn.nf4 import is_quantised_linear, weight_of
from peft_kernels.nn.qlora import merged_linear


class MaskedLoRALinear(QuantisedMergeable, FusedLoRALinear, Masked):
    """LoRA over a frozen pruned weight, dense or in 4 bits, computed by `functional.masked_lora_linear`:

    y = x ((W + scaling · B A) ⊙ M)ᵀ + b                          with `update_masked`
    y = x (W ⊙ M)ᵀ + b + scaling · (dropout(x) Aᵀ) Bᵀ             without

    With `update_masked` the update stays inside the mask, and `merge` folds it into W with every zero kept, bit for bit
    (dropout acts on the update's x). Without it the update is dense beside the mask: training costs what
    `FusedLoRALinear`'s does, and merging would fill the zeros, so that it is refused unless only the part inside the
    mask is asked for.

    A dense W is 0 outside the mask from the start and after loading, so that its product is a plain matmul; whoever
    writes to it otherwise has to leave it so. Zeros of an `NF4Weight` are its code 7, exactly 0, and stay that when
    merged into 4 bits again. Adapter files (`save_adapter`) hold A and B as for any LoRA layer, and no mask: in Hugging
    Face PEFT, over the pruned weights, they mean the layer without `update_masked`.

    Args:
        in_features, out_features, r, lora_alpha, lora_dropout, bias, use_rslora, train_bias, freeze_A: as for
            `FusedLoRALinear`.
        mask: [out_features, in_features], a `PackedMask` or a tensor whose non-zero elements are kept; None keeps all.
        update_masked: whether the update stays inside the mask.
        device, dtype, adapter_dtype: as for `FusedLoRALinear`.

    Attributes:
        weight: [out_features, in_features], frozen: a parameter, or an `NF4Weight`.
        mask: the `PackedMask`.
        sparsity: the part of the weights that it leaves out.
        The others are those of `FusedLoRALinear`.

    Raises:
        ValueError, TypeError: as for `FusedLoRALinear`, and for a mask that does not fit the weight.
    """

    weight: Any  # nn.Parameter | NF4Weight
    _clean = True  # whether W is 0 outside the mask

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        *,
        mask: PackedMask | Tensor | None = None,
        update_masked: bool = True,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        train_bias: bool = False,
        freeze_A: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if mask is None:
            mask = full(out_features, in_features, device=base.weight.device)
        mask = mask_of(type(self).__name__, mask, base.weight)
        self._over(mask, update_masked)
        self._set_up(
            masked_weight(base.weight, mask), base.bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, False,
            False, train_bias, freeze_A,
        )  # fmt: skip

    def _over(self, mask: PackedMask, update_masked: bool) -> None:
        check_flags(type(self).__name__, True, update_masked=update_masked)
        self.update_masked = update_masked
        self._put_mask(mask)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls,
        linear: Any,
        r: int = 8,
        *,
        mask: PackedMask | Tensor | None = None,
        update_masked: bool = True,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        train_bias: bool = False,
        freeze_A: bool = False,
        adapter_dtype: torch.dtype | None = None,
        base_quantization: str | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
    ) -> MaskedLoRALinear:
        """Puts a low-rank update into or beside an existing layer, sharing and freezing its weight and bias.

        Args:
            linear: an `nn.Linear`, a transformers `Conv1D`, a `MaskedLinear`, or a layer in 4 bits (`NF4Linear`,
                bitsandbytes' `Linear4bit`).
            r: rank of the update.
            mask: as for the class; None takes that of a `MaskedLinear`, and of other layers what is not 0.
            base_quantization: "nf4" quantises W ⊙ M; None leaves the weight as it is.
            blocksize, double_quant: of `base_quantization`, as for `FusedQLoRALinear`.
            update_masked and the others: as for the class.

        Returns:
            A layer in the same training mode as `linear`. A dense weight that is not 0 outside the mask is copied, not
            changed.

        Raises:
            TypeError: `linear` is none of these (a subclass may compute something else).
            ValueError: as for the class, or an unknown `base_quantization`.
        """
        name = cls.__name__
        if base_quantization not in (None, "nf4"):
            raise ValueError(f"{name}: base_quantization is {base_quantization!r}; expected 'nf4' or None")
        weight = _weight_of(name, linear)
        if mask is None and type(linear) is MaskedLinear:
            mask = linear.mask
        mask = mask_of(name, mask, weight)
        weight = masked_weight(weight, mask)
        if base_quantization is not None and not isinstance(weight, NF4Weight):
            weight = nf4.quantize(weight.detach(), blocksize, double_quant)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._over(mask, update_masked)
        layer._clean = is_masked(weight, mask)
        layer._set_up(
            weight, linear.bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, False, False, train_bias,
            freeze_A,
        )  # fmt: skip
        layer.fan_in_fan_out = is_conv1d(linear)
        for parameter in linear.parameters():
            if parameter is not linear.bias:
                parameter.requires_grad_(False)
        layer.train(linear.training)
        return layer

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features].
            token_mask: not supported: None.

        Returns:
            y: [..., out_features] in x's dtype.

        Raises:
            ValueError, TypeError: an argument does not fit.
        """
        if token_mask is not None:
            raise ValueError(f"{type(self).__name__}: token_mask is given, which is not supported; expected None")
        if self.merged:
            return self._merged_linear(x)
        return masked_lora_linear(
            x, self.weight, self.mask, self.lora_A, self.lora_B,
            scaling=self.scaling, bias=self.bias, dropout_p=self.lora_dropout, training=self.training,
            update_masked=self.update_masked, weight_is_masked=self._clean,
        )  # fmt: skip

    def _merged_linear(self, x: Tensor) -> Tensor:
        if isinstance(self._unmerged("weight"), NF4Weight):
            return merged_linear(x, self.weight, self.bias)
        return super()._merged_linear(x)

    @torch.no_grad()
    def set_mask(self, mask: PackedMask | Tensor) -> None:
        """Takes another mask. A dense weight that is not 0 outside of it is replaced by a copy that is; what an earlier
        mask left out stays 0.

        Raises:
            ValueError: the layer is merged, or the mask does not fit.
            TypeError: no mask.
        """
        kind = type(self).__name__
        if self.merged:
            raise ValueError(f"{kind}.set_mask: the layer is merged; unmerge it first")
        mask = mask_of(kind, mask, self.weight)
        self._put_masked(self.weight, mask)
        self._put_mask(mask)

    def _put_masked(self, weight: nn.Parameter | NF4Weight, mask: PackedMask) -> None:
        weight = masked_weight(weight, mask)
        self._put("weight", weight)
        self._clean = is_masked(weight, mask)

    def _mask_loaded(self) -> None:
        self._put_masked(self.weight, self.mask)

    def merge(self, requantize: bool = False, *, masked: bool = False) -> MergeError | None:
        """Folds the update, inside the mask, into `weight`: (W + scaling · B A) ⊙ M, every zero kept bit for bit. The
        original is kept aside untouched: `unmerge` restores it.

        Args:
            requantize: of a weight in 4 bits, as for `FusedQLoRALinear`: False replaces it by the dense sum, True by
                the sum in 4 bits again, in which zeros are exactly 0 too.
            masked: without `update_masked` the update reaches outside the mask, and merging all of it would fill the
                zeros. True merges the part inside the mask only; the layer then computes something else than before.

        Returns:
            The error that the 4 bits introduce, or None without `requantize`.

        Raises:
            ValueError: a layer without `update_masked` and not `masked`, `requantize` of a dense weight, or a merged
                value would not be finite; the module is unchanged.
            TypeError: a flag is no boolean.
        """
        kind = type(self).__name__
        check_flags(kind, True, requantize=requantize, masked=masked)
        self._check_merge("merge", masked)
        options = {"requantize": requantize, "masked": masked}
        if not isinstance(self._unmerged("weight"), NF4Weight):
            if requantize:
                raise ValueError(f"{kind}.merge: requantize is set, but the weight is dense; expected False")
            Mergeable.merge(self)
            error = None
        elif self.merged and self._merge_options == options:
            error = self._merge_error
        else:
            error = super().merge(requantize)
        self._merge_options = options
        return error

    def _check_merge(self, name: str, masked: bool) -> None:
        if not self.update_masked and not masked:
            raise ValueError(
                f"{type(self).__name__}.{name}: the update lies beside the mask (update_masked=False) and would fill "
                "its zeros; masked=True merges the part inside the mask only, which changes what the layer computes"
            )

    def _merged_sum(self) -> Tensor:
        return mask_apply_(super()._merged_sum(), self.mask)

    def to_linear(self, *, masked: bool = False) -> nn.Linear:
        """A new, plain `nn.Linear` with the merged weight, every zero kept, not requiring gradients.

        Args:
            masked: as for `merge`.

        Raises:
            ValueError: a layer without `update_masked` and not `masked`, or the sum is not finite.
        """
        self._check_merge("to_linear", masked)
        return super().to_linear()

    def extra_repr(self) -> str:
        flag = ", update_masked=True" if self.update_masked else ""
        return f"{super().extra_repr()}{flag}, sparsity={self.sparsity:.4g}{self._quantised_repr()}"


@torch.no_grad()
def masked_weight(weight: Any, mask: PackedMask) -> Any:
    """The weight itself where it is 0 outside the mask or of 4 bits or sharded, which cannot be changed here; else a
    frozen copy that is."""
    if isinstance(weight, NF4Weight) or hasattr(weight, "full_tensor") or is_masked(weight, mask):
        return weight
    return nn.Parameter(mask_apply(weight, mask), requires_grad=False)


def _weight_of(name: str, linear: Any) -> nn.Parameter | NF4Weight:
    """The weight [out_features, in_features] of a layer that `from_linear` takes, shared.

    Raises:
        TypeError: it is none.
    """
    if type(linear) is MaskedLinear:
        if isinstance(linear.weight, (NF4Weight, nn.Parameter)):
            return linear.weight
        linear.enforce_()  # the compact layout's weight is a tensor beside its values
        return nn.Parameter(linear.weight, requires_grad=False)
    if is_quantised_linear(linear):
        return weight_of(name, linear, 64, True)
    if not is_linear(linear):
        kind = type(linear)
        raise TypeError(
            f"{name}.from_linear: got {kind.__module__}.{kind.__qualname__}; expected exactly torch.nn.Linear, "
            "transformers' Conv1D, MaskedLinear, NF4Linear or bitsandbytes' Linear4bit"
        )
    return dense_weight_of(name, linear)
