"""Projections of one x, such as q/k/v and gate/up, computed together although the model calls them one by one.

No forward of the model is replaced. The member of a group that is called first computes all of them by
`lora_linear_group` and leaves the others their results, which they return in calls of their own, so that their hooks
run. A left result is taken only by a call with the same tensor, unchanged, while nothing that it was computed from has
changed. Whether the members of a group are called so follows from the source of their parent (`_peft_source.py`); a
group of which that turns out not to be true ends.

Activation checkpointing runs a block a second time, inside backward, and relies on it doing the same as before. So a
group never changes what it does inside backward.
"""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels import functional
from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.integrations._peft_multi import Mixed, fits, mixed_operands, outputs_together
from peft_kernels.integrations._peft_nf4 import Quantised, changes, input_of, output_for
from peft_kernels.integrations._peft_objections import QUANTISED
from peft_kernels.integrations._peft_operands import Several, operands
from peft_kernels.integrations._peft_source import plain_class, shared_inputs
from peft_kernels.integrations.report import Block, Calls

logger = logging.getLogger("peft_kernels")

# Multiply-adds of one projection below which, on a CPU, the hand-over takes longer than sharing a pass over x saves:
# measured with one thread, q/k/v at 64 x 256 x 256 took 1.07 of the time of three layers, at 512 x 1024 x 1024 0.97.
SMALL_ON_CPU = 1 << 25


# Operands of one plain adapter, over a dense weight or one of 4 bits.
SINGLE = (tuple, Quantised)
GROUPABLE = (*SINGLE, Several, Mixed)


class Group:
    """Layers of one parent. Refers to them weakly, and copies of them refer to a copy of it: each layer joins by
    itself (`Place`)."""

    def __init__(self, name: str, labels: tuple[str, ...], calls: Calls) -> None:
        self.name, self.labels, self.calls = name, labels, calls
        self.members: list[weakref.ref | None] = [None] * len(labels)
        self.objection: str | None = None
        self.ended = False

    def __reduce__(self) -> tuple:
        return Group, (self.name, self.labels, self.calls)

    def join(self, position: int, layer: nn.Module) -> None:
        """Makes the layer a member, unless its place is taken: by the original of a shallow copy."""
        member = self.members[position]
        if member is None or member() is None:
            self.members[position] = weakref.ref(layer)

    def end(self, reason: str) -> None:
        """From its next round on, the layers of this group run one by one."""
        if self.objection is None:
            logger.warning("%s runs %s one by one from now on: %s", self.name, ", ".join(self.labels), reason)
            self.objection = self.calls.ended[self.name] = reason


class Place(NamedTuple):
    """Where a layer stands in its group: they are called in this order."""

    group: Group
    position: int

    def output(self, layer: nn.Module, x: Tensor, found: Any) -> Tensor | None:
        """y of the layer, from the group; None when the layer has to compute it by itself."""
        group, position = self
        if torch.compiler.is_compiling():
            return None  # the hand-over is made for eager mode
        round = _thread.round
        if round is not None and round.group is group and position in round.left:
            return round.take(position, x, found)
        return _start(group, position, layer, x, found)


class Round:
    """What the first member of a group has left for the others."""

    __slots__ = ("context", "first", "group", "in_backward", "left", "x")

    def __init__(self, group: Group, first: int, x: Tensor, left: dict[int, tuple[Any, tuple, Tensor]]) -> None:
        self.group, self.first, self.left, self.context = group, first, left, _context(x)
        self.in_backward = _in_backward()
        # When x dies, which backward lets happen, nobody can ask for the results any more.
        self.x = weakref.ref(x, lambda _: left.clear())

    def take(self, position: int, x: Tensor, found: Any) -> Tensor | None:
        part, state, y = self.left.pop(position)
        if not self.left:
            _thread.round = None
        if self.x() is x and _same(found, part) and _state(found) == state and _context(x) == self.context:
            return y
        if not self.in_backward:
            labels = self.group.labels
            what = "in another state" if self.x() is x else "with another tensor"
            self.group.end(f"{labels[position]} is called {what} than {labels[self.first]}")
        return None

    def end(self) -> None:
        if self.left and not self.in_backward:
            labels = self.group.labels
            missing = ", ".join(labels[position] for position in sorted(self.left))
            self.group.end(f"{labels[self.first]} is called, but not {missing}")
        self.left.clear()


class _Thread(threading.local):
    """One round at a time in each thread: a model that was interrupted leaves at most one, until its next call."""

    round: Round | None = None


_thread = _Thread()


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether layers had better be computed one by one."""
    return x.device.type == "cpu" and x.numel() * weight.shape[0] < SMALL_ON_CPU


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _start(group: Group, first: int, layer: nn.Module, x: Tensor, found: Any) -> Tensor | None:
    """Computes all members that can be computed now, and returns y of the one that is called. That has to be the first
    of them: which member computes the others must not depend on which one a checkpoint calls again by itself."""
    round = _thread.round
    if round is not None and (round.group is not group or round.first == first):
        _thread.round = None
        round.end()
    if group.ended:
        return None
    if group.objection is not None and not _in_backward():
        group.ended = True
        return None
    members = [None if reference is None else reference() for reference in group.members]
    if members[first] is not layer or x.is_inference():
        return None  # a replica, as of DataParallel; a tensor whose changes nothing counts
    if is_small(x, found[0]):
        return None
    parts = {}
    for position, member in enumerate(members):
        if type(member) is type(layer):
            part = found if position == first else _operands_like(found, member, x)
            if _groupable(part, found, x):
                parts[position] = part
                if position < first:
                    return None
    if first not in parts or len(parts) < 2:
        return None
    ys = _compute(x, list(parts.values()))
    left = {position: (part, _state(part), y) for (position, part), y in zip(parts.items(), ys, strict=True)}
    del left[first]
    _thread.round = Round(group, first, x, left)
    return ys[0]


def _operands_like(found: Any, member: Any, x: Tensor) -> Any:
    """Of a layer that is going to be called as the one was that has `found`."""
    return mixed_operands(member, x, found.choice) if type(found) is Mixed else operands(member, x)


def _groupable(part: Any, first: Any, x: Tensor) -> bool:
    if type(part) in SINGLE:
        weight, _, lora_A, _, lora_bias, _, _ = part
        if lora_bias is not None:
            return False
    elif type(part) is Several:
        weight, lora_A = part.weight, part.lora_As[0]
    elif type(part) is Mixed and fits(part, first):
        weight, lora_A = part.weight, part
    else:
        return False
    if lora_A.dtype != _adapter_dtype(first) or weight.device != x.device:
        return False
    if type(weight) is NF4Weight or type(first[0]) is NF4Weight:
        return weight.dtype == first[0].dtype  # the dtype of the computation, of which x may be another
    return not weight.is_inference()


def _adapter_dtype(part: Any) -> torch.dtype:
    if type(part) in SINGLE:
        return part[2].dtype
    return part.dtype if type(part) is Mixed else part.lora_As[0].dtype


def _compute(x: Tensor, parts: list) -> tuple[Tensor, ...]:
    if type(parts[0]) is Mixed:
        return outputs_together(x, parts)
    weights, biases, lora_As, lora_Bs, scalings, dropout_ps = [], [], [], [], [], []
    for part in parts:
        weight, bias, lora_A, lora_B, *_, scaling, dropout_p = part
        weights.append(weight)
        biases.append(bias)
        lora_As.append(lora_A)
        lora_Bs.append(lora_B)
        scalings.append(scaling)
        dropout_ps.append(dropout_p)
    ys = functional.lora_linear_group(
        input_of(weights[0], x), weights, lora_As, lora_Bs, scalings=scalings, biases=biases, dropout_p=dropout_ps
    )
    return tuple(output_for(x, weights[0], y) for y in ys)


def _context(x: Tensor) -> tuple:
    """What a result depends on besides the operands, and the innermost activation checkpoint, which must compute again
    all that was computed inside it and nothing else."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return x._version, torch.is_grad_enabled(), dtype, torch._C._autograd._top_saved_tensors_default_hooks(True)


def _state(part: Any) -> tuple:
    """What may change about the operands while they stay the same objects."""
    if type(part) in SINGLE:  # at every call of every member, so without a loop
        weight, bias, lora_A, lora_B, _, _, _ = part
        count = changes(weight) + lora_A._version + lora_B._version + (0 if bias is None else bias._version)
        trained = type(weight) is not NF4Weight and weight.requires_grad
        return count, trained, lora_A.requires_grad, lora_B.requires_grad
    weights = (part.weight,) if isinstance(part.weight, Tensor) else part.weight.tensors
    tensors = (*weights, part.bias, *part.lora_As, *part.lora_Bs)
    return tuple((tensor._version, tensor.requires_grad) for tensor in tensors if tensor is not None)


def _same(part: Any, other: Any) -> bool:
    """Whether two operands hold the same objects."""
    if type(part) in (Several, Mixed) and type(part) is type(other):
        return len(part.lora_As) == len(other.lora_As) and all(map(operator.is_, _flat(part), _flat(other)))
    return type(part) is type(other) and type(part) in SINGLE and all(map(operator.is_, part, other))


def _flat(part: Several | Mixed) -> tuple:
    choice = part.choice if type(part) is Mixed else None
    return part.weight, part.bias, *part.lora_As, *part.lora_Bs, *part.scalings, *part.dropout_ps, choice


def form(model: nn.Module, fused: Container[type], calls: Calls) -> list[Block]:
    """Makes groups of the layers of types `fused`, and says which of them hold together as the layers are now."""
    blocks = []
    for name, parent in model.named_modules():
        if "forward" in parent.__dict__:
            continue
        for labels in shared_inputs(plain_class(parent).forward):
            children: dict[str, Any] = {label: parent._modules.get(label) for label in labels}
            members = {
                label: child
                for label, child in children.items()
                if type(child) in fused and type(child.base_layer) in (nn.Linear, *QUANTISED)
            }
            if len(members) < 2 or len({child.in_features for child in members.values()}) > 1:
                continue
            group = Group(name, tuple(members), calls)
            for position, child in enumerate(members.values()):
                child._peft_kernels_place = Place(group, position)
                group.join(position, child)
            blocks.append(Block(name, group.labels, "lora_linear_group"))
    return blocks
