"""`lora_swiglu_mlp`: a gated feed-forward block of three linear layers with low-rank updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_shape
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.functional.gated_activation import check_activation
from peft_kernels.functional.lora_linear import is_dtensor
from peft_kernels.functional.lora_linear_group import Adapters, check_group, check_input, flatten_group, seeds_tensor

_OP = "lora_swiglu_mlp"


def lora_swiglu_mlp(
    x: Tensor,
    weights: Sequence[Tensor | NF4Weight],
    lora_As: Adapters,
    lora_Bs: Adapters,
    *,
    scalings: float | Sequence[Any],
    biases: Sequence[Tensor | None] | None = None,
    activation: str = "silu",
    dropout_p: float | Sequence[Any] = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """A gated feed-forward block (SwiGLU, GeGLU) whose three linear layers have low-rank updates.

    y = down(act(gate(x)) ⊙ up(x)), where each of gate, up and down is x Wᵀ + b + Σ_i s_i (drop_i(x) A_iᵀ) B_iᵀ

    For backward x, gate(x), up(x), the products of rank r and the seeds are kept; act(gate(x)) ⊙ up(x) is computed
    again, so that neither it nor a dropped-out copy of it is kept. gate and up share the passes over x
    (`lora_linear_group`). Second derivatives raise RuntimeError.

    Args:
        x: [..., hidden]; float32, float16, bfloat16 or float64.
        weights: (gate [intermediate, hidden], up [intermediate, hidden], down [out, intermediate]) in x's dtype, or
            `NF4Weight`s as for `lora_linear_group`.
        lora_As, lora_Bs, scalings, biases, dropout_p: for (gate, up, down), each as for `lora_linear_group`.
        activation: "silu", "gelu" or "gelu_tanh".
        training: no dropout when False.
        seed: an integer s (adapter i takes s + i, counted through gate, up, down), an int64 tensor [number of
            adapters], or None to draw from torch's generator.

    Returns:
        y: [..., out] in x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: a shape, length, device or number does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
        NotImplementedError: the tensors are DTensors.
    """
    if len(weights) != 3:
        raise ValueError(f"{_OP}: weights has {len(weights)} entries; expected (gate, up, down)")
    check_activation(_OP, activation)
    group = flatten_group(_OP, weights, lora_As, lora_Bs, scalings, biases, dropout_p)
    check_input(_OP, x)
    check_group(_OP, x, x.shape[-1], group, range(2))
    check_shape(_OP, "weights[1]", weights[1], tuple(weights[0].shape), "gate and up have one shape")
    check_group(_OP, x, weights[0].shape[0], group, range(2, 3))
    if is_dtensor(x, *weights, *group.lora_As, *group.lora_Bs):
        raise NotImplementedError(f"{_OP}: DTensors are not supported; call the three layers one by one")
    dropout_ps, seeds = seeds_tensor(_OP, group, training, seed, x.device)
    return ops.lora_swiglu_mlp.lora_swiglu_mlp(
        x, group.weights, group.biases, group.lora_As, group.lora_Bs, group.scalings, group.outputs, activation,
        dropout_ps, seeds,
    )  # fmt: skip
