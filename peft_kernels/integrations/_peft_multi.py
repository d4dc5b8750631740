"""Batches in which every sample names its own adapter (`adapter_names`, as in Hugging Face PEFT), in any mode.

PEFT hands the names to each layer by a hook, and a layer then runs its adapters one after the other. Here a layer runs
them all in one `multi_lora_linear`. PEFT refuses such batches in training mode; `FusedLoraModel` lifts that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel, _adapter_names_pre_forward_hook
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_kernels import functional
from peft_kernels.checks import MAX_RANK
from peft_kernels.formats._open_ids import BASE_NAME
from peft_kernels.formats.adapter_table import BASE
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.integrations._peft_nf4 import input_of, output_for
from peft_kernels.integrations._peft_objections import (
    DROPOUTS,
    PLAIN,
    dropout_probability,
    full_name,
    has_hooks,
    is_fsdp,
    tensor_of,
)
from peft_kernels.integrations._peft_operands import DISABLED, MERGED, NOT_IN_BATCH, is_plain_lora, single


class Choice(NamedTuple):
    """What a batch's names say: `names`, each adapter once, and `ids` int64 [samples], positions among them or -1."""

    names: tuple[str, ...]
    ids: Tensor


_choices: dict[tuple, Choice] = {}


def choose(names: Sequence[str], device: torch.device) -> Choice:
    """The choice of a batch, made once: every layer is given the same names, and every step of a generation."""
    if torch.compiler.is_compiling():
        return _choose(tuple(names), device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    key = (tuple(names), device, stream)
    choice = _choices.get(key)
    if choice is None:
        with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward
            choice = _choose(key[0], device)
        if type(choice.ids) is Tensor:  # not one of a mode that was on at this call, such as a fake one
            if len(_choices) >= 16:
                _choices.clear()
            _choices[key] = choice
    return choice


def _choose(names: tuple[str, ...], device: torch.device) -> Choice:
    unique = tuple(dict.fromkeys(name for name in names if name != BASE_NAME))
    places = {BASE_NAME: BASE, **{name: place for place, name in enumerate(unique)}}
    ids = torch.tensor([places[name] for name in names], dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        return Choice(unique, ids.pin_memory().to(device, non_blocking=True))
    return Choice(unique, ids.to(device))


class Mixed(NamedTuple):
    """Operands of a layer whose samples choose among adapters: one entry of each sequence for each name of the batch,
    None where an adapter has nothing in this layer."""

    weight: Tensor | NF4Weight
    bias: Tensor | None
    lora_As: tuple[Tensor | None, ...]
    lora_Bs: tuple[Tensor | None, ...]
    scalings: tuple[float | None, ...]
    dropout_ps: tuple[float | None, ...]
    choice: Choice
    dtype: torch.dtype

    def output(self, x: Tensor) -> Tensor:
        y = functional.multi_lora_linear(
            input_of(self.weight, x), self.weight, self.lora_As, self.lora_Bs, self.choice.ids, scalings=self.scalings,
            bias=self.bias, dropout_p=_probabilities(self.dropout_ps),
        )  # fmt: skip
        return output_for(x, self.weight, y)


def outputs_together(x: Tensor, parts: Sequence[Mixed]) -> tuple[Tensor, ...]:
    """y of layers over one x, all of which fit the first."""
    weights, first = [part.weight for part in parts], parts[0]
    ys = functional.multi_lora_linear_group(
        input_of(weights[0], x), weights, [part.lora_As for part in parts], [part.lora_Bs for part in parts],
        first.choice.ids, scalings=[part.scalings for part in parts], biases=[part.bias for part in parts],
        dropout_p=_probabilities(first.dropout_ps),
    )  # fmt: skip
    return tuple(output_for(x, weights[0], y) for y in ys)


def fits(part: Mixed, first: Mixed) -> bool:
    """Whether a layer has the batch of another one, and its dropout, which a group has once for each adapter."""
    pairs = zip(part.dropout_ps, first.dropout_ps, strict=True)
    return part.choice is first.choice and all(p is None or p == (q or 0.0) for p, q in pairs)


def _probabilities(dropout_ps: tuple[float | None, ...]) -> float | list[float]:
    return [p or 0.0 for p in dropout_ps] if any(dropout_ps) else 0.0


def mixed(layer: Any, x: Tensor, names: Sequence[str]) -> Mixed | str:
    """The operands of a call with `adapter_names`, or why PEFT's own code has to run.

    Raises:
        ValueError: PEFT's own, when the names do not fit x or the state of the layer.
    """
    if len(x) != len(names) or layer.merged_adapters or layer.lora_variant:
        layer._check_forward_args(x, adapter_names=names)
    return mixed_operands(layer, x, choose(names, x.device))


def mixed_operands(layer: Any, x: Tensor, choice: Choice) -> Mixed | str:
    """As `mixed`, for a batch that fits x."""
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    if x.ndim < 2:
        return "x is a single sample, and the batch names an adapter for each element"
    present, variants = layer._modules["lora_A"]._modules, layer.lora_variant
    here = [name for name in choice.names if name in present]
    if not here:
        return NOT_IN_BATCH
    for name in here if variants else ():
        if not is_plain_lora(variants.get(name)):
            return f"an adapter of the batch is a LoRA variant ({type(variants[name]).__name__})"
    first = single(layer, x, here[0])
    if isinstance(first, str):
        return first
    if first[4] is not None:
        return WITH_BIAS
    factors = _factors(layer, x, here)
    if isinstance(factors, str):
        return factors
    if len(here) < len(choice.names):
        found = dict(zip(here, factors, strict=True))
        factors = [found.get(name, _ABSENT) for name in choice.names]
    lora_As, lora_Bs, scalings, dropout_ps = zip(*factors, strict=True)
    return Mixed(first[0], first[1], lora_As, lora_Bs, scalings, dropout_ps, choice, first[2].dtype)


WITH_BIAS = "an adapter of the batch has a bias (lora_bias)"
_ABSENT = (None, None, None, None)


def _factors(layer: Any, x: Tensor, names: Sequence[str]) -> list[tuple] | str:
    """(A, B, scaling, dropout probability) of adapters of a layer that `single` has looked at for the first of them, or
    why PEFT's own code has to run. A batch may name hundreds: what `single` would say of each, in a third of the
    time."""
    children, ranks, scalings = layer._modules, layer.r, layer.scaling
    lora_As, lora_Bs = children["lora_A"]._modules, children["lora_B"]._modules
    dropouts, kind, found = children["lora_dropout"]._modules, None, []
    for name in names:
        a, b, dropout, scaling = lora_As[name], lora_Bs[name], dropouts[name], scalings[name]
        lora_A: Any = None
        lora_B: Any = None
        if type(a) is not nn.Linear or type(b) is not nn.Linear or type(dropout) not in DROPOUTS:
            return _reason(layer, x, name)
        in_a, in_b = a.__dict__, b.__dict__
        if not (
            in_a["_forward_hooks"] or in_a["_forward_pre_hooks"] or in_a["_backward_hooks"]
            or in_a["_backward_pre_hooks"] or "forward" in in_a or in_b["_forward_hooks"] or in_b["_forward_pre_hooks"]
            or in_b["_backward_hooks"] or in_b["_backward_pre_hooks"] or "forward" in in_b or has_hooks(dropout)
        ):  # fmt: skip
            lora_A, lora_B = tensor_of(a, "weight"), tensor_of(b, "weight")
        if (
            type(lora_A) not in PLAIN
            or type(lora_B) not in PLAIN
            or lora_A.dtype is not lora_B.dtype
            or tensor_of(b, "bias") is not None
            or ranks[name] > MAX_RANK
            or type(scaling) is not float
            or not -math.inf < scaling < math.inf
        ):
            return _reason(layer, x, name)
        if kind is None:
            kind = lora_A.dtype
        elif lora_A.dtype is not kind:
            return (
                f"the adapters of the batch have several dtypes ({', '.join(sorted((str(kind), str(lora_A.dtype))))})"
            )
        p: Any = dropout_probability(dropout) if dropout.training and type(dropout) is nn.Dropout else 0.0
        if isinstance(p, str):
            return p
        found.append((lora_A, lora_B, scaling, p))
    return found


def _reason(layer: Any, x: Tensor, name: str) -> str:
    """Why an adapter that `_factors` does not take cannot be fused."""
    found = single(layer, x, name)
    return found if isinstance(found, str) else WITH_BIAS


class FusedLoraModel(LoraModel):
    """PEFT's `LoraModel`, which takes `adapter_names` in training mode too: made by `accelerate`, which changes the
    class of an existing one."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        if names is None:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
            return
        seen = _Seen(self)
        hooks = LoraModel._enable_peft_forward_hooks(seen, *args, **kwargs)
        hooks.__enter__()
        try:
            with _names_in_recomputation(seen.modules(), names):
                yield
        finally:
            hooks.__exit__(None, None, None)  # given the exception, PEFT would leave its hooks behind

    def _get_name(self) -> str:
        return "LoraModel"


class _Seen:
    """A `LoraModel` as the method that makes its hooks sees it: not in training mode, which it would refuse, and
    without the modules inside of its adapters, of which there may be thousands."""

    training = False

    def __init__(self, tuner: LoraModel) -> None:
        self._tuner, self._modules = tuner, list(_outside_adapters(tuner))

    def modules(self) -> Iterator[nn.Module]:
        return iter(self._modules)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tuner, name)


def _outside_adapters(root: nn.Module) -> Iterator[nn.Module]:
    stack, seen = [root], set()
    while stack:
        module = stack.pop()
        if module not in seen:
            seen.add(module)
            yield module
            inner = (module.base_layer,) if isinstance(module, LoraLayer) else module._modules.values()
            stack += [child for child in inner if child is not None]


@contextmanager
def _names_in_recomputation(modules: Iterable[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Activation checkpointing of transformers runs blocks again inside backward, when PEFT's hooks are gone: inside
    of this, checkpointed blocks take the names with them."""
    forward = _Forward(names)
    found: list[tuple[Any, Any]] = [
        (m, m.__dict__["_gradient_checkpointing_func"]) for m in modules if _is_checkpointed(m)
    ]
    for module, function in found:
        module._gradient_checkpointing_func = partial(_checkpoint, function, forward, module)
    try:
        yield
    finally:
        forward.running = False
        for module, function in found:
            module._gradient_checkpointing_func = function


def _is_checkpointed(module: nn.Module) -> bool:
    return "_gradient_checkpointing_func" in module.__dict__ and bool(module.gradient_checkpointing)


class _Forward:
    """A forward with `names`; `running` until it ends."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.running = list(names), True


def _checkpoint(function, forward: _Forward, module: nn.Module, block, *args, **kwargs):
    return function(partial(_run_block, forward, module, block), *args, **kwargs)


def _run_block(forward: _Forward, module: nn.Module, block, *args, **kwargs):
    if forward.running:
        return block(*args, **kwargs)
    hook = partial(_adapter_names_pre_forward_hook, adapter_names=forward.names)
    named = [m for m in _outside_adapters(module) if isinstance(m, (LoraLayer, AuxiliaryTrainingWrapper))]
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in named]
    try:
        return block(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def fuse_tuners(model: nn.Module) -> None:
    """Lets the LoRA models inside take `adapter_names` in training mode."""
    for module in model.modules():
        if type(module) is LoraModel:
            module.__class__ = FusedLoraModel


def restore_tuners(model: nn.Module) -> None:
    """Undoes `fuse_tuners`.

    Raises:
        RuntimeError: FSDP2 has wrapped one since. The model is unchanged.
    """
    tuners: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, FusedLoraModel)
    }
    for name, module in tuners.items():
        if is_fsdp(module):
            raise RuntimeError(
                f"restore: {name} has become a {full_name(module)} since; restore before fully_shard or the like. "
                "The model is unchanged"
            )
    for module in tuners.values():
        module.__class__ = LoraModel
