"""Folding an update into a weight and taking it out again, for every module that has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.formats.nf4 import NF4Weight
from peft_kernels.nn._weights import moved, state_of


class MergeError(NamedTuple):
    """What putting a merged weight back into 4 bits costs. Norms are Frobenius, in float32.

    Attributes:
        relative: ‖Ŵ - M‖ / ‖M‖ of the quantised weight Ŵ and the merged one M = W + scaling · B A.
        relative_to_update: ‖Ŵ - M‖ / ‖M - W‖. At 1 the error is as large as what was trained: W lies on the grid of 4
            bits, and an update that is small beside a step of it rounds back to W. Infinite without an update.
        max_abs: the largest |Ŵ - M|.
    """

    relative: float
    relative_to_update: float
    max_abs: float

    def __str__(self) -> str:
        return (
            f"4 bits change the merged weight by {100 * self.relative:.3g} % of its norm, "
            f"{100 * self.relative_to_update:.3g} % of the update's, at most {self.max_abs:.3g} in one element"
        )


class Mergeable(nn.Module):
    """A module with an update that `merge` folds into its weight.

    What is replaced is set aside untouched and put back by `unmerge`: adding an update and subtracting it again loses
    bits each time. What is set aside follows `.to()` and the like, and stands in checkpoints in the place of the merged
    values.
    """

    merged = False  # whether `weight` currently includes the update; a plain flag, which torch.compile guards
    _set_aside: dict[str, nn.Parameter | NF4Weight | None]  # by name; empty while nothing is merged
    _merge_options: Mapping[str, Any] = {}  # of the last `merge`

    @property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the update by name."""
        raise NotImplementedError

    def _merged_tensors(self) -> dict[str, Tensor]:
        """What merging replaces, with the merged values."""
        raise NotImplementedError

    def _merged_sum(self) -> Tensor:
        """The merged weight before it is rounded, in float32 at least."""
        raise NotImplementedError

    def _merged_vectors(self) -> dict[str, Tensor]:
        """Those of them beside the weight."""
        return {}

    def _unmerged(self, name: str) -> Any:
        """The parameter, or weight of 4 bits, of that name without the update, whether merged or not."""
        return self._set_aside[name] if name in self._set_aside else getattr(self, name)

    def merge(self) -> MergeError | None:
        """Folds the update into `weight`, so that forward costs what the frozen module's does. Twice is harmless.

        The original weight is kept aside untouched, so that tied or shared weights do not change and `unmerge`
        restores it bit for bit.

        Raises:
            ValueError: a merged value would not be finite; the module is unchanged.
        """
        if not self.merged:
            self._put_merged(self._merged_tensors())
        return None

    def _put_merged(self, values: Mapping[str, Tensor | NF4Weight]) -> None:
        self._set_aside = {name: getattr(self, name) for name in values}
        for name, value in values.items():
            self._put(name, nn.Parameter(value, requires_grad=False) if isinstance(value, Tensor) else value)
        self.merged = True
        self._merge_changed()

    def _put(self, name: str, value: nn.Parameter | NF4Weight | None) -> None:
        if isinstance(value, NF4Weight):  # a plain attribute, which cannot take the place of a parameter
            self._parameters.pop(name, None)
        setattr(self, name, value)

    def unmerge(self) -> None:
        """Puts back the weight that `merge` set aside. Does nothing on a module that is not merged."""
        for name, value in self._set_aside.items():
            self._put(name, value)
        self._set_aside = {}
        self.merged = False
        self._merge_changed()

    def _merge_changed(self) -> None:
        """Called after each change of `merged`."""

    def _apply(self, fn, recurse=True):
        # What is set aside is no registered parameter, but follows .to(), .half() and the like as one.
        if not self.merged:
            return super()._apply(fn, recurse)
        kept = self._set_aside
        hidden = {f"_set_aside_{name}": p for name, p in kept.items() if isinstance(p, nn.Parameter)}
        self._parameters.update(hidden)
        try:
            super()._apply(fn, recurse)
        finally:
            for key in hidden:
                kept[key.removeprefix("_set_aside_")] = self._parameters.pop(key)
        kept.update({name: moved(q, fn) for name, q in kept.items() if isinstance(q, NF4Weight)})
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        # A checkpoint holds W itself: one with the merged weight would apply the update twice when loaded.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._set_aside.items():
            if value is None:
                del destination[prefix + name]
            elif isinstance(value, NF4Weight):
                destination.update(state_of(value, prefix + name))
            else:
                destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        # What is loaded is W and its update; a merged module is merged again from them.
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge(**self._merge_options)


def merge_all(modules: Mapping[str, Mergeable], where: str, *, requantize: bool = False) -> dict[str, MergeError]:
    """Merges all of them, or none: those that are not merged yet.

    Args:
        modules: by name.
        where: what messages begin with.
        requantize: whether weights in 4 bits are merged into 4 bits again.

    Returns:
        By name, what was lost where weights are in 4 bits again.

    Raises:
        ValueError: a merged weight would not be finite; the message begins with `where` and the module's name.
    """
    merged: list[Mergeable] = []
    errors: dict[str, MergeError] = {}
    for name, module in modules.items():
        if module.merged:
            continue
        try:
            options: dict[str, Any] = (
                {"requantize": True} if requantize and isinstance(module.weight, NF4Weight) else {}
            )
            error = module.merge(**options)
        except ValueError as reason:
            for other in merged:
                other.unmerge()
            raise ValueError(f"{where}: {name}: {reason}") from reason
        merged.append(module)
        errors |= {name: error} if error is not None else {}
    return errors


def rounded(value: Tensor, dtype: torch.dtype, module: str, what: str = "weight") -> Tensor:
    """`value` in `dtype`.

    Raises:
        ValueError: it is not finite there.
    """
    value = value.to(dtype)
    if not value.isfinite().all():
        raise ValueError(f"{module}: the merged {what} is not finite; nothing was changed")
    return value
