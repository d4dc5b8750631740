"""Wanda: pruning by weights times the norm of their inputs, without training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_kernels.formats.mask import PackedMask
from peft_kernels.pruning._scores import Scores, check_finite_scores, magnitudes
from peft_kernels.pruning._select import check_amount, select
from peft_kernels.pruning._targets import prunable, weights_of


class InputNorms:
    """‖x_k‖ of each input feature of the linear layers of a model, over all rows that pass while it is entered.

        with InputNorms(model) as inputs:
            model(**batch)
        inputs.norms()["layer.name"]  # [in_features]

    Squares are summed in float32, without a wait for the device. Every row counts, that of a padding token too.

    Args:
        model: any model, wrapped or not.
        targets: names of the layers, or their endings after a dot; None takes all.

    Raises:
        ValueError, TypeError: as `magnitude_masks`.
    """

    def __init__(self, model: nn.Module, targets: Iterable[str] | None = None) -> None:
        self._layers = prunable("InputNorms", model, targets)
        self._squares: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> InputNorms:
        for name, layer in self._layers.items():
            self._hooks.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _hook(self, name: str):
        def add(module: nn.Module, args: tuple) -> None:
            x = args[0].detach().flatten(0, -2) if args[0].ndim != 1 else args[0].detach().unsqueeze(0)
            wide = torch.promote_types(x.dtype, torch.float32)
            square = torch.linalg.vector_norm(x, dim=0, dtype=wide).square_()
            self._squares[name] = self._squares[name] + square if name in self._squares else square

        return add

    def norms(self) -> dict[str, Tensor]:
        """[in_features] by name; where torch.distributed is initialised, over the rows of all ranks (collective: the
        same, and the same bits, on every rank).

        Raises:
            ValueError: a layer has seen no input; the message names it.
        """
        missing = [name for name in self._layers if name not in self._squares]
        if missing:
            raise ValueError(f"InputNorms: {', '.join(missing)} had no input")
        squares = {name: square.clone() for name, square in self._squares.items()}
        if dist.is_available() and dist.is_initialized():
            for name in self._layers:
                dist.all_reduce(squares[name])
        return {name: square.sqrt_() for name, square in squares.items()}


def wanda_masks(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float | None = None,
    scope: str = "row",
    *,
    n_of_m: tuple[int, int] | None = None,
    block: tuple[int, int] | None = None,
    targets: Iterable[str] | None = None,
    check: bool = False,
) -> dict[str, PackedMask]:
    """Masks of the weights with the largest |W_nk| · ‖x_k‖ of each row (Sun et al. 2023, "A Simple and Effective
    Pruning Approach for Large Language Models", https://arxiv.org/abs/2306.11695): no training, no gradients.

    All layers are scored by the inputs they have in the unpruned model. (The authors' script prunes the blocks of a
    model one after another, each by inputs from pruned ones: call this with `targets` block by block, `apply_masks`
    between, for the same.) The model is put in evaluation mode meanwhile and computes without gradients.

    Args:
        model: a model, as for `magnitude_masks`.
        batches: calibration data: each is handed to the model, a mapping as keywords, a tuple or list as positions.
            With torch.distributed each rank has its own, and all get the same masks.
        sparsity: share of the weights to prune, in [0, 1]: round(sparsity · in_features) of each row.
        scope: "row", as in the paper, "layer" or "global".
        n_of_m, block, targets, check: as for `magnitude_masks`.

    Returns:
        A `PackedMask` by name, on the device of each weight.

    Raises:
        ValueError, TypeError: as `magnitude_masks`; or a layer that the batches never reach.
    """
    where = "wanda_masks"
    check_amount(where, sparsity, scope, n_of_m, block)
    inputs = InputNorms(model, targets)
    with inputs:
        _run(model, batches)
    scores = wanda_scores(weights_of(where, model, targets), inputs.norms())
    if check:
        check_finite_scores(where, scores)
    return select(scores, sparsity, scope, n_of_m, block)


def wanda_scores(weights: Mapping[str, Any], norms: Mapping[str, Tensor]) -> dict[str, Scores]:
    """|W_nk| · ‖x_k‖ by name, computed strip by strip when they are asked for."""

    def times(norm: Tensor):
        return lambda strip, _: strip.to(norm.dtype) * norm.to(strip.device)

    return {name: magnitudes(weight, name).map(times(norms[name])) for name, weight in weights.items()}


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Any]) -> None:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in batches:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, (tuple, list)):
                model(*batch)
            else:
                model(batch)
    finally:
        for module, mode in modes:
            module.training = mode
