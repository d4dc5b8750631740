"""Specification of y = down(act(gate(x)) ⊙ up(x)): two specifications of `lora_linear_group` around one of
`gated_activation`.

x [M, hidden], gate and up [intermediate, hidden], down [out, intermediate]. Source: Shazeer, "GLU Variants Improve
Transformer", 2020.
"""

from __future__ import annotations

from peft_kernels.kernels.reference import gated_activation, lora_linear_group


def unsupported(problem) -> str | None:
    return None


def forward(x, weights, biases, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps, seeds):
    return forward_by(
        lambda *_: lora_linear_group, lambda *_: gated_activation,
        x, weights, biases, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps, seeds,
    )  # fmt: skip


def backward(
    grad_y, x, gate, up, s, s_down, weights, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps, seeds, needs
):  # fmt: skip
    """Gradients (dx, dWs, dbiases, dAs, dBs); None where `needs` says that nobody asked."""
    return backward_by(
        lambda *_: lora_linear_group, lambda *_: gated_activation, grad_y, x, gate, up, s, s_down, weights, lora_As,
        lora_Bs, scalings, outputs, activation, dropout_ps, seeds, needs,
    )  # fmt: skip


def _halves(outputs, seeds, *per_adapter):
    """The per-adapter lists of (gate, up) and of down, whose own index becomes 0."""
    cut = outputs.index(2) if 2 in outputs else len(outputs)
    inner = [values[:cut] for values in per_adapter]
    outer = [values[cut:] for values in per_adapter]
    seeds = (None, None) if seeds is None else (seeds[:cut], seeds[cut:])
    return (inner, list(outputs[:cut]), seeds[0]), (outer, [0] * (len(outputs) - cut), seeds[1])


def forward_by(group, gated, x, weights, biases, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps, seeds):
    """`group(x, weights, lora_As, outputs, dropout, token_mask)` and `gated(gate, activation)` give the implementations
    of the two ops inside."""
    outputs = list(outputs)
    first, second = _halves(outputs, seeds, lora_As, lora_Bs, scalings, dropout_ps)
    (gate, up), s = _group_forward(group, x, weights[:2], biases[:2], first)
    h = gated(gate, activation).forward(gate, up, activation)
    (y,), s_down = _group_forward(group, h, weights[2:], biases[2:], second)
    return y, gate, up, s, s_down


def _group_forward(group, x, weights, biases, half):
    (lora_As, lora_Bs, scalings, dropout_ps), outputs, seeds = half
    implementation = group(x, weights, lora_As, outputs, seeds is not None, False)
    return implementation.forward(x, weights, biases, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, None)


def backward_by(
    group, gated, grad_y, x, gate, up, s, s_down, weights, lora_As, lora_Bs, scalings, outputs, activation, dropout_ps,
    seeds, needs,
):  # fmt: skip
    outputs = list(outputs)
    cut = outputs.index(2) if 2 in outputs else len(outputs)
    first, second = _halves(outputs, seeds, lora_As, lora_Bs, scalings, dropout_ps)
    need_inner = needs.x or any(needs.weights[:2] + needs.biases[:2] + needs.lora_As[:cut] + needs.lora_Bs[:cut])
    need_h = any(needs.lora_As[cut:]) or needs.weights[2]
    chosen = gated(gate, activation)
    h = chosen.forward(gate, up, activation) if need_h else None
    outer = type(needs)(need_inner, needs.weights[2:], needs.biases[2:], needs.lora_As[cut:], needs.lora_Bs[cut:])
    grad_h, *of_down = _group_backward(group, [grad_y], h, s_down, weights[2:], second, outer)
    del h
    of_gate_up = (None, [None, None], [None, None], [None] * cut, [None] * cut)
    if need_inner:
        grads = chosen.backward(grad_h, gate, up, activation)
        del grad_h
        inner = type(needs)(needs.x, needs.weights[:2], needs.biases[:2], needs.lora_As[:cut], needs.lora_Bs[:cut])
        of_gate_up = _group_backward(group, list(grads), x, s, weights[:2], first, inner)
    grad_x, *of_gate_up = of_gate_up
    return grad_x, *([*left, *right] for left, right in zip(of_gate_up, of_down, strict=True))


def _group_backward(group, grad_ys, x, s, weights, half, needs):
    (lora_As, lora_Bs, scalings, dropout_ps), outputs, seeds = half
    implementation = group(grad_ys[0], weights, lora_As, outputs, seeds is not None, False)
    return implementation.backward(
        grad_ys, x, s, weights, lora_As, lora_Bs, scalings, outputs, dropout_ps, seeds, None, needs
    )
