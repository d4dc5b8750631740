"""`dora_linear`: a linear layer whose weight is split into direction, with a low-rank update, and magnitude."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_device, check_floating, check_same_dtype, check_shape
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional.dora_weight_norm import dora_weight_norm
from peft_kernels.functional.lora_linear import dense_beside_dtensors, explain_lora, is_dtensor, lora_fits
from peft_kernels.functional.philox_dropout import seed_tensor

_OP = "dora_linear"


def dora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    weight_norm: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A linear layer with weight-decomposed low-rank adaptation (DoRA), without ever forming W + s B A.

    y = g ⊙ (x Wᵀ + scaling · (drop(x) Aᵀ) Bᵀ) + b,   g = magnitude / ‖W + scaling · B A‖ (norm of each row)

    The norm counts as a constant for gradients, as in section 4.3 of the paper (Liu et al. 2024,
    https://arxiv.org/abs/2402.09353) and in Hugging Face PEFT. There is one base matmul, also with dropout, which
    applies to the low-rank branch only. (PEFT with dropout runs a second one on the dropped x, for the part
    (g - 1) x Wᵀ: another sample of the same expectation.) For backward x, S, the seed and the value before the scaling
    by g [..., out_features] are kept, each only if a wanted gradient uses it. Second derivatives raise RuntimeError.

    Args:
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, training, seed: as for `lora_linear`.
        magnitude: m [out_features] in lora_A's dtype.
        weight_norm: what `dora_weight_norm` gave for these W, A and B, float32 (float64 for a float64 W); None computes
            it. Giving it saves the time as long as A and B have not changed (accumulating gradients, inference).

    Returns:
        y: [..., out_features] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape, device or number does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
    """
    if isinstance(weight, NF4Weight) or not lora_fits(x, weight, lora_A, lora_B, scaling, bias, dropout_p):
        explain_lora(_OP, x, weight, lora_A, lora_B, scaling, bias, dropout_p)
        scaling, dropout_p = scaling * 1.0, dropout_p * 1.0
    _check_vector("magnitude", magnitude, weight)
    check_same_dtype(_OP, "magnitude", magnitude, lora_A.dtype, "lora_A")
    if not (training and dropout_p > 0):
        dropout_p = 0.0
    if is_dtensor(x, weight, lora_A, lora_B, magnitude):
        return _on_dtensors(x, weight, lora_A, lora_B, magnitude, scaling, bias, weight_norm, dropout_p, seed)
    if weight_norm is None:
        weight_norm = dora_weight_norm(weight, lora_A, lora_B, scaling=scaling)
    else:
        _check_vector("weight_norm", weight_norm, weight)
    seed = seed_tensor(_OP, seed, x.device) if dropout_p else None
    return ops.dora_linear.dora_linear(
        x, weight, bias, lora_A, lora_B, magnitude, weight_norm, scaling, dropout_p, seed
    )


def _check_vector(name: str, value: Tensor, weight: Tensor | NF4Weight) -> None:
    """Raises for what is no floating-point vector [N] on the device of weight [N, K]."""
    check_floating(_OP, name, value)
    check_shape(_OP, name, value, weight.shape[:1], f"weight has {weight.shape[0]} output features")
    check_device(_OP, name, value, weight.device)


def _on_dtensors(x, weight, lora_A, lora_B, magnitude, scaling, bias, weight_norm, dropout_p, seed) -> Tensor:
    """Sharded tensors (tensor parallel): the formula in PyTorch's own ops, whose sharding rules DTensor knows."""
    if dropout_p and seed is not None:
        raise ValueError(f"{_OP}: seed is given, but the tensors are DTensors, whose masks torch draws")
    (weight,) = dense_beside_dtensors(_OP, (weight,))
    if weight_norm is None:
        with torch.no_grad():
            weight_norm = (weight.float() + scaling * (lora_B.float() @ lora_A.float())).norm(dim=1)
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    low_rank = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    y = (magnitude / weight_norm).to(x.dtype) * (F.linear(x, weight) + scaling * low_rank)
    return y if bias is None else y + bias
