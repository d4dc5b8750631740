"""Folding an update into a weight and taking it out again, for every module that has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Mergeable(nn.Module):
    """A module with an update that `merge` folds into its weight.

    What is replaced is set aside untouched and put back by `unmerge`: adding an update and subtracting it again loses
    bits each time. Parameters set aside follow `.to()` and the like, and stand in checkpoints in the place of the
    merged ones.
    """

    merged = False  # whether `weight` currently includes the update; a plain flag, which torch.compile guards
    _set_aside: dict[str, nn.Parameter | None]  # by name; empty while nothing is merged

    @property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the update by name."""
        raise NotImplementedError

    def _merged_tensors(self) -> dict[str, Tensor]:
        """The parameters that merging replaces, with their merged values."""
        raise NotImplementedError

    def _unmerged(self, name: str) -> Any:
        """The parameter of that name without the update, whether merged or not."""
        return self._set_aside[name] if name in self._set_aside else getattr(self, name)

    def merge(self) -> None:
        """Folds the update into `weight`, so that forward costs what the frozen module's does. Twice is harmless.

        The original weight is kept aside untouched, so that tied or shared weights do not change and `unmerge`
        restores it bit for bit.

        Raises:
            ValueError: a merged value would not be finite; the module is unchanged.
        """
        if self.merged:
            return
        merged = {name: nn.Parameter(value, requires_grad=False) for name, value in self._merged_tensors().items()}
        self._set_aside = {name: getattr(self, name) for name in merged}
        for name, parameter in merged.items():
            setattr(self, name, parameter)
        self.merged = True
        self._merge_changed()

    def unmerge(self) -> None:
        """Puts back the weight that `merge` set aside. Does nothing on a module that is not merged."""
        for name, parameter in self._set_aside.items():
            setattr(self, name, parameter)
        self._set_aside = {}
        self.merged = False
        self._merge_changed()

    def _merge_changed(self) -> None:
        """Called after each change of `merged`."""

    def _apply(self, fn, recurse=True):
        # What is set aside is no registered parameter, but follows .to(), .half() and the like as one.
        if not self.merged:
            return super()._apply(fn, recurse)
        hidden = {f"_set_aside_{name}": p for name, p in self._set_aside.items() if p is not None}
        self._parameters.update(hidden)
        try:
            return super()._apply(fn, recurse)
        finally:
            for key in hidden:
                self._set_aside[key.removeprefix("_set_aside_")] = self._parameters.pop(key)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        # A checkpoint holds W itself: one with the merged weight would apply the update twice when loaded.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in self._set_aside.items():
            if parameter is None:
                del destination[prefix + name]
            else:
                destination[prefix + name] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        # What is loaded is W and its update; a merged module is merged again from them.
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()


def merge_all(modules: Mapping[str, Mergeable], where: str) -> None:
    """Merges all of them, or none: those that are not merged yet.

    Raises:
        ValueError: a merged weight would not be finite; the message begins with `where` and the module's name.
    """
    merged: list[Mergeable] = []
    for name, module in modules.items():
        if module.merged:
            continue
        try:
            module.merge()
        except ValueError as error:
            for other in merged:
                other.unmerge()
            raise ValueError(f"{where}: {name}: {error}") from error
        merged.append(module)


def rounded(value: Tensor, dtype: torch.dtype, module: str, what: str = "weight") -> Tensor:
    """`value` in `dtype`.

    Raises:
        ValueError: it is not finite there.
    """
    value = value.to(dtype)
    if not value.isfinite().all():
        raise ValueError(f"{module}: the merged {what} is not finite; nothing was changed")
    return value
