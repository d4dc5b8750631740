"""`SparseAdamW`: AdamW over chosen weights, whose state follows them when the choice changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.formats.positions import Positions
from peft_kernels.formats.sparse_delta import carried


class SparseAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) over the values of chosen weights.

    Steps are those of `torch.optim.AdamW`, bit for bit: its update is elementwise, so that over values [nnz] the state
    is 2 · nnz numbers, whatever the size of the weights. What this class adds is `remap`, for methods that drop and
    grow places while they train (SIFT, SpIEL, RigL). Over dense parameters it is AdamW.

    Args:
        params: parameters or groups, such as `layer.values` of `SparseDeltaLinear` or `MaskedLinear`.
        lr: step size, a number or a tensor.
        betas: decay of the running averages of gradient and square.
        eps: added to the root of the square.
        weight_decay: pulls values towards 0, which for a delta is towards the weights it started from.
        **options: as of `torch.optim.AdamW` (amsgrad, foreach, fused, capturable, maximize, differentiable).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)

    @torch.no_grad()
    def remap(self, old: nn.Parameter, new: nn.Parameter, old_positions: Positions, new_positions: Positions) -> None:
        """Lets a parameter take the place of another after its places changed (waits for nothing).

        Running averages of places that stay go with them, bit for bit; those of new places start at 0. The number of
        steps is the parameter's and goes on: the first steps of a new place are as those of a weight that had no
        gradient so far.

        Args:
            old: a parameter of this optimiser, [old nnz].
            new: what is trained in its place, [new nnz]. It may be the same.
            old_positions, new_positions: the places of both.

        Raises:
            ValueError: `old` is none of this optimiser's parameters, `new` is already another one of them, or a
                parameter does not have one value for each of its places.
        """
        entries = [(group, i) for group in self.param_groups for i, p in enumerate(group["params"]) if p is old]
        if not entries:
            raise ValueError("SparseAdamW.remap: old is no parameter of this optimiser")
        if new is not old and any(p is new for group in self.param_groups for p in group["params"]):
            raise ValueError("SparseAdamW.remap: new is a parameter of this optimiser already")
        if new.shape != new_positions.flat.shape:
            raise ValueError(
                f"SparseAdamW.remap: new has shape {tuple(new.shape)}; expected {tuple(new_positions.flat.shape)}"
            )
        state = self.state.get(old, {})
        moved = {
            name: carried(value, old_positions, new_positions) if _is_of_places(value) else value
            for name, value in state.items()
        }
        self.state.pop(old, None)
        if moved:
            self.state[new] = moved
        for group, i in entries:
            group["params"][i] = new


def _is_of_places(value: Any) -> bool:
    """Whether it is a number for each place; the count of steps is one for all."""
    return isinstance(value, Tensor) and value.ndim == 1
