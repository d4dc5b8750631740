"""`MovementLinear`: a linear layer whose mask is trained, through scores with straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.checks import check_floating, check_number, check_probability
from peft_kernels.formats.mask import PackedMask
from peft_kernels.functional import mask_pack
from peft_kernels.kernels._masked import strips
from peft_kernels.kernels.composed._passes import sum_over_rows
from peft_kernels.nn._layers import is_conv1d
from peft_kernels.nn.lora import is_linear
from peft_kernels.ops._backward import first_gradients
from peft_kernels.ops._rows import rows
from peft_kernels.ops.lora_linear import autocast_together
from peft_kernels.pruning.thresholds import keep_largest


def _zeros(weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(weight.shape, dtype=wide, device=weight.device)


@torch.no_grad()
def _magnitude(weight: Tensor) -> Tensor:
    """|W| over the power of two that is not below rms(W), over 1 where that is 0 or not finite."""
    scores = _zeros(weight).copy_(weight).abs_()
    rms = torch.linalg.vector_norm(scores) / max(1, scores.numel()) ** 0.5
    divisor = rms / rms.frexp().mantissa
    return scores.div_(torch.where((rms > 0) & rms.isfinite(), divisor, 1.0))


_STARTS = {"zeros": _zeros, "magnitude": _magnitude}


class MovementLinear(nn.Module):
    """y = x (W ⊙ M)ᵀ + b, where M keeps the weights of largest scores S (Sanh, Wolf & Rush 2020, "Movement Pruning",
    https://arxiv.org/abs/2005.07683). W, b and S train together:

    dW = (dYᵀ x) ⊙ M,  dS = (dYᵀ x) ⊙ W

    dS is straight-through: of all weights, as if M were S. So a score grows while its weight moves away from 0, and a
    pruned weight comes back when its score does. dYᵀ x is computed once for both, strip by strip: beside the two
    gradients themselves nothing of the size of W is made (PyTorch's composition makes W ⊙ M, M in W's dtype and
    dYᵀ x).

    M is computed by radix selection (`keep_largest`), without a sort or a wait for the device, again when S has changed
    by what PyTorch counts, `sparsity` has, or `.train()` or `.eval()` was called; under `torch.compile` at each
    forward. It depends on S only: ranks with the same scores, as under DistributedDataParallel, have the same mask.

    Args:
        weight: [out_features, in_features], a parameter, trained.
        bias: [out_features] or None, trained.
        sparsity: share of the weights to prune, which a schedule raises while training; total - round(sparsity · total)
            are kept.
        threshold: the soft variant: what has a score above it is kept, whatever `sparsity` says, and `penalty` in the
            loss presses scores down. None keeps the largest scores.
        scores: where S begins. "zeros", as in the paper: while `sparsity` is 0 all weights are kept and scores find
            their order, which takes a long training: after a few dozen steps it is hardly better than chance.
            "magnitude": at |W| / rms(W), so that the first mask is that of magnitude pruning, and movement corrects it
            from there: a score of 1 is that of a weight of common size, in every layer. (The divisor is rounded up to
            a power of two: no two weights get one score by rounding.)

    Attributes:
        scores: S, [out_features, in_features], a parameter in float32 (float64 for float64).

    Raises:
        ValueError: a sparsity outside [0, 1], or unknown `scores`.
        TypeError: no floating-point weight.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        sparsity: float = 0.0,
        threshold: float | None = None,
        scores: str = "zeros",
    ) -> None:
        super().__init__()
        check_floating("MovementLinear", "weight", weight)
        check_probability("MovementLinear", "sparsity", sparsity)
        if threshold is not None:
            check_number("MovementLinear", "threshold", threshold)
        if scores not in _STARTS:
            raise ValueError(f"MovementLinear: scores is {scores!r}; expected one of {', '.join(_STARTS)}")
        self.out_features, self.in_features = weight.shape
        self.weight, self.sparsity, self.threshold = weight, float(sparsity), threshold
        self.register_parameter("bias", bias)
        self.scores = nn.Parameter(_STARTS[scores](weight))
        self._mask: PackedMask | None = None
        self._seen: tuple | None = None

    @classmethod
    def from_linear(
        cls, linear: Any, *, sparsity: float = 0.0, threshold: float | None = None, scores: str = "zeros"
    ) -> MovementLinear:
        """The layer in the place of an `nn.Linear`, whose parameters it shares (of a transformers `Conv1D` it has a
        transposed copy).

        Raises:
            TypeError: `linear` is none of these (a subclass may compute something else).
            ValueError: as for the class.
        """
        if not is_linear(linear):
            kind = type(linear)
            raise TypeError(
                f"{cls.__name__}.from_linear: got {kind.__module__}.{kind.__qualname__}; expected exactly "
                "torch.nn.Linear or transformers' Conv1D"
            )
        weight = nn.Parameter(linear.weight.detach().t().contiguous()) if is_conv1d(linear) else linear.weight
        made = cls(weight, linear.bias, sparsity=sparsity, threshold=threshold, scores=scores)
        return made.train(linear.training)

    @property
    def mask(self) -> PackedMask:
        """The weights that are kept now."""
        if torch.compiler.is_compiling():  # a graph has no versions to compare
            return self._new_mask()
        seen = (id(self.scores), self.scores._version, self.scores.device, self.sparsity, self.threshold)
        if self._mask is None or seen != self._seen:
            self._mask, self._seen = self._new_mask(), seen
        return self._mask

    @torch.no_grad()
    def _new_mask(self) -> PackedMask:
        if self.threshold is not None:
            return mask_pack(self.scores, self.scores.new_full((), self.threshold))
        total = self.scores.numel()
        return keep_largest(self.scores, total - round(self.sparsity * total))

    def penalty(self) -> Tensor:
        """mean(sigmoid(S)), [] with gradient: times a factor in the loss, what makes the soft variant prune."""
        return self.scores.sigmoid().mean()

    def train(self, mode: bool = True) -> MovementLinear:
        self._mask = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features].

        Returns:
            y: [..., out_features] in x's dtype.
        """
        bias, words = self.bias, self.mask.words
        if not torch.is_autocast_enabled(x.device.type):
            return _Movement.apply(x, self.weight, bias, self.scores, words)
        x, bias = autocast_together(x, bias)
        with torch.autocast(x.device.type, enabled=False):
            return _Movement.apply(x, self.weight, bias, self.scores, words)

    def extra_repr(self) -> str:
        amount = f"sparsity={self.sparsity:.4g}" if self.threshold is None else f"threshold={self.threshold:.4g}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {amount}"
        )


class _Movement(torch.autograd.Function):
    """Saves x, and references to W and the mask. The numbers of the scores are not read."""

    @staticmethod
    def forward(ctx, x, weight, bias, scores, words):
        ctx.scores_dtype = scores.dtype
        ctx.save_for_backward(x, weight, words)
        return torch.ops.peft_kernels.masked_linear(x, [weight], [], words, False, bias)

    @staticmethod
    def backward(ctx, grad_y):
        return first_gradients("MovementLinear", _gradients, ctx, grad_y, ctx.saved_tensors)


def _gradients(ctx, grad_y, saved):
    x, weight, words = saved
    need_x, need_weight, need_bias, need_scores, _ = ctx.needs_input_grad
    needs = [need_x, False, need_bias, False]
    backward = torch.ops.peft_kernels.masked_linear_backward
    given = iter(backward(grad_y, None, [weight], [], words, False, None, None, None, needs) if any(needs) else ())
    grad_x, grad_bias = (next(given) if need else None for need in (need_x, need_bias))
    # Where the scores train, dYᵀ x is needed everywhere; the weight's gradient is a part of it.
    dtype = ctx.scores_dtype if need_scores else weight.dtype
    grad_weight = weight.new_empty(weight.shape) if need_weight else None
    grad_scores = weight.new_empty(weight.shape, dtype=dtype) if need_scores else None
    if need_weight or need_scores:
        _fill(rows(grad_y), rows(x), weight, words, dtype, grad_weight, grad_scores)
    return grad_x, grad_weight, grad_bias, grad_scores, None


def _fill(grad_y, x, weight, words, dtype, grad_weight, grad_scores) -> None:
    """Writes both gradients, where they are wanted, from one strip of dYᵀ x in `dtype` after another."""
    n, k = weight.shape
    for start, stop in strips(n, k * dtype.itemsize, weight.device):
        like = weight.new_empty((), dtype=dtype).expand(stop - start, k)
        product = sum_over_rows(grad_y[:, start:stop], x, like)
        if grad_weight is not None:
            grad_weight[start:stop] = product
            torch.ops.peft_kernels.mask_apply_(grad_weight[start:stop], words[start:stop])
        if grad_scores is not None:
            torch.mul(product, weight[start:stop], out=grad_scores[start:stop])
