"""`gated_activation`: the product of an activated and a plain half, as in SwiGLU and GeGLU."""

from __future__ import annotations

from torch import Tensor

from peft_kernels import ops
from peft_kernels.checks import check_device, check_floating, check_same_dtype, check_shape

_OP = "gated_activation"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def gated_activation(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """h = act(gate) ⊙ up, keeping nothing but `gate` and `up` for backward.

    "silu" makes it SwiGLU, "gelu" and "gelu_tanh" GeGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202). Backward
    recomputes act(gate). Second derivatives raise RuntimeError.

    Args:
        gate: [..., I]; float32, float16, bfloat16 or float64.
        up: as `gate`.
        activation: "silu" (x · sigmoid(x)), "gelu" (the error function's) or "gelu_tanh" (the tanh approximation).

    Returns:
        h: a new tensor of gate's shape and dtype.

    Raises:
        ValueError: shapes or devices differ, or no such activation.
        TypeError: an argument is no floating-point tensor, or dtypes differ.
    """
    check_floating(_OP, "gate", gate)
    check_floating(_OP, "up", up)
    check_shape(_OP, "up", up, tuple(gate.shape), "gate has another")
    check_same_dtype(_OP, "up", up, gate.dtype, "gate")
    check_device(_OP, "up", up, gate.device)
    check_activation(_OP, activation)
    return ops.gated_activation.gated_activation(gate, up, activation)


def check_activation(op: str, activation: str) -> None:
    """Raises a ValueError that lists the names for what is none of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
