"""`gated_activation` as one elementwise Triton kernel each way.

Floor, M=8192, I=14336, bf16, 4.3 TB/s: forward two reads and a write, 705 MB, 164 us; backward three reads and two
writes, 1174 MB, 273 us. PyTorch's own kernels take two passes forward (five tensors: 273 us) and four backward (eleven:
601 us). Never run on a GPU yet (docs/kernels.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import tuning
from peft_kernels.kernels.triton import _launch
from peft_kernels.kernels.triton._measured import unproven as _unproven


def unsupported(problem) -> str | None:
    return _launch.unavailable(problem.device, problem.device_index, problem.dtype)


def unproven(problem) -> str | None:
    return _unproven("gated_activation", problem)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    from peft_kernels.kernels.triton._gated_activation import gated_activation

    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _elementwise(gated_activation, (gate, up), (out,), activation)
    return out


def backward(grad_h: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients (dgate, dup)."""
    from peft_kernels.kernels.triton._gated_activation import gated_activation_backward

    grads = tuple(torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    _elementwise(gated_activation_backward, (grad_h, gate, up), grads, activation)
    return grads[0], grads[1]


def _elementwise(kernel, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], activation: str) -> None:
    m, n = outputs[0].shape
    if m == 0 or n == 0:
        return
    config = tuning.config(_launch.architecture(outputs[0].device), "gated_activation", outputs[0].dtype)
    block_n = min(config.block_n, max(16, 1 << (n - 1).bit_length()))
    block_m = config.block // block_n
    strides = [stride for tensor in inputs for stride in tensor.stride()]
    # One dimension: the number of row blocks may pass the 65535 that the other grid axes allow.
    grid = (_launch.blocks(m, block_m) * _launch.blocks(n, block_n),)
    _launch.launch(
        kernel, grid, outputs[0].device, *inputs, *outputs, m, n, *strides,
        ACTIVATION=activation, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=config.num_warps,
    )  # fmt: skip
