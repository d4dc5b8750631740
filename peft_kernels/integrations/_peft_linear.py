"""PEFT's linear LoRA layers with a `forward` that computes the whole layer at once."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from peft_kernels import functional
from peft_kernels.integrations._peft_groups import GROUPABLE, Place
from peft_kernels.integrations._peft_multi import mixed
from peft_kernels.integrations._peft_operands import NOTHING_TO_FUSE, operands
from peft_kernels.integrations.report import Calls

logger = logging.getLogger("peft_kernels")


class Site(NamedTuple):
    """A layer's name in its model, and the record that the layers of the model share."""

    name: str
    calls: Calls


class FusedLinear(nn.Module):
    """Mixed into PEFT's classes of linear layers, before them."""

    _peft_kernels = Site("a layer", Calls())
    _peft_kernels_place: Place | None = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As PEFT's: x [..., in_features] to [..., out_features]. What has no meaning here goes to PEFT's own code."""
        found = _with_arguments(self, x, args, kwargs) if args or kwargs else operands(self, x)
        if self._peft_kernels_place is not None and type(found) in GROUPABLE and type(self) in LINEARS:
            y = self._peft_kernels_place.output(self, x, found)
            if y is not None:
                return y
        if type(found) is tuple:
            weight, bias, lora_A, lora_B, lora_bias, scaling, dropout_p = found
            return functional.lora_linear(
                x, weight, lora_A, lora_B, scaling=scaling, bias=bias, lora_bias=lora_bias, dropout_p=dropout_p
            )
        if isinstance(found, str):
            record(self, found)
            return super().forward(x, *args, **kwargs)
        return found.output(x)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if self._peft_kernels_place is not None:  # a deep copy, or read from a file
            self._peft_kernels_place.group.join(self._peft_kernels_place.position, self)

    def merge(self, *args, **kwargs) -> None:
        """As PEFT's."""
        self._forget()
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self) -> None:
        """As PEFT's."""
        self._forget()
        super().unmerge()  # type: ignore[misc]

    def _apply(self, *args, **kwargs):
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _forget(self) -> None:
        for name in ("_peft_kernels_norms", "_peft_kernels_stored"):
            kept = self.__dict__.get(name)
            if kept is not None:
                kept.forget()


class FusedPeftLinear(FusedLinear, Linear):
    """PEFT's `lora.Linear` with a `forward` that calls `peft_kernels.functional` where that computes the same.

    Made by `accelerate`, which changes the class of an existing layer; all state is PEFT's own.
    """

    def _get_name(self) -> str:
        return "Linear"  # so that repr says `lora.Linear`, as PEFT's


LINEARS: dict[type, Any] = {FusedPeftLinear: Linear}
"""The fused classes -> PEFT's own."""

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    class FusedPeftLinear4bit(FusedLinear, Linear4bit):
        """PEFT's `lora.bnb.Linear4bit`, as `FusedPeftLinear`. The weight is multiplied from its 4 bits."""

        def _get_name(self) -> str:
            return "Linear4bit"

    LINEARS[FusedPeftLinear4bit] = Linear4bit


def arguments_objection(args: tuple, kwargs: dict) -> str | None:
    """What a call may not have besides x, in layers of all kinds. Offsets concern activated LoRA; other adapters ignore
    them."""
    if args or not kwargs.keys() <= {"alora_offsets"}:
        names = sorted(kwargs) or [f"{len(args)} positional"]
        return f"the call has arguments besides x ({', '.join(names)})"
    return None


def _with_arguments(layer: FusedLinear, x: Tensor, args: tuple, kwargs: dict) -> Any:
    names = kwargs.get("adapter_names")
    if names is not None and not args and kwargs.keys() <= {"adapter_names", "alora_offsets"}:
        return mixed(layer, x, names)
    return arguments_objection(args, kwargs) or operands(layer, x, kwargs["alora_offsets"])


def record(layer: Any, reason: str) -> None:
    """Counts a call of PEFT's own code and logs its reason, the first time. Compiled code is not counted: a counter
    that changes would make it recompile."""
    name, calls = layer._peft_kernels
    if calls.strict and reason not in NOTHING_TO_FUSE:
        raise RuntimeError(f"{name}: {reason}, which needs PEFT's own code; accelerate(..., strict=True) refuses that")
    if torch.compiler.is_compiling():
        return
    if reason not in calls.fallbacks:
        logger.warning("%s runs PEFT's own code: %s", name, reason)
        calls.fallbacks[reason] = Counter()
    calls.fallbacks[reason][name] += 1
