"""Pruning by the Hugging Face `Trainer`: what it prunes when, and that a step asks the device for no number."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="needs Hugging Face transformers: pip install transformers")
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_kernels import MaskedLinear
from peft_kernels.pruning import (
    Constant,
    Cubic,
    MovementCallback,
    PruningCallback,
    apply_masks,
    magnitude_masks,
    mask_optimizer_state,
    masks_of,
    movement_layers,
    sparsity_report,
)
from peft_kernels.pruning.apply import enforce

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 6)

    def forward(self, x, labels):
        loss = (self.second(self.first(x).relu()) - labels).square().mean()
        return {"loss": loss}


class Watch(TrainerCallback):
    """Sparsities after each step."""

    def __init__(self) -> None:
        self.seen, self.dirty = [], 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(round(sparsity_report(model).sparsity, 3))
        for name, mask in masks_of(model).items():
            self.dirty += int(model.get_submodule(name).weight[~mask.unpack()].count_nonzero())


def train(model, callbacks, folder, steps=8, **options):
    torch.manual_seed(0)
    data = [{"x": torch.randn(12), "labels": torch.randn(6)} for _ in range(64)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, learning_rate=0.05, logging_strategy="no", **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return trainer


def test_gradual_pruning(tmp_path):
    model, watch = Model(), Watch()
    parameters = list(model.parameters())
    schedule = Cubic(0.75, begin=1, end=7)
    train(model, [PruningCallback(schedule, every=2), watch], tmp_path)
    total = 12 * 32 + 32 * 6
    at = {step: round(round(schedule(step) * total) / total, 3) for step in range(9)}
    assert watch.seen == [0, at[2], at[2], at[4], at[4], at[6], at[7], at[7]]
    assert watch.dirty == 0
    assert type(model.first) is MaskedLinear
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))


def test_a_constant_amount_from_the_start_of_one_layer(tmp_path):
    model, watch = Model(), Watch()
    train(model, [PruningCallback(Constant(0.5), targets=["first"], rezero=True), watch], tmp_path, steps=2)
    assert watch.seen == [0.5, 0.5]
    assert type(model.second) is nn.Linear


def test_movement(tmp_path):
    model = Model()
    watched = []

    class Watching(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            watched.append([layer.sparsity for layer in movement_layers(model).values()])

    train(model, [MovementCallback(Cubic(0.5, 0, 6)), Watching()], tmp_path)
    assert watched == [[Cubic(0.5, 0, 6)(step)] * 2 for step in range(8)]
    assert sparsity_report(model).kept == 192 + 96
    assert type(model.first) is MaskedLinear


@contextlib.contextmanager
def nothing_is_asked():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in ASKING, f"asks the device for a number: {func}"
            indices = args[1] if name == "index" else ()
            assert not any(i is not None and i.dtype == torch.bool for i in indices), "a size that depends on numbers"
            return func(*args, **(kwargs or {}))

    with Mode():
        yield


def test_a_step_asks_for_no_number():
    model = Model()
    apply_masks(model, magnitude_masks(model, 0.1), weight_is_masked=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    x, labels = torch.randn(8, 12), torch.randn(8, 6)
    with nothing_is_asked():
        for sparsity in (0.3, 0.5):
            model(x, labels)["loss"].backward()
            optimizer.step()
            apply_masks(model, magnitude_masks(model, sparsity, within=masks_of(model)))
            mask_optimizer_state(optimizer, model)
            enforce([model.first, model.second])
        apply_masks(model, magnitude_masks(model, n_of_m=(2, 4)))
        apply_masks(model, magnitude_masks(model, 0.5, "layer", block=(2, 4)))
        with pytest.raises(AssertionError, match="asks the device"):
            float(x.sum())
    assert sparsity_report(model).sparsity == 0.5


def test_movement_asks_for_no_number():
    from peft_kernels.pruning import add_movement, set_sparsity

    model = Model()
    add_movement(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, labels = torch.randn(8, 12), torch.randn(8, 6)
    with nothing_is_asked():
        for sparsity in (0.0, 0.5):
            set_sparsity(model, sparsity)
            model(x, labels)["loss"].backward()
            optimizer.step()
    assert int(model.first.mask.kept()) == 192


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="every is 0"):
        PruningCallback(Constant(0.5), every=0)

    class Sharded:
        fsdp, deepspeed = True, None

    with pytest.raises(ValueError, match="fsdp gives each rank a part"):
        PruningCallback(Constant(0.5)).on_init_end(Sharded(), None, None, model=Model())
    model = nn.Sequential(MaskedLinear(8, 4, grad_layout="compact"))
    with pytest.raises(ValueError, match="0 is in the compact layout"):
        PruningCallback(Constant(0.5)).on_train_begin(None, None, None, model=model)
