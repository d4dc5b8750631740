"""Pruning while the Hugging Face `Trainer` trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import TrainerCallback

from peft_kernels.formats.mask import PackedMask, full
from peft_kernels.nn._masked_state import Masked
from peft_kernels.nn.masked import MaskedLinear
from peft_kernels.pruning._targets import prunable
from peft_kernels.pruning.apply import apply_masks, enforce, mask_optimizer_state, masks_of, shape_of
from peft_kernels.pruning.magnitude import magnitude_masks
from peft_kernels.pruning.movement import add_movement, finalize_movement, movement_layers, set_sparsity

Method = Callable[..., Mapping[str, PackedMask]]


class PruningCallback(TrainerCallback):
    """Prunes gradually while training goes on (Zhu & Gupta 2017, https://arxiv.org/abs/1710.01878):

        Trainer(model, args, ..., callbacks=[PruningCallback(Cubic(0.8, begin=100, end=900), every=50)])

    Linear layers become `MaskedLinear` when the trainer is made, their parameters the same objects. After step n, if n
    is a multiple of `every` or the schedule rises no further, masks are computed anew at the sparsity of step n, within
    the ones before: what is pruned stays so. What the optimiser has gathered of newly pruned weights is set to 0.
    Nothing waits for the device. Every rank of DistributedDataParallel has the same weights, and so the same masks.

    The model keeps its masked layers: its state dict has `mask_words` beside `weight`. `to_linear` of each makes plain
    ones again. FSDP and DeepSpeed ZeRO-3, where a rank has a part of each weight, are refused.

    Args:
        schedule: step -> sparsity, as `Cubic`, `Linear` or `Constant`.
        method: (model, sparsity, within=masks, targets=names) -> masks; `functools.partial(magnitude_masks,
            scope="layer")`, say.
        every: steps from one pruning to the next.
        targets: names of the layers, or their endings after a dot; None takes all.
        rezero: set pruned weights to 0 after every step: for optimisers that move weights of 0 with a gradient of 0
            (Muon). Elementwise ones (SGD, Adam, ...) leave them alone.
    """

    def __init__(
        self,
        schedule: Callable[[int], float],
        method: Method = magnitude_masks,
        *,
        every: int = 100,
        targets: Iterable[str] | None = None,
        rezero: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"PruningCallback: every is {every}; expected at least 1")
        self.schedule, self.method, self.every, self.rezero = schedule, method, every, rezero
        self.targets = None if targets is None else list(targets)
        self._names: list[str] = []
        self._layers: list[nn.Module] = []
        self._sparsity = 0.0

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        _check_whole("PruningCallback", args)
        self._prepare(model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        self._prepare(model)  # for a callback that was added to a trainer
        self._prune(model, optimizer, state.global_step)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.rezero:
            enforce(self._layers)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        step = state.global_step
        if step % self.every == 0 or self.schedule(step) == self.schedule(step + 1):
            self._prune(model, optimizer, step)

    def _prepare(self, model: Any) -> None:
        layers = prunable("PruningCallback", model, self.targets)
        new = {}
        for name, layer in layers.items():
            if isinstance(layer, MaskedLinear) and layer.values is not None:
                raise ValueError(f"PruningCallback: {name} is in the compact layout; expected a dense weight")
            if not isinstance(layer, Masked):
                new[name] = full(*shape_of(layer), device=layer.weight.device)
        apply_masks(model, new, weight_is_masked=True)
        self._names = list(layers)
        self._layers = list(prunable("PruningCallback", model, self._names).values())

    def _prune(self, model: Any, optimizer: Any, step: int) -> None:
        sparsity = self.schedule(step)
        if sparsity <= self._sparsity:
            return
        masks = {name: mask for name, mask in masks_of(model).items() if name in self._names}
        apply_masks(model, self.method(model, sparsity, within=masks, targets=self._names))
        if optimizer is not None:
            mask_optimizer_state(optimizer, model)
        self._sparsity = sparsity


class MovementCallback(TrainerCallback):
    """Movement pruning by the Hugging Face `Trainer`: `MovementLinear` for linear layers when the trainer is made, the
    sparsity of the schedule before each step, and at the end `MaskedLinear` with the last masks.

    The trainer's own optimiser gives scores the learning rate of the weights; the paper's is some 300 times that. Hand
    it one with `score_parameters(model)` in a group of their own (after this callback's `prepare(model)`).

    Args:
        schedule: step -> sparsity, as `Cubic`, `Linear` or `Constant`.
        targets: names of the layers, or their endings after a dot; None takes all.
    """

    def __init__(self, schedule: Callable[[int], float], *, targets: Iterable[str] | None = None) -> None:
        self.schedule = schedule
        self.targets = None if targets is None else list(targets)

    def prepare(self, model: nn.Module) -> None:
        """Replaces the layers, if none is replaced yet."""
        if not movement_layers(model):
            add_movement(model, targets=self.targets)

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        _check_whole("MovementCallback", args)
        self.prepare(model)

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        set_sparsity(model, self.schedule(state.global_step))

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        set_sparsity(model, self.schedule(state.global_step))
        finalize_movement(model)


def _check_whole(where: str, args: Any) -> None:
    for option in ("fsdp", "deepspeed"):
        if getattr(args, option, None):
            raise ValueError(f"{where}: {option} gives each rank a part of a weight; expected whole ones, as by DDP")
