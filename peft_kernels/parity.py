"""`check`: does a model compute the same, forward and backward, with and without this library's kernels?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels._table import table
from peft_kernels.dispatch import use_backend

# Largest relative difference between two correct ways of rounding, through all layers of a model.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
TF32_TOLERANCE = 2e-2
# Gradients far below the largest are noise: they count relative to this fraction of it.
FLOOR = 1e-2


class Family(NamedTuple):
    """A kind of layer that `check` compares: how to find such layers in a model, how to make them run without this
    library's kernels, and how many of their calls have done that by themselves."""

    find: Callable[[nn.Module], dict[str, nn.Module]]
    plain: Callable[[dict[str, nn.Module]], AbstractContextManager]
    fallen_back: Callable[[dict[str, nn.Module]], dict[str, int]]


def _own_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if type(m).__module__.startswith("peft_kernels.nn.")}


# `integrations/peft.py` adds PEFT's layers when it is imported.
FAMILIES = [Family(_own_modules, lambda layers: use_backend("reference"), lambda layers: dict.fromkeys(layers, 0))]


class Difference(NamedTuple):
    """How far one tensor is off. `error` is ||value - plain|| / ||plain||; NaN or infinite where it cannot be right."""

    kind: str
    name: str
    error: float


@dataclass(frozen=True)
class Parity:
    """The result of `check`; prints as the verdict and the tensors that are furthest off.

    Attributes:
        differences: outputs and gradients, worst first.
        tolerance: the largest relative error that counts as equal.
        fused: how many layers ran this library's kernels.
        fallen_back: names of the layers that ran other code in at least one call.
    """

    differences: tuple[Difference, ...]
    tolerance: float
    fused: int
    fallen_back: tuple[str, ...] = ()

    @property
    def worst(self) -> Difference:
        """The tensor that is furthest off."""
        return self.differences[0]

    @property
    def ok(self) -> bool:
        """Whether every output and gradient is within the tolerance."""
        return all(difference.error <= self.tolerance for difference in self.differences)

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "DIFFERENT"
        lines = [
            f"{verdict}: {len(self.differences)} outputs and gradients, {self.fused} fused layers; "
            f"worst relative error {self.worst.error:.2e} (tolerance {self.tolerance:.0e}) in {self.worst.name}",
        ]
        if self.fallen_back:
            lines.append(f"{len(self.fallen_back)} layers ran other code, first {self.fallen_back[0]}")
        rows = [(d.kind, d.name, f"{d.error:.2e}") for d in self.differences[:5]]
        return "\n".join([*lines, table(rows, ("kind", "worst first", "relative error"))])


def check(model: nn.Module, batch: Any, *, tolerance: float | None = None, verbose: bool = True) -> Parity:
    """Compares a model's outputs and every gradient with plain PyTorch, on one batch.

    Layers that `accelerate` took over run PEFT's own code for comparison; modules of `peft_kernels.nn` run the
    reference implementation. Both runs start from the same random state, with dropout modules switched off, and
    transformers' gradient checkpointing too (it changes no number). Afterwards every parameter, gradient, buffer,
    training flag and random state is what it was before.

    Args:
        model: has accelerated PEFT layers or modules of this library. Not sharded: check before FSDP or ZeRO-3.
        batch: what the model is called with: a mapping of keyword arguments, a tuple or list of positional ones, or
            one tensor. Gradients of its tensors that require them are compared as well.
        tolerance: the largest relative error (Frobenius) that counts as equal. None takes one for the coarsest dtype
            in use: float64 1e-10, float32 1e-4 (2e-2 where TF32 is on), float16 2e-2, bfloat16 1e-1. Errors of
            gradients below 1 % of the largest one count relative to that.
        verbose: print the result.

    Returns:
        A `Parity`; `.ok` is the verdict, `.worst` the tensor that is furthest off.

    Raises:
        TypeError: model is not a module, or the outputs hold no floating-point tensor.
        ValueError: the model is sharded.
        RuntimeError: the model has no layer of this library, or none ran fused, so that nothing would be compared.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check: model is {type(model).__name__}; expected a torch.nn.Module")
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    _refuse_sharded(model)
    found = [(family, layers) for family in FAMILIES if (layers := family.find(model))]
    if not found:
        raise RuntimeError("check: the model has no fused layers; call peft_kernels.accelerate or add_lora first")
    with _undisturbed(model):
        before = _fallen_back(found)
        value = _run(model, batch)
        after = _fallen_back(found)
        with contextlib.ExitStack() as stack:
            for family, layers in found:
                stack.enter_context(family.plain(layers))
            plain = _run(model, batch)
    fallen_back = tuple(name for name in after if after[name] > before[name])
    if len(fallen_back) == len(after):
        raise RuntimeError("check: no layer ran fused, so there is nothing to compare; the log says why")
    differences = sorted(_differences(value, plain), key=lambda d: d.error if d.error == d.error else float("inf"))
    tolerance = _tolerance(model, plain) if tolerance is None else tolerance
    result = Parity(tuple(reversed(differences)), tolerance, len(after) - len(fallen_back), fallen_back)
    if verbose:
        print(result)
    return result


def _fallen_back(found: list[tuple[Family, dict[str, nn.Module]]]) -> dict[str, int]:
    return {name: count for family, layers in found for name, count in family.fallen_back(layers).items()}


def _refuse_sharded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or type(parameter).__name__ in ("DTensor", "FlatParameter"):
            raise ValueError(f"check: {name} is sharded; check the model before it is distributed")


class _Tensors(NamedTuple):
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def _run(model: nn.Module, batch: Any) -> _Tensors:
    """One forward and backward from the current random state, which is put back."""
    devices = sorted({t.device.index for t in model.parameters() if t.is_cuda})
    with torch.random.fork_rng(devices), torch.enable_grad():
        output = _call(model, batch)
        outputs = dict(_floating_tensors("output", output))
        if not outputs:
            raise TypeError(f"check: the model returned a {type(output).__name__} without floating-point tensors")
        leaves: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        leaves |= {n: t for n, t in _floating_tensors("batch", batch) if t.requires_grad}
        loss = _loss(output, outputs)
        wanted = loss.requires_grad and leaves
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if wanted else [None] * len(leaves)
    return _Tensors({n: t.detach() for n, t in outputs.items()}, dict(zip(leaves, grads, strict=True)))


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _floating_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _floating_tensors(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _floating_tensors(f"{name}.{index}", item)


def _loss(output: Any, outputs: dict[str, Tensor]) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.sum()
    first, *others = [_projection(tensor) for tensor in outputs.values()]
    return sum((other.to(first.device) for other in others), first)


def _projection(tensor: Tensor) -> Tensor:
    """<tensor, fixed random direction>, so that each element of the output has a gradient of its own."""
    generator = torch.Generator(tensor.device).manual_seed(0)
    direction = torch.randn(tensor.shape, generator=generator, device=tensor.device)
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return (wide * direction).sum() / max(1, tensor.numel()) ** 0.5


def _differences(value: _Tensors, plain: _Tensors) -> Iterator[Difference]:
    for name, truth in plain.outputs.items():
        yield Difference("output", name, _error(value.outputs.get(name), truth, 0.0))
    norms = [float(g.double().norm()) for g in plain.gradients.values() if g is not None]
    floor = FLOOR * max((n for n in norms if n == n), default=0.0)
    for name, gradient in plain.gradients.items():
        yield Difference("gradient", name, _error(value.gradients[name], gradient, floor))


def _error(value: Tensor | None, truth: Tensor | None, floor: float) -> float:
    if value is None or truth is None:
        return 0.0 if value is truth else float("inf")
    if value.shape != truth.shape or value.dtype != truth.dtype:
        return float("inf")
    difference = float((value.double() - truth.double()).norm())
    norm = max(float(truth.double().norm()), floor)
    return difference / norm if norm > 0 else (0.0 if difference == 0 else float("inf"))


def _tolerance(model: nn.Module, plain: _Tensors) -> float:
    dtypes = {t.dtype for t in (*model.parameters(), *plain.outputs.values()) if t.dtype in TOLERANCES}
    computed = (getattr(module, "compute_dtype", None) for module in model.modules())  # of 4-bit layers
    dtypes |= {dtype for dtype in computed if dtype in TOLERANCES}
    kinds = {t.device.type for t in model.parameters()}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    tolerance = max((TOLERANCES[dtype] for dtype in dtypes), default=TOLERANCES[torch.bfloat16])
    tf32 = "cuda" in kinds and torch.get_float32_matmul_precision() != "highest"
    return max(tolerance, TF32_TOLERANCE) if tf32 else tolerance


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Dropout and checkpointing off inside; training flags and buffers as before afterwards."""
    flags = [(m, name, m.__dict__[name]) for m in model.modules() for name in _flags_to_clear(m)]
    registered = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for module, name, _ in flags:
        module.__dict__[name] = False
    try:
        yield
    finally:
        for module, name, flag in flags:
            module.__dict__[name] = flag
        for module, buffers in registered:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _flags_to_clear(module: nn.Module) -> list[str]:
    flags = [name for name in ("gradient_checkpointing",) if module.__dict__.get(name) is True]
    if module.training and ("Drop" in type(module).__name__ or hasattr(module, "lora_dropout")):
        flags.append("training")
    return flags
