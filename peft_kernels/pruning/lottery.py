"""Lottery tickets: iterative magnitude pruning with rewinding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels._table import table
from peft_kernels.checks import check_probability
from peft_kernels.formats.mask import PackedMask, full
from peft_kernels.nn._layers import is_conv1d
from peft_kernels.nn._sites import unwrap
from peft_kernels.nn.masked import MaskedLinear
from peft_kernels.pruning._scores import inside, magnitudes
from peft_kernels.pruning._select import kept_count
from peft_kernels.pruning._targets import prunable
from peft_kernels.pruning.apply import apply_masks, shape_of
from peft_kernels.pruning.report import SparsityReport, sparsity_report
from peft_kernels.pruning.thresholds import keep_largest


@dataclass(frozen=True)
class LotteryReport:
    """Prints as a table.

    Attributes:
        rounds: (sparsity of the layers, what training returned), one for each training.
    """

    rounds: tuple[tuple[SparsityReport, Any], ...] = field(default=())

    def __str__(self) -> str:
        rows = [
            (i, f"{sparsity.sparsity:.4f}", f"{sparsity.kept:,}", result if result is None else f"{result}")
            for i, (sparsity, result) in enumerate(self.rounds)
        ]
        return table(rows, ("round", "sparsity", "kept", "result"))


class LotteryTicket:
    """Finds sparse subnetworks that train as well as the whole: train, prune what is smallest, put what is left back to
    where it began, again and again (Frankle & Carbin 2019, "The Lottery Ticket Hypothesis",
    https://arxiv.org/abs/1803.03635; for large models it begins a little after initialisation: Frankle et al. 2020,
    "Linear Mode Connectivity and the Lottery Ticket Hypothesis", https://arxiv.org/abs/1912.05671).

        ticket = LotteryTicket(model)                       # what to rewind to: now, or an early checkpoint
        report = ticket.iterate(train, rounds=5, rate=0.2)  # train(model, round) makes its own optimiser

    The linear layers become `MaskedLinear`, so that training leaves pruned weights at exactly 0. Of what is rewound to,
    only the kept weights are held: it shrinks with the network.

    Args:
        model: any model; its layers are replaced in place.
        rewind_state: a state dict of this model, from before its layers were replaced; None takes the model as it is.
        targets: names of the layers to prune, or their endings after a dot; None takes all.
        scope: "global" ranks all weights together, "layer" those of each layer.
        device: where the state is kept; None leaves it beside the weights.

    Attributes:
        masks: the mask of each layer by name, now.
        history: those of each round, the first of the whole network: `multi_mask_linear` computes with several at once
            over one weight.

    Raises:
        ValueError: nothing to prune, a layer that cannot be replaced or is in 4 bits, a state that does not fit the
            model, an unknown scope.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rewind_state: Mapping[str, Tensor] | None = None,
        targets: Iterable[str] | None = None,
        scope: str = "global",
        device: torch.device | str | None = None,
    ) -> None:
        if scope not in ("global", "layer"):
            raise ValueError(f"LotteryTicket: scope is {scope!r}; expected 'global' or 'layer'")
        self.model, self.scope, self._device = model, scope, device
        layers = prunable("LotteryTicket", model, targets)
        for name, layer in layers.items():
            if not isinstance(layer.weight, nn.Parameter):
                raise ValueError(
                    f"LotteryTicket: {name} is in 4 bits or in the compact layout; expected a dense weight"
                )
        state = dict(unwrap(model).state_dict()) if rewind_state is None else dict(rewind_state)
        self._check(state)
        for name, layer in layers.items():
            if is_conv1d(layer):
                state[f"{name}.weight"] = state[f"{name}.weight"].t()
        new = {name: layer for name, layer in layers.items() if not isinstance(layer, MaskedLinear)}
        apply_masks(model, {name: full(*shape_of(x), device=x.weight.device) for name, x in new.items()})
        self._layers: dict[str, MaskedLinear] = prunable("LotteryTicket", model, layers)
        self.masks: dict[str, PackedMask] = {name: layer.mask for name, layer in self._layers.items()}
        self._kept = {layer.name: layer.kept for layer in sparsity_report(self.masks).layers}
        self._values = {name: self._chosen(state.pop(f"{name}.weight"), mask) for name, mask in self.masks.items()}
        self._others = {name: self._saved(value) for name, value in state.items() if not name.endswith("mask_words")}
        self.history: list[dict[str, PackedMask]] = [dict(self.masks)]

    def _check(self, state: Mapping[str, Tensor]) -> None:
        now = {name: value.shape for name, value in unwrap(self.model).state_dict().items()}
        wrong = [name for name in now if name not in state or state[name].shape != now[name]]
        if wrong:
            raise ValueError(f"LotteryTicket: rewind_state has no {wrong[0]} of shape {tuple(now[wrong[0]])}")

    def _saved(self, value: Tensor) -> Tensor:
        return value.detach().to(device=self._device, copy=True)

    def _chosen(self, weight: Tensor, mask: PackedMask) -> Tensor:
        """The kept numbers of a whole weight, in row-major order."""
        return self._saved(weight.detach()[mask.unpack().to(weight.device)])

    def prune(self, rate: float) -> dict[str, PackedMask]:
        """Prunes round(rate · kept) of the weights that are left, those of smallest absolute value now (halves rounded
        to even; of all layers together or, by `scope`, of each). Weights stay as they are trained.

        Returns:
            The new masks by name.

        Raises:
            ValueError: no such rate.
        """
        check_probability("LotteryTicket.prune", "rate", rate)
        scores = {name: inside(magnitudes(layer.weight), self.masks[name]) for name, layer in self._layers.items()}
        if self.scope == "global":
            kept = keep_largest(list(scores.values()), kept_count(sum(self._kept.values()), rate))
            masks = dict(zip(scores, kept, strict=True))
        else:
            masks = {name: keep_largest(part, kept_count(self._kept[name], rate)) for name, part in scores.items()}
        for name, mask in masks.items():
            still = mask.unpack()[self.masks[name].unpack()]
            self._values[name] = self._values[name][still.to(self._values[name].device)]
        apply_masks(self.model, masks)
        self.masks = masks
        self._kept = {layer.name: layer.kept for layer in sparsity_report(masks).layers}
        self.history.append(dict(masks))
        return masks

    @torch.no_grad()
    def rewind(self) -> None:
        """Puts everything back to what it was, bit for bit, but for what is pruned, which is 0. Parameters and buffers
        stay the same objects; an optimiser is to be made anew."""
        for name, layer in self._layers.items():
            weight = layer.weight
            weight.zero_()
            weight[self.masks[name].unpack()] = self._values[name].to(weight.device)
        state = unwrap(self.model).state_dict()
        for name, value in self._others.items():
            state[name].copy_(value)

    def iterate(self, train_fn: Callable[[nn.Module, int], Any], rounds: int, rate: float) -> LotteryReport:
        """Trains, and `rounds` times prunes, rewinds and trains again: rounds + 1 trainings, the last of the sparsest.

        Args:
            train_fn: (model, round) -> what the report is to say of it (a loss or score, say).
            rounds: how often is pruned.
            rate: share of what is left to prune each time: after n rounds (1 - rate)ⁿ is left.

        Returns:
            The report.

        Raises:
            ValueError: no such rate, or fewer than 0 rounds.
        """
        check_probability("LotteryTicket.iterate", "rate", rate)
        if rounds < 0:
            raise ValueError(f"LotteryTicket.iterate: rounds is {rounds}; expected 0 or more")
        done = []
        for i in range(rounds + 1):
            if i:
                self.prune(rate)
                self.rewind()
            result = train_fn(self.model, i)
            done.append((sparsity_report(self.masks), result))
        return LotteryReport(tuple(done))

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept to rewind to, and of the masks of all rounds."""
        masks = sum(mask.nbytes for masks in self.history for mask in masks.values())
        return masks + sum(value.nbytes for part in (self._values, self._others) for value in part.values())
